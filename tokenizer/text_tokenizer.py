"""The text tower's tokenizer: CLIP's, or a small one trained on the run's captions."""

import logging
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from um3.core.text import valid_text

logger = logging.getLogger(__name__)
BEGIN, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def train_caption_tokenizer(captions: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing byte-level BPE that wraps every caption in begin and end tokens, like CLIP's."""
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # END must not have id 2, which QLIP's config reads as the old CLIP convention (see `TextModel`).
    options: dict[str, Any] = {"special_tokens": [PAD, END, BEGIN], "normalizer": lower}
    tokenizer = train_byte_bpe(captions, setting="text.vocab_size", vocab_size=vocab_size, **options)
    ends = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def train_byte_bpe(
    texts: Iterable[str], *, setting: str, vocab_size: int, special_tokens: list[str], normalizer: Any = None
) -> Tokenizer:
    """Byte-level BPE over `texts`, the special tokens first; words begin with a blank if there is a `normalizer`.

    A vocabulary that the texts do not fill is logged under the name of its `setting`.
    """
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=normalizer is not None)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(map(valid_text, texts), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        about = "%s is %d, but the texts give only %d entries; the others stay unused"
        logger.warning(about, setting, vocab_size, found)
    return tokenizer
