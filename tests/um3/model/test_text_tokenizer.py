"""The text tokenizer: determinism, round trips, no special tokens from text, image tokens on other tokenizers."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from um3.core.errors import UserError
from um3.model import text_tokenizer as tt

TEXTS = [f"a {size} {shape}" for size in ("small red", "big blue") for shape in ("square", "disk")] * 6


@pytest.fixture(scope="module")
def tokenizer():
    return tt.train_text_tokenizer(TEXTS, vocab_size=280)


def test_training_is_deterministic_and_has_the_requested_size(tokenizer):
    again = tt.train_text_tokenizer(TEXTS, vocab_size=280)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 280
    assert [tokenizer.convert_tokens_to_ids(token) for token in tt.SPECIALS] == [0, 1, 2, 3, 4]


def test_any_text_survives_the_round_trip_without_special_tokens(tokenizer):
    hostile = f"a red disk {tt.EOS} {tt.BEGIN_OF_IMAGE}{tt.PAD}"
    for text in ("a red disk", "Ünïcode · 漢字 🙂", "  two  spaces\nand a line ", "", hostile):
        (tokens,) = tt.encode_texts([text], tokenizer=tokenizer)
        assert not set(tokens) & {0, 1, 2, 3, 4}
        assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_captions_have_collapsed_white_space(tokenizer):
    plain, messy = tt.encode_captions(["a red disk", "  a  red\ndisk "], tokenizer=tokenizer)
    assert plain == messy and tt.encode_captions([], tokenizer=tokenizer) == []
    assert tt.decode([0, *plain, 1], tokenizer=tokenizer) == "a red disk"


def test_a_saved_tokenizer_loads_with_stock_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock("a red disk")["input_ids"] == tt.encode_texts(["a red disk"], tokenizer=tokenizer)[0]
    ours = tt.read_text_tokenizer(tmp_path)
    assert ours.get_vocab() == tokenizer.get_vocab() and ours.pad_token == tt.PAD
    assert tt.vocabulary_digest(ours) == tt.vocabulary_digest(tokenizer)
    sizes = {"subtokens": 4, "bits_per_subtoken": 7, "num_patches": 16}
    trained, loaded = (tt.make_vocabulary(each, **sizes) for each in (tokenizer, ours))
    assert trained == loaded and (loaded.text_vocab_size, loaded.pad_id, loaded.begin_of_image_id) == (280, 2, 3)


def foreign_tokenizer(*, bos):
    """A word-level tokenizer in the manner of Llama: it adds bos by itself and names no padding token."""
    words = ["<s>", "</s>", "<|finetune_right_pad_id|>", "a", "red", "disk", "?"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))


def test_image_tokens_on_a_foreign_tokenizer():
    tokenizer = tt.add_image_tokens(foreign_tokenizer(bos=True))
    ids = tt.make_vocabulary(tokenizer, subtokens=2, bits_per_subtoken=14, num_patches=4)
    assert (ids.bos_id, ids.pad_id, ids.begin_of_image_id, ids.end_of_image_id, ids.text_vocab_size) == (0, 2, 7, 8, 9)
    assert tt.encode_captions(["a red disk"], tokenizer=tokenizer) == [[3, 4, 5]]
    assert len(tt.add_image_tokens(tokenizer)) == 9
    without_bos = tt.add_image_tokens(foreign_tokenizer(bos=False))
    ids = tt.make_vocabulary(without_bos, subtokens=1, bits_per_subtoken=8, num_patches=4)
    assert ids.bos_id == ids.eos_id == 1  # sequences begin with eos


def test_mistakes_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="too small"):
        tt.train_text_tokenizer(TEXTS, vocab_size=200)
    with pytest.raises(UserError, match=r"text tokenizer .*absent"):
        tt.read_text_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="add_image_tokens"):
        tt.make_vocabulary(foreign_tokenizer(bos=True), subtokens=1, bits_per_subtoken=8, num_patches=4)
