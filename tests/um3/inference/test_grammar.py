"""The grammar keeps stock generation legal at any temperature, and agrees with our sampling."""

import dataclasses
import re

import pytest
import torch
from transformers import LogitsProcessorList, set_seed

from tests.helpers.tiny_um3 import make_ids, make_model
from um3.inference.grammar import Grammar, GrammarProcessor
from um3.model import sequences

IDS = make_ids(num_patches=4, subtokens=2, bits_per_subtoken=4)
IMAGE = IDS.codes_to_ids(torch.tensor([1, 2, 3, 250])).tolist()
TEXT = [1, 3, *range(5, 50)]
"""End of text, begin of image and the text entries."""
KINDS = {1: "t", 3: "b", 4: "e"} | dict.fromkeys(range(5, 50), "t")
KINDS |= dict.fromkeys(range(50, 66), "0") | dict.fromkeys(range(66, 82), "1")


def is_legal(tokens):
    """Independent of the grammar: every begin of image is followed by a whole image and its end, as far as it goes."""
    kinds = "".join(KINDS.get(token, "?") for token in tokens)
    return bool(re.fullmatch("(t|b(01){4}e)*(b(01){0,3}0?|b(01){4})?", kinds))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 100.0])
def test_stock_generation_stays_legal(temperature):
    model = make_model(IDS, hidden_size=16, num_layers=1)
    prompts = torch.tensor([[0, 10, 11, 3], [2, 0, 12, 13], [0, 14, 15, 16]]).repeat(8, 1)
    model.lm_head.weight.data[3] *= 0  # begin of image comes now and then
    set_seed(1)
    output = model.generate(
        prompts, attention_mask=(prompts != 2).long(), do_sample=True, max_new_tokens=40, temperature=temperature,
        top_k=0, eos_token_id=95, pad_token_id=2, logits_processor=LogitsProcessorList([GrammarProcessor(IDS)]),
    )  # fmt: skip
    answers = output[:, 4:].tolist()
    for prompt, answer in zip(prompts.tolist(), answers, strict=True):
        assert is_legal(([3] if prompt[-1] == 3 else []) + answer)
    assert sum(answer.count(3) for answer in answers) > 2, "texts must begin images as well"
    assert not is_legal([3, 50, 51]) and not is_legal([3, *IMAGE, 20]) and not is_legal([2])


@pytest.mark.parametrize(
    ("so_far", "open_ids"),
    [
        ([0, 10], TEXT),
        ([0, 10, 3], range(50, 66)),
        ([0, 10, 3, IMAGE[0]], range(66, 82)),
        ([0, 10, 3, *IMAGE], [4]),
        ([0, 3, *IMAGE, 4, 20, 3, *IMAGE[:2]], range(50, 66)),
        (sequences.caption_prompt(IMAGE, ids=IDS).tolist(), TEXT),
    ],
)
def test_the_logits_of_other_ids_are_masked(so_far, open_ids):
    logits_V = torch.zeros(IDS.vocab_size + 6)  # a head padded to a round size
    assert Grammar(IDS).apply(so_far, logits_V).isfinite().nonzero().flatten().tolist() == [*open_ids]
    if open_ids is TEXT:
        text_only_V = Grammar(IDS, images=False).apply(so_far, logits_V)
        assert text_only_V.isfinite().nonzero().flatten().tolist() == [1, *range(5, 50)]


def test_a_tokenizer_without_bos_may_still_end():
    shared = dataclasses.replace(IDS, bos_id=IDS.eos_id)
    assert Grammar(shared).apply([1, 10], torch.zeros(IDS.vocab_size))[IDS.eos_id] == 0
