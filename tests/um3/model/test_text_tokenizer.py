"""The text tokenizer: determinism, round trips, no surprise specials, image marks on foreign tokenizers."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from um3.core.errors import UserError
from um3.model import text_tokenizer as tt

TEXTS = [
    f"a {size} {colour} {shape}"
    for size in ("small", "big")
    for colour in ("red", "blue")
    for shape in ("square", "disk")
] * 3


def test_training_is_deterministic_and_uses_the_asked_vocabulary() -> None:
    first, second = (tt.train_text_tokenizer(TEXTS, vocab_size=280) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 280
    assert [first.convert_tokens_to_ids(mark) for mark in tt.SPECIALS] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["a red disk", "Ünïcode · 漢字 🙂", "  two  spaces\nand a line ", ""])
def test_any_text_comes_back(text: str) -> None:
    tokenizer = tt.train_text_tokenizer(TEXTS, vocab_size=270)
    (tokens,) = tt.encode_texts([text], tokenizer=tokenizer)
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_no_special_entry_comes_out_of_a_text() -> None:
    tokenizer = tt.train_text_tokenizer(TEXTS, vocab_size=280)
    hostile = f"a red disk {tt.EOS} {tt.BEGIN_OF_IMAGE}{tt.PAD}"
    (tokens,) = tt.encode_texts([hostile], tokenizer=tokenizer)
    assert not set(tokens) & {0, 1, 2, 3, 4}
    assert tokenizer.decode(tokens) == hostile


def test_captions_are_collapsed_the_same_way_everywhere() -> None:
    tokenizer = tt.train_text_tokenizer(TEXTS, vocab_size=280)
    plain, messy = tt.encode_captions(["a red disk", "  a  red\ndisk "], tokenizer=tokenizer)
    assert plain == messy
    assert tt.decode([0, *plain, 1], tokenizer=tokenizer) == "a red disk"
    assert tt.encode_captions([], tokenizer=tokenizer) == []


def test_a_saved_tokenizer_loads_with_stock_code(tmp_path: Path) -> None:
    tokenizer = tt.train_text_tokenizer(TEXTS, vocab_size=280)
    tokenizer.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock("a red disk")["input_ids"] == tt.encode_texts(["a red disk"], tokenizer=tokenizer)[0]
    ours = tt.load_text_tokenizer(tmp_path)
    assert ours.get_vocab() == tokenizer.get_vocab() and ours.pad_token == tt.PAD
    spaces = [tt.make_vocabulary(each, subtokens=4, bits_per_subtoken=7, num_patches=16) for each in (tokenizer, ours)]
    assert spaces[0] == spaces[1]
    assert (spaces[0].text_vocab_size, spaces[0].pad_id, spaces[0].begin_of_image_id) == (280, 2, 3)


def foreign_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer in Llama's manner: adds bos by itself and names no padding."""
    words = {
        word: index for index, word in enumerate(["<s>", "</s>", "<|finetune_right_pad_id|>", "a", "red", "disk", "?"])
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))


def test_image_marks_on_a_foreign_tokenizer() -> None:
    tokenizer = tt.add_image_tokens(foreign_tokenizer(bos=True))
    assert tokenizer.pad_token_id == 2
    ids = tt.make_vocabulary(tokenizer, subtokens=2, bits_per_subtoken=14, num_patches=4)
    assert (ids.bos_id, ids.begin_of_image_id, ids.end_of_image_id, ids.text_vocab_size) == (0, 7, 8, 9)
    assert tt.encode_captions(["a red disk"], tokenizer=tokenizer) == [[3, 4, 5]]
    assert len(tt.add_image_tokens(tokenizer)) == 9


def test_a_tokenizer_without_bos_begins_rows_with_eos() -> None:
    ids = tt.make_vocabulary(
        tt.add_image_tokens(foreign_tokenizer(bos=False)), subtokens=1, bits_per_subtoken=8, num_patches=4
    )
    assert ids.bos_id == ids.eos_id == 1


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small"):
        tt.train_text_tokenizer(TEXTS, vocab_size=200)
    with pytest.raises(UserError, match="no text tokenizer at"):
        tt.load_text_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="add_image_tokens"):
        tt.make_vocabulary(foreign_tokenizer(bos=True), subtokens=1, bits_per_subtoken=8, num_patches=4)
