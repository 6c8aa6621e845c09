"""LLaVA's batches: one modality each, exact counts, equal lengths, the same for any number of ranks, bad samples."""

import json
import logging
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from data_mix.batches.conversation_batches import MAX_SIDE, NO_ANSWER, WINDOW_BATCHES, ConversationBatches
from data_mix.conversations import open_conversations
from data_mix.sources.config import ConversationSourceConfig
from downstream.llava.template import IMAGE, Template
from tests.helpers.llava_files import entry, write_conversations
from um3.core.errors import UserError
from um3.model.text_tokenizer import train_text_tokenizer

BATCH = 4


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_text_tokenizer(["question yes no red green blue"] * 3, vocab_size=280)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


@pytest.fixture
def make(tmp_path, tokenizer):
    """Opens batches of the conversations in `tmp_path`; keywords change the seed or the ranks."""
    write_conversations(tmp_path)

    def _make(**options):
        path, images = str(tmp_path / "conversations.json"), str(tmp_path)
        config = ConversationSourceConfig("talk", path=path, images=images, val_fraction=0)
        return ConversationBatches(
            {"talk": open_conversations(config, split="train", check_images=True)},
            weights=[1.0],
            template=Template(tokenizer, kind="v1", num_image_tokens=4, max_tokens=400),
            pixels=lambda image: torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1).float(),
            **{"batch_size": BATCH, "cache": tmp_path / "cache", "seed": 0} | options,
        )

    return _make


def numbers(batches, batch) -> list[int]:
    """Places in the file of a batch's conversations."""
    keys = [conversation.key for conversation in batches.sources["talk"]]
    return [keys.index(key) for key in batch.keys]


def test_every_batch_has_one_modality_and_its_own_pixels_and_the_counts_are_exact(make, tokenizer):
    batches = make()
    kinds: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    num_steps = 4 * WINDOW_BATCHES  # of images three windows, of texts one
    for step in range(num_steps):
        batch = batches.batch(step)
        is_image_BT = batch.input_ids_BT == tokenizer.convert_tokens_to_ids(IMAGE)
        kind, _ = batches.modality(step)
        assert (is_image_BT.sum(1) == (4 if kind == "image" else 0)).all()
        assert (batch.pixels_BCHW is not None) == (kind == "image") and len(batch.keys) == BATCH
        assert not (batch.target_mask_BT & is_image_BT).any() and batch.target_mask_BT.any(1).all()
        if kind == "image":
            for number, pixels_CHW in zip(numbers(batches, batch), batch.pixels_BCHW, strict=True):
                assert int(pixels_CHW.mean((1, 2)).argmax()) == number % 3
        kinds[kind] += 1
        keys.update(batch.keys)
        assert abs(kinds["image"] - 0.75 * (step + 1)) < 1
    assert kinds == {"image": 24, "text": 8}
    assert len(keys) == 32 and set(keys.values()) == {4}


def test_lengths_are_alike_within_a_batch_and_the_order_is_random(make):
    batches, spans = make(), []
    for step in range(4 * WINDOW_BATCHES):
        if batches.modality(step)[0] == "image" and batches.modality(step)[1] < WINDOW_BATCHES:
            lengths = numbers(batches, batches.batch(step))  # image i has i + 1 words
            spans.append((min(lengths), max(lengths)))
    assert len(spans) == WINDOW_BATCHES
    ordered = sorted(spans)
    assert all(first[1] <= second[0] for first, second in pairwise(ordered)) and spans != ordered
    assert [make(seed=1).batch(step).keys for step in range(4)] != [make().batch(step).keys for step in range(4)]


def test_the_batch_is_the_same_for_any_number_of_ranks_and_any_start(make):
    whole = make()
    parts = [make(rank=rank, world_size=2) for rank in range(2)]
    for step in (13, 0, 7):
        batch, halves = whole.batch(step), [part.batch(step) for part in parts]
        assert Counter(batch.keys) == Counter([*halves[0].keys, *halves[1].keys])
        assert batch.num_tokens == sum(half.num_tokens for half in halves)
    with pytest.raises(UserError, match="3 processes"):
        make(world_size=3)


def test_unusable_conversations_are_replaced_counted_and_named(make, tmp_path, caplog):
    Image.new("RGB", (200, 2)).save(tmp_path / "05.png")
    batches = make()
    (tmp_path / "07.png").unlink()  # after the start
    skipped: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        for step in range(4 * WINDOW_BATCHES):
            batch = batches.batch(step)
            assert not {5, 7} & set(numbers(batches, batch)) and len(batch.keys) == BATCH
            skipped += batch.skipped
    assert set(skipped) == {"too narrow an image", "missing image"} and min(skipped.values()) >= 4
    assert "05.png: 200 x 2" in caplog.text and "07.png" in caplog.text


def test_answers_outside_the_window_are_skipped_and_none_left_is_an_error(make, tmp_path, tokenizer):
    entries = [entry(index, None, "yes") for index in range(200)] + [entry(200, None, "yes")]
    entries[-1]["conversations"][0]["value"] = "long " * 300
    (tmp_path / "conversations.json").write_text(json.dumps(entries))
    skipped: Counter[str] = Counter()
    batches = make()
    for step in range(60):
        skipped += batches.batch(step).skipped
    assert set(skipped) == {NO_ANSWER}
    (tmp_path / "conversations.json").write_text(json.dumps(entries[-1:] * 200))
    with pytest.raises(UserError, match=rf"none of the 200 conversations.*{NO_ANSWER} \(200\)"):
        make().batch(0)


def test_a_large_image_is_scaled_down_before_it_is_padded(make, tmp_path):
    Image.new("RGB", (MAX_SIDE * 2, 400), (9, 9, 9)).save(tmp_path / "00.png")
    batches, sizes = make(), []
    batches.pixels = lambda image: sizes.append(image.size) or torch.zeros(3, 2, 2)
    for step in range(4 * WINDOW_BATCHES):
        batches.batch(step)
    assert (MAX_SIDE, 200) in sizes and max(width for width, _ in sizes) == MAX_SIDE


def test_lengths_are_counted_once_a_run(make, tmp_path):
    make()
    (file,) = (tmp_path / "cache").glob("words-*.npy")
    words = np.load(file)
    assert (words > 0).sum() == 24 and (words < 0).sum() == 8
    np.save(file, np.where(words < 0, words, -words))
    assert make().modality(0)[0] == "text" == make().modality(1)[0]
