"""The text tokenizer: train a small one, load any, add the image tokens, and encode text.

One convention holds in training, captioning and generation: a tokenizer adds neither bos nor eos
(`um3.model.sequences` does), text that looks like a special token stays text, and the white space of a caption or
prompt is collapsed, without a leading space.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokenizer.text_tokenizer import train_byte_bpe
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.hub import load_pretrained
from um3.core.text import valid_text
from um3.model.gguf import is_gguf, load_gguf_tokenizer
from um3.model.vocabulary import UnifiedVocabulary

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
BEGIN_OF_IMAGE, END_OF_IMAGE = "<|begin_of_image|>", "<|end_of_image|>"
SPECIALS = (BOS, EOS, PAD, BEGIN_OF_IMAGE, END_OF_IMAGE)
# Llama 3 has a padding entry that its tokenizer config does not name; reusing it keeps the vocabulary.
KNOWN_PADS = (PAD, "<|finetune_right_pad_id|>")
QUESTION, ANSWER = "Q:", "A:"
"""Marks of a conversation's turns: short, because a small vocabulary spells "assistant" letter by letter."""
NUM_BYTES = 256


def train_text_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` with the five special tokens first; deterministic."""
    smallest = NUM_BYTES + len(SPECIALS)
    if vocab_size < smallest:
        raise UserError(f"text_vocab_size of {vocab_size} is too small; use {smallest} or more")
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": list(SPECIALS)}
    bpe = train_byte_bpe(texts, setting="vocabulary.text_vocab_size", **options)
    options = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "clean_up_tokenization_spaces": False}
    options["additional_special_tokens"] = [BEGIN_OF_IMAGE, END_OF_IMAGE]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def read_text_tokenizer(path_or_hub_id: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, GGUF file or hub id; UserError if there is none, or a damaged one."""
    if is_gguf(path_or_hub_id):
        tokenizer = load_gguf_tokenizer(path_or_hub_id)
    else:
        tokenizer = load_pretrained(AutoTokenizer, path_or_hub_id, kind="text tokenizer")
    if not encode_texts(["a"], tokenizer=tokenizer)[0]:  # transformers creates an empty one where the files are missing
        problem = f"no text tokenizer at '{path_or_hub_id}' (the loaded one gives no tokens for a text)"
        raise UserError(f"{problem}; use the model's own")
    return tokenizer


def num_entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of embedding rows that a tokenizer needs: its largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add begin and end of image, and a padding token if there is none; in place."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": next((pad for pad in KNOWN_PADS if pad in vocabulary), PAD)})
    if missing := [token for token in (BEGIN_OF_IMAGE, END_OF_IMAGE) if token not in vocabulary]:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def make_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    *,
    subtokens: int,
    bits_per_subtoken: int,
    num_patches: int,
    depth_layers: int = 0,
) -> UnifiedVocabulary:
    """The vocabulary of a model with this text tokenizer; without a bos token (Qwen) sequences begin with eos.

    UserError: the tokenizer has no end-of-text token or lacks the image tokens.
    """
    vocabulary, name = tokenizer.get_vocab(), f"the text tokenizer '{tokenizer.name_or_path}'"
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name} has no end-of-text token; use one that has")
    if BEGIN_OF_IMAGE not in vocabulary or END_OF_IMAGE not in vocabulary or tokenizer.pad_token_id is None:
        raise UserError(f"{name} lacks the image tokens; pass it to add_image_tokens")
    return UnifiedVocabulary(
        text_vocab_size=num_entries(tokenizer),
        subtokens=subtokens,
        bits_per_subtoken=bits_per_subtoken,
        num_patches=num_patches,
        bos_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        begin_of_image_id=vocabulary[BEGIN_OF_IMAGE],
        end_of_image_id=vocabulary[END_OF_IMAGE],
        depth_layers=depth_layers,
    )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's entries and their ids."""
    return short_hash(sorted(tokenizer.get_vocab().items()))


def splitting_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the rules by which a tokenizer cuts text into its entries."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return short_hash(state["normalizer"], state["pre_tokenizer"], state["model"].get("merges"))


def encode_texts(texts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of documents, without bos and eos; text never becomes a special token."""
    if not texts:
        return []
    encoded = tokenizer(
        [valid_text(text) for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]


def encode_captions(captions: Sequence[str], *, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of captions or prompts, with collapsed white space and without a leading space."""
    return encode_texts([" ".join(caption.split()) for caption in captions], tokenizer=tokenizer)


def turn_texts(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """`Q: question A:` and ` answer` for each turn of a conversation."""
    return [(f"{QUESTION} {question.strip()} {ANSWER}", f" {answer.strip()}") for question, answer in turns]


def encode_turns(
    turns: Sequence[tuple[str, str]], *, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Token ids of `Q: question A:` and of ` answer` for each turn of a conversation.

    The two are encoded apart: no token spans both, so a question has the same ids whatever its answer is.
    """
    encoded = iter(encode_texts([text for piece in turn_texts(turns) for text in piece], tokenizer=tokenizer))
    return list(zip(encoded, encoded, strict=True))


def decode(token_ids: Sequence[int], *, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of token ids, without special tokens and with the spaces that the tokens have."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
