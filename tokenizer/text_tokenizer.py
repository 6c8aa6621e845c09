"""The text tower's tokenizer: CLIP's, or a small one trained on the run's captions."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from um3.core.errors import UserError

BEGIN, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def train_caption_tokenizer(captions: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing byte-level BPE that wraps every caption in begin and end tokens, like CLIP's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # END must not have id 2, which QLIP's config reads as the old CLIP convention (see `TextModel`).
        special_tokens=[PAD, END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def load_caption_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the text tower's tokenizer (CLIP's, for example) from a folder or hub id.

    Raises:
        UserError: no tokenizer there.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"cannot load a text tokenizer from {path}: {reason}") from None
