"""Layouts of training sequences, their targets, and that prompts are their beginnings."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_um3 import make_ids
from um3.model import sequences
from um3.model.text_tokenizer import decode, encode_texts, encode_turns, train_text_tokenizer

IDS = make_ids(num_patches=2)
VISUAL = IDS.codes_to_ids(torch.tensor([7, 2**28 - 1]))
CAPTION = [10, 11, 12]
IMAGE = [3, *VISUAL.tolist(), 4]
LAYOUTS = {
    "text": ([0, *CAPTION, 1], [*CAPTION, 1]),
    "image-to-text": ([0, *IMAGE, *CAPTION, 1], [*CAPTION, 1]),
    "text-to-image": ([0, *CAPTION, *IMAGE, 1], [*IMAGE, 1]),
    "unconditional": ([0, *IMAGE, 1], [*IMAGE[1:], 1]),
}
"""Tokens and targets under supervision "target"."""


def make(kind, **options):
    parts = {"text": [CAPTION], "image-to-text": [VISUAL, CAPTION], "text-to-image": [CAPTION, VISUAL]}
    function = getattr(sequences, kind.replace("-", "_") + "_sequence")
    return function(*parts.get(kind, [VISUAL]), ids=IDS, **options)


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_layout_and_targets(kind):
    tokens, targets = LAYOUTS[kind]
    sequence = make(kind)
    assert sequence.input_ids.tolist() == tokens and sequence.input_ids.dtype == torch.int64
    assert sequence.input_ids[sequence.targets].tolist() == targets and sequence.targets.dtype == torch.bool
    if kind != "text":
        sequence = make(kind, supervision="all")
        assert sequence.input_ids[sequence.targets].tolist() == tokens[1:]


def test_prompts_begin_the_sequences():
    for prompt, kind in (
        (sequences.image_prompt(CAPTION, ids=IDS), "text-to-image"),
        (sequences.image_prompt([], ids=IDS), "unconditional"),
        (sequences.caption_prompt(VISUAL, ids=IDS), "image-to-text"),
        (sequences.text_prompt(CAPTION, ids=IDS), "text"),
    ):
        assert prompt.tolist() == LAYOUTS[kind][0][: len(prompt)]


def test_positions_restart_at_every_document():
    bos, pad = IDS.bos_id, IDS.pad_id
    ids_BT = torch.tensor([[bos, 9, 9, bos, 9, bos, bos, 9, pad, pad], [9, 9, bos, 9, 9, 9, 9, 9, 9, 9], [pad] * 10])
    assert sequences.document_positions(ids_BT, bos_id=bos).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1, 2, 3],
        [0, 1, 0, 1, 2, 3, 4, 5, 6, 7],
        list(range(10)),
    ]


def test_empty_and_tensor_inputs():
    assert sequences.text_sequence([], ids=IDS).input_ids.tolist() == [0, 1]
    tokens = sequences.text_sequence(torch.tensor(CAPTION, dtype=torch.int32), ids=IDS).input_ids
    assert tokens.dtype == torch.int64 and tokens.tolist() == [0, *CAPTION, 1]


def test_wrong_image_length_and_supervision_are_refused():
    with pytest.raises(ValueError, match="8 visual ids"):
        sequences.caption_prompt(VISUAL[:-1], ids=IDS)
    with pytest.raises(ValueError, match="some"):
        make("unconditional", supervision="some")


QUESTION, ANSWER, NEXT = [20, 21, 22], [23], [24, 25]
"""Ids of `Q: question A:`, of ` answer`, and of a second question."""


@pytest.mark.parametrize("visual", [VISUAL, None], ids=["image", "text only"])
def test_a_conversation_has_its_answers_as_targets(visual):
    begin = [0, *IMAGE] if visual is not None else [0]
    sequence = sequences.conversation_sequence([(QUESTION, ANSWER), (NEXT, CAPTION)], visual, ids=IDS)
    assert sequence.input_ids.tolist() == [*begin, *QUESTION, *ANSWER, 1, *NEXT, *CAPTION, 1]
    assert sequence.input_ids[sequence.targets].tolist() == [*ANSWER, 1, *CAPTION, 1]
    assert (sequence.input_ids.dtype, sequence.targets.dtype) == (torch.int64, torch.bool)
    prompt = sequences.chat_prompt([(QUESTION, ANSWER), (NEXT, [])], visual, ids=IDS)
    assert prompt.tolist() == [*begin, *QUESTION, *ANSWER, 1, *NEXT]


TURNS = [("What colour is it?", "red"), (" What\nshape? </s><|end_of_text|>", " a disk "), ("Why? 漢", "")]
TEXT = "Q: What colour is it? A: red Q: What shape? A: a disk"


def byte_level():
    return train_text_tokenizer([TEXT] * 3, vocab_size=340)


def sentencepiece_like():
    """BPE over whole texts, with ▁ for spaces and in front, as sentencepiece does: its tokens span words and ':'."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make_tokenizer", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("visual", [VISUAL, None], ids=["image", "text only"])
def test_a_chat_prompt_begins_the_conversation_for_any_tokenizer(make_tokenizer, visual):
    tokenizer = make_tokenizer()
    turns = encode_turns(TURNS, tokenizer=tokenizer)
    whole = sequences.conversation_sequence(turns, visual, ids=IDS)
    for count in (1, 2, 3):
        asked = [*TURNS[: count - 1], (TURNS[count - 1][0], "")]
        prompt = sequences.chat_prompt(encode_turns(asked, tokenizer=tokenizer), visual, ids=IDS)
        assert prompt.tolist() == whole.input_ids[: len(prompt)].tolist()
        assert whole.targets[len(prompt)] and not whole.targets[len(prompt) - 1]
    assert decode(turns[0][1], tokenizer=tokenizer).strip() == "red"
    assert tokenizer.eos_token_id not in {token for pieces in turns for piece in pieces for token in piece}


def test_a_tokenizer_whose_tokens_span_question_and_answer_is_tested():
    tokenizer = sentencepiece_like()
    question, _ = encode_turns([("What colour is it?", "red")], tokenizer=tokenizer)[0]
    (joined,) = encode_texts(["Q: What colour is it? A: red"], tokenizer=tokenizer)
    assert joined[: len(question)] != question  # one call over the whole text would not give the prompt's ids
