"""The vocabulary: round trips, disjoint ranges, stored form, invalid sizes."""

import json

import pytest
import torch

from tests.helpers.tiny_um3 import make_ids
from um3.model.vocabulary import OLD_KEYS, UnifiedVocabulary


@pytest.mark.parametrize(("subtokens", "bits_per_subtoken"), [(1, 1), (1, 12), (2, 14), (4, 7), (28, 1), (3, 20)])
def test_every_code_survives_the_round_trip(subtokens, bits_per_subtoken):
    ids = make_ids(subtokens=subtokens, bits_per_subtoken=bits_per_subtoken)
    codes_BN = torch.randint(0, 2**ids.num_bits, (50, 16), generator=torch.Generator().manual_seed(0))
    codes_BN[0, :2] = torch.tensor([0, 2**ids.num_bits - 1])
    visual_ids = ids.codes_to_ids(codes_BN)
    assert visual_ids.shape == (50, ids.image_tokens)
    assert torch.equal(ids.ids_to_codes(visual_ids), codes_BN)


def test_the_papers_split_of_28_bits():
    ids = make_ids(subtokens=2, bits_per_subtoken=14, num_patches=256, text_vocab_size=128_258)
    assert (ids.image_tokens, ids.visual_vocab_size, ids.vocab_size) == (512, 32_768, 161_026)
    code = (5 << 14) | 9
    assert ids.codes_to_ids(torch.tensor([code])).tolist() == [128_258 + 5, 128_258 + 16_384 + 9]


def test_with_a_depth_head_a_patch_is_one_id_and_the_sum_of_its_rows():
    ids = make_ids(subtokens=2, bits_per_subtoken=14, num_patches=256, text_vocab_size=128_258, depth_layers=1)
    flat = make_ids(subtokens=2, bits_per_subtoken=14, num_patches=256, text_vocab_size=128_258)
    assert (ids.image_tokens, ids.image_subtokens, ids.vocab_size) == (256, 512, flat.vocab_size)
    codes_N = torch.tensor([0, (5 << 14) | 9, 2**28 - 1])
    visual_ids = ids.codes_to_ids(codes_N)
    assert torch.equal(ids.ids_to_codes(visual_ids), codes_N)
    rows_NS = ids.ids_to_rows(visual_ids)
    assert torch.equal(rows_NS.flatten(), flat.codes_to_ids(codes_N))
    assert torch.equal(ids.rows_to_ids(rows_NS), visual_ids)
    assert ids.ids_to_rows(torch.tensor([7])).tolist() == [[7, -1]]
    for wrong in (128_257, 128_258 + 2**28):
        with pytest.raises(ValueError, match="28 bits"):
            ids.ids_to_codes(torch.tensor([wrong]))
    stored = ids.to_dict()
    assert UnifiedVocabulary.from_dict(stored) == ids
    del stored["depth_layers"]  # an older version
    assert UnifiedVocabulary.from_dict(stored) == flat
    with pytest.raises(ValueError, match="2 or more subtokens"):
        make_ids(subtokens=1, depth_layers=1)


def test_subtoken_ranges_cover_the_visual_half():
    ids = make_ids()
    covered = [entry for subtoken in range(ids.subtokens) for entry in range(*ids.subtoken_range(subtoken))]
    assert covered == list(range(ids.text_vocab_size, ids.vocab_size))
    with pytest.raises(ValueError, match="subtoken 4"):
        ids.subtoken_range(4)


def test_ids_of_another_subtoken_or_of_text_are_refused():
    ids = make_ids()
    visual_ids = ids.codes_to_ids(torch.zeros(2, 16, dtype=torch.int64))
    swapped = visual_ids.clone()
    swapped[1, 4] = ids.subtoken_range(1)[0]
    cases = {r"position 4 .* subtoken 0": swapped, "id 3": torch.full((1, 4), 3), "5 visual ids": visual_ids[:, :5]}
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            ids.ids_to_codes(wrong)


def test_the_stored_form_may_have_other_keys_and_the_names_of_older_versions():
    ids = make_ids()
    stored = json.loads(json.dumps(ids.to_dict() | {"fingerprint": "abc"}))
    assert UnifiedVocabulary.from_dict(stored) == ids
    for name, old_name in OLD_KEYS.items():
        stored[old_name] = stored.pop(name)
    assert UnifiedVocabulary.from_dict(stored) == ids


def test_invalid_sizes_are_refused():
    for message, sizes in {
        "more subtokens": {"subtokens": 1, "bits_per_subtoken": 28},
        "begin_of_image_id = 3": {"text_vocab_size": 3},
        "at least 1": {"subtokens": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            make_ids(**sizes)
