"""The grammar keeps stock generation legal at any temperature, and agrees with what sampling draws."""

from collections.abc import Callable

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, set_seed

from um3.inference.grammar import Grammar, GrammarProcessor
from um3.model import sequences as rows
from um3.model.language_model import ModelConfig, build_model
from um3.model.vocabulary import UnifiedVocabulary


@pytest.fixture
def ids(make_ids: Callable[..., UnifiedVocabulary]) -> UnifiedVocabulary:
    return make_ids(num_patches=4, subtokens=2, bits_per_subtoken=4)


@pytest.fixture
def model(ids: UnifiedVocabulary) -> PreTrainedModel:
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16)
    return build_model(config, ids=ids).eval()


def is_legal(tokens: list[int], *, ids: UnifiedVocabulary) -> bool:
    """Written apart from the grammar: every begin of image is followed by a whole image and its end."""
    place = 0
    while place < len(tokens):
        if tokens[place] == ids.begin_of_image_id:
            image = tokens[place + 1 : place + 1 + ids.image_tokens]
            for index, token in enumerate(image):
                start, end = ids.subtoken_range(index % ids.subtokens)
                if not start <= token < end:
                    return False
            place += 1 + ids.image_tokens
            if place < len(tokens) and tokens[place] != ids.end_of_image_id:
                return False
        elif not 4 < tokens[place] < ids.text_vocab_size and tokens[place] != ids.eos_id:
            return False
        place += 1
    return True


@pytest.mark.parametrize("temperature", [0.3, 1.0, 100.0])
def test_stock_generation_stays_legal(model: PreTrainedModel, ids: UnifiedVocabulary, temperature: float) -> None:
    prompts = torch.tensor([[0, 10, 11, 3], [2, 0, 12, 13], [0, 14, 15, 16]])
    model.lm_head.weight.data[3] *= 0  # begin of image comes now and then
    set_seed(1)
    output = model.generate(  # type: ignore[operator]
        prompts.repeat(8, 1), attention_mask=(prompts != 2).long().repeat(8, 1), do_sample=True, max_new_tokens=40,
        temperature=temperature, top_k=0, eos_token_id=95, pad_token_id=2,
        logits_processor=LogitsProcessorList([GrammarProcessor(ids)]),
    )  # fmt: skip
    answers = output[:, 4:].tolist()
    for row, answer in zip(prompts.repeat(8, 1).tolist(), answers, strict=True):
        assert is_legal(([3] if row[-1] == 3 else []) + answer, ids=ids)
    assert sum(answer.count(3) for answer in answers) > 2, "text rows must begin images as well"
    assert not is_legal([3, 50, 51], ids=ids)


def test_what_may_follow(ids: UnifiedVocabulary) -> None:
    grammar, image = Grammar(ids), ids.codes_to_ids(torch.tensor([1, 2, 3, 250])).tolist()
    assert grammar.allowed([0, 10]) is None
    assert grammar.allowed([0, 10, 3]) == range(50, 66)
    assert grammar.allowed([0, 10, 3, image[0]]) == range(66, 82)
    assert grammar.allowed([0, 10, 3, *image]) == ids.end_of_image_id
    assert grammar.allowed([0, 10, 3, *image, 4]) is None
    assert grammar.allowed([0, 3, *image, 4, 20, 3, *image[:2]]) == range(50, 66)


def test_without_drawing_only_text_comes(ids: UnifiedVocabulary) -> None:
    logits = torch.zeros(ids.vocab_size + 6)  # a head padded to a round size
    open_ids = Grammar(ids, drawing=False).apply([0, 10], logits).isfinite().nonzero().flatten().tolist()
    assert open_ids == [1, *range(5, 50)]
    assert Grammar(ids).apply([0, 10], logits).isfinite().nonzero().flatten().tolist() == [1, 3, *range(5, 50)]
    assert Grammar(ids).apply([0, 3], logits).isfinite().nonzero().flatten().tolist() == [*range(50, 66)]


def test_a_tokenizer_without_bos_may_still_end(ids: UnifiedVocabulary) -> None:
    import dataclasses

    shared = dataclasses.replace(ids, bos_id=ids.eos_id)
    assert Grammar(shared).apply([1, 10], torch.zeros(ids.vocab_size))[ids.eos_id] == 0


def test_prompts_of_captioning_end_in_text(ids: UnifiedVocabulary) -> None:
    prompt = rows.caption_prompt(ids.codes_to_ids(torch.tensor([1, 2, 3, 250])), ids=ids)
    assert Grammar(ids).allowed(prompt.tolist()) is None
