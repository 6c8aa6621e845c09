"""LLaVA's templates: the ids and mask of the original code, and what a person typed."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from downstream.llava.template import IMAGE, SYSTEM, Template, chat_template
from um3.core.errors import UserError
from um3.core.seeds import numpy_generator

WORDS = ["what", "colour", "is", "the", "left", "shape", "red", "blue", "no", ",", "it's", "3", "é", "漢字", "\n"]
TURNS = [("what colour is it?", "red"), ("and the left shape?", "it's blue")]


@pytest.fixture(scope="module")
def llama_2():
    """A tokenizer in Llama 2's layout: spaces as "▁", one in front, byte fallback."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_256 = [f"<0x{number:02X}>" for number in range(256)]
    special_tokens = ["<unk>", "<s>", "</s>", *bytes_256]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special_tokens, show_progress=False)
    bpe.train_from_iterator([SYSTEM, "USER: ASSISTANT: </s>", " ".join(WORDS[:-3])] * 4, trainer)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


def template(tokenizer, kind="v1", *, num_image_tokens=4, max_tokens=1000):
    return Template(tokenizer, kind=kind, num_image_tokens=num_image_tokens, max_tokens=max_tokens)


def original_mask(text: str, tokenizer, *, length: int) -> list[bool]:
    """`preprocess_v1` of LLaVA (c121f04): tokens of re-tokenised pieces are counted."""
    mask, place = [False] * length, 1
    for piece in text.split("</s>")[:-1]:
        instruction = piece.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        piece_length = len(tokenizer(piece + "</s>").input_ids) - 1
        instruction_length = len(tokenizer(instruction).input_ids) - 2
        mask[place + instruction_length : place + piece_length] = [True] * (piece_length - instruction_length)
        place += piece_length
    return mask


def random_turns(random, *, count):
    def words(low):
        return " ".join(random.choice(WORDS) for _ in range(int(random.integers(low, 9)))).strip() or "no"

    return [(words(1), words(1)) for _ in range(count)]


def test_ids_and_mask_are_those_of_the_original_code(llama_2):
    random = numpy_generator(0, "turns")
    for _ in range(200):
        turns = random_turns(random, count=int(random.integers(1, 5)))
        text, _ = template(llama_2).text(turns, has_image=False)
        sequence = template(llama_2)(turns, has_image=False)
        assert sequence.input_ids_T.tolist() == llama_2(text).input_ids
        assert sequence.target_mask_T.tolist() == original_mask(text, llama_2, length=len(sequence.input_ids_T))


def test_golden_string_and_supervised_text(llama_2):
    v1 = template(llama_2)
    text, _ = v1.text(TURNS, has_image=True)
    assert text == (
        f"{SYSTEM} USER: <image>\nwhat colour is it? ASSISTANT: red</s>"
        "USER: and the left shape? ASSISTANT: it's blue</s>"
    )
    sequence = v1(TURNS, has_image=True)
    is_image = sequence.input_ids_T == llama_2.convert_tokens_to_ids(IMAGE)
    assert is_image.sum() == 4 and not (is_image & sequence.target_mask_T).any()
    supervised = llama_2.decode(sequence.input_ids_T[sequence.target_mask_T])
    assert supervised.split() == ["red</s>", "it's", "blue</s>"]
    plain = template(llama_2, "plain")(TURNS[:1], has_image=True)
    assert llama_2.decode(plain.input_ids_T).replace(" ", "") == "<s><image><image><image><image>red\n"
    assert llama_2.decode(plain.input_ids_T[plain.target_mask_T]).strip(" ") == "red\n"


def test_short_marks(llama_2):
    text, spans = template(llama_2, "qa").text(TURNS, has_image=True)
    assert text == "Q: <image>\nwhat colour is it? A: red</s>Q: and the left shape? A: it's blue</s>"
    assert [text[first:last] for first, last in spans] == [" red</s>", " it's blue</s>"]


@pytest.mark.parametrize("kind", ["v1", "qa"])
@pytest.mark.parametrize("has_image", [False, True])
def test_the_chat_template_gives_the_same_string_and_mask(llama_2, has_image, kind):
    random = numpy_generator(1, "turns")
    conversation = template(llama_2, kind, num_image_tokens=1)
    for _ in range(20):
        turns = random_turns(random, count=3)
        messages = []
        for number, (question, answer) in enumerate(turns):
            image = [{"type": "image"}] * (has_image and number == 0)
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        options = {"chat_template": chat_template(llama_2, kind=kind)}
        text, _ = conversation.text(turns, has_image=has_image)
        assert llama_2.apply_chat_template(messages, tokenize=False, **options) == text
        options |= {"return_dict": True, "return_assistant_tokens_mask": True}
        tokens = llama_2.apply_chat_template(messages, **options)
        sequence = conversation(turns, has_image=has_image)
        assert tokens["input_ids"] == sequence.input_ids_T[1:].tolist()  # the processor adds bos, a template does not
        assert tokens["assistant_masks"] == sequence.target_mask_T[1:].int().tolist()


def test_the_chat_template_for_a_prompt(llama_2):
    def prompt(*messages):
        options = {"tokenize": False, "add_generation_prompt": True, "chat_template": chat_template(llama_2)}
        return llama_2.apply_chat_template(list(messages), **options)

    typed, expected = "look: <image> what is it?", f"{SYSTEM} USER: <image>\nlook:  what is it? ASSISTANT:"
    for content in (typed, [{"type": "image"}, {"type": "text", "text": typed}]):
        assert prompt({"role": "user", "content": content}) == expected
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi "}]
    assert prompt(*messages) == "Be brief. USER: hi ASSISTANT:"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("a </s> b", "a < /s> b"),
        ("<ima<image>ge> what?", "what?"),
        ("<s><unk>", "< s>< unk>"),
        ("</<image>s>", "< /s>"),
        ("\ud800 half", "\ufffd half"),
    ],
)
def test_typed_special_tokens_stay_text(llama_2, typed, read):
    v1 = template(llama_2)
    assert v1.typed(typed) == read
    ids = v1([(typed, typed)], has_image=True).input_ids_T
    counts = [int((ids == llama_2.convert_tokens_to_ids(token)).sum()) for token in ("<s>", "</s>", IMAGE)]
    assert counts == [1, 1, 4]


def test_text_is_cut_on_the_right_and_never_the_image(llama_2):
    turns = [("what", "red blue yes no " * 30)]
    whole = template(llama_2)(turns, has_image=True)
    cut = template(llama_2, max_tokens=140)(turns, has_image=True)
    assert len(whole.input_ids_T) > 140 and torch.equal(cut.input_ids_T, whole.input_ids_T[:140])
    assert (cut.input_ids_T == llama_2.convert_tokens_to_ids(IMAGE)).sum() == 4 and cut.target_mask_T.any()
    with pytest.raises(UserError, match=r"100 tokens.*90 tokens.*data\.max_tokens"):
        template(llama_2, num_image_tokens=90, max_tokens=100)
