"""`make um3-init`: extend a Llama or Qwen to a UM3 for a visual tokenizer, and measure the text loss before and after.

The model is computed in float32 and rounded to the saved type before the second measurement, so the loss is that of the
saved model.

Legend: T positions of a sequence, X positions with a target, V vocabulary entries, D width.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_mix.batches.token_stream import TokenStream
from data_mix.samples import BadSample
from data_mix.sources.files import looks_like_hub
from data_mix.sources.text import ListDocuments, TextSourceConfig, open_text_source
from tokenizer.modeling import load_qlip
from train.recipes.um3_start import extend_base, fitted_gains
from train.run_folder import damaged_files, model_digest, read_record, refuse_other_run, result_files, write_record
from um3.core.commands import command_parser, read_config
from um3.core.config import to_dict
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.files import folder_lock
from um3.core.log import quiet_model_files, setup_logging
from um3.core.metrics import commit, machine, versions
from um3.core.progress import peak_memory_gib, track
from um3.core.ranges import NonNegativeInt, PositiveInt, Range
from um3.model.configuration import NewTokenInit
from um3.model.extend import check_vocabulary, load_base, load_base_tokenizer, read_base_config
from um3.model.language_model import count_parameters, save_model
from um3.model.sequences import TrainingSequence
from um3.model.text_tokenizer import make_vocabulary
from um3.model.vocabulary import UnifiedVocabulary

MAX_BITS_PER_SUBTOKEN = 14
"""As in the paper: 28 bits are two sub-tokens of 14, with 16,384 vocabulary entries each."""
CHARS_PER_TOKEN = 12
"""More than any tokenizer needs on average, so that enough text is read."""


@dataclass
class InitConfig:
    """Sources and options of the starting model.

    base_model: Llama or Qwen language model, a folder or hub id.
    visual_tokenizer: QLIP folder or hub id.
    output_dir: folder to write.
    subtokens, bits_per_subtoken: how a code becomes tokens; 0: the fewest sub-tokens of equal size, at most 14 bits
    each.
    text: a .txt, .jsonl or .parquet file (folder, glob) or hub id; empty: the prose of Python's documentation.
    num_sequences, seq_len: of the sequences that fit the gains of an inserted normalisation; the text loss is measured
        on as many that follow them.
    dtype: of the saved weights; "base" keeps the base model's.
    """

    base_model: str = ""
    visual_tokenizer: str = ""
    output_dir: str = ""
    subtokens: NonNegativeInt = 0
    bits_per_subtoken: NonNegativeInt = 0
    qk_norm: bool = True
    new_token_init: NewTokenInit = "mean"
    text: str = ""
    num_sequences: PositiveInt = 8
    seq_len: Annotated[int, Range(8)] = 512
    seed: int = 0
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"


def main(arguments: Sequence[str]) -> None:
    """Write the starting model that the settings describe, unless it is up to date."""
    parser = command_parser("python -m train um3-init", "Make a starting UM3 from a Llama or Qwen and a QLIP.")
    config, _ = read_config(InitConfig, parser, arguments=arguments)
    # Saving imports DeepSpeed, which would print a warning about the accelerator that it detects.
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    setup_logging()
    quiet_model_files()
    if not config.base_model or not config.output_dir:
        raise UserError("base_model and output_dir must be set: make um3-init BASE=FOLDER_OR_HUB_ID RUN=FOLDER")
    inputs = {"visual_tokenizer": model_digest(config.visual_tokenizer, made_by="stage2")}
    request = {"config": to_dict(config), "inputs": inputs}
    with folder_lock(config.output_dir):
        if _is_done(Path(config.output_dir), request=request):
            print(f"{config.output_dir} is up to date")
        else:
            make_start(config, request=request)


def make_start(config: InitConfig, *, request: dict[str, Any]) -> None:
    """Write `model`, then `done.json` with `request`, below `config.output_dir`; print the record."""
    began = time.monotonic()
    stored = read_base_config(config.base_model)
    text_tokenizer, entries = load_base_tokenizer(config.base_model)
    check_vocabulary(entries, rows=stored.vocab_size)
    ids = _vocabulary(config, text_tokenizer=text_tokenizer)
    seq_len = min(config.seq_len, stored.max_position_embeddings)
    calibration, measured = _text_sequences(config, seq_len=seq_len, text_tokenizer=text_tokenizer, ids=ids)
    base = load_base(config.base_model).to(device())  # type: ignore[arg-type]
    sizes = {"base_entries": entries, "text_vocab_size": ids.text_vocab_size}
    before = text_loss(base, sequences=measured, sizes={"base_entries": entries})["base_entries"]
    record = request | {"base_architecture": type(base).__name__, "text_loss_before": before}
    sequences = [sequence.input_ids for sequence in calibration]
    options: dict[str, Any] = {"ids": ids, "base_entries": entries, "seed": config.seed}
    model = extend_base(base, config, gains=partial(fitted_gains, base, sequences), **options).eval()
    del base
    name = str(stored.dtype or "float32").removeprefix("torch.") if config.dtype == "base" else config.dtype
    dtype: torch.dtype = getattr(torch, name)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))
    after = text_loss(model, sequences=measured, sizes=sizes)
    record |= {"architecture": type(model).__name__, "parameters": count_parameters(model, ids=ids)}
    record |= {"text_loss_after": after, "dtype": str(dtype)}
    record |= {"text_tokens": sum(int(sequence.targets.sum()) for sequence in measured)}
    model.to("cpu", dtype)
    folder = Path(config.output_dir)
    save_model(
        folder / "model",
        model=model,
        text_tokenizer=text_tokenizer,
        ids=ids,
        qlip_folder=config.visual_tokenizer,
        trained=False,
    )
    record |= {"seconds": round(time.monotonic() - began, 1), "peak_memory_gib": round(peak_memory_gib(), 3)}
    record |= {"commit": commit(), "versions": versions(), "machine": machine(), "files": result_files(folder)}
    write_record(folder / "done.json", record)
    _print(record, config=config, ids=ids)


@torch.no_grad()
def text_loss(
    model: PreTrainedModel, *, sequences: Sequence[TrainingSequence], sizes: dict[str, int]
) -> dict[str, float]:
    """Nats per token of text sequences under the softmax over the first `size` entries, for each of `sizes`."""
    sums, count = dict.fromkeys(sizes, 0.0), 0
    head_VD = model.get_output_embeddings().weight
    for sequence in track(sequences, total=len(sequences), label="text loss", unit="sequences"):
        input_ids_T, is_target_T = (part.to(model.device) for part in sequence)
        hidden_TD = model.model(input_ids=input_ids_T[None, :-1], use_cache=False).last_hidden_state[0]
        hidden_XD, targets_X = hidden_TD[is_target_T[1:]], input_ids_T[1:][is_target_T[1:]]
        for name, size in sizes.items():
            sums[name] += float(F.cross_entropy(F.linear(hidden_XD, head_VD[:size]), targets_X, reduction="sum"))
        count += len(targets_X)
    return {name: total / count for name, total in sums.items()}


def _is_done(folder: Path, *, request: dict[str, Any]) -> bool:
    """True if `folder` holds the whole result of `request`; UserError if it holds that of another."""
    if not (folder / "done.json").exists():
        if (folder / "model").exists():
            raise UserError(f"{folder}/model exists already without done.json; use another RUN=, or delete {folder}")
        return False
    record = read_record(folder / "done.json")
    refuse_other_run(folder / "done.json", record, request)
    return not damaged_files(folder, record["files"])


def _vocabulary(config: InitConfig, *, text_tokenizer: PreTrainedTokenizerBase) -> UnifiedVocabulary:
    """The vocabulary of the configured sub-tokens, or of the fewest that divide a code's bits evenly."""
    qlip = load_qlip(config.visual_tokenizer)
    bits, subtokens, size = qlip.num_bits, config.subtokens, config.bits_per_subtoken
    if not subtokens:
        fewest = range(-(-bits // MAX_BITS_PER_SUBTOKEN), bits + 1)
        subtokens = bits // size if size else next(count for count in fewest if bits % count == 0)
    size = size or bits // subtokens
    if subtokens * size != bits:
        raise UserError(
            f"subtokens={subtokens} x bits_per_subtoken={size} is not {bits}, the bits of a code of "
            f"{config.visual_tokenizer}; set factors of {bits}, or neither"
        )
    try:
        return make_vocabulary(
            text_tokenizer, subtokens=subtokens, bits_per_subtoken=size, num_patches=qlip.num_patches
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _text_sequences(
    config: InitConfig, *, seq_len: int, text_tokenizer: PreTrainedTokenizerBase, ids: UnifiedVocabulary
) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """The first sequences of the text, for calibration, and as many after them, to measure the loss."""
    source = TextSourceConfig(name="text", path=config.text) if config.text else TextSourceConfig()
    source.val_fraction = 0.0
    needed_chars = 2 * config.num_sequences * seq_len * CHARS_PER_TOKEN
    if looks_like_hub(config.text):
        source.stream = needed_chars  # in documents, so more than enough
    documents = open_text_source(source, split="train")
    texts, num_chars = [], 0
    for index in range(len(documents)):
        if num_chars > needed_chars:
            break
        with contextlib.suppress(BadSample):
            texts.append(documents[index])
            num_chars += len(texts[-1])
    with TemporaryDirectory() as cache:
        listed = ListDocuments(documents.name, texts)
        stream = TokenStream(listed, tokenizer=text_tokenizer, ids=ids, seq_len=seq_len, cache=cache)
        sequences = [stream[index] for index in range(min(len(stream), 2 * config.num_sequences))]
    if len(sequences) < 2:
        raise UserError(f"text '{config.text}' has fewer than {2 * seq_len} tokens; give more text, or lower seq_len")
    half = len(sequences) // 2
    return sequences[:half], sequences[half:]


def _print(record: dict[str, Any], *, config: InitConfig, ids: UnifiedVocabulary) -> None:
    architectures = f"{record['base_architecture']} -> {record['architecture']}"
    print(f"{config.output_dir}/model: {architectures}, saved as {record['dtype']}")
    print(
        f"  {ids.text_vocab_size:,} text entries + {ids.visual_vocab_size:,} visual entries "
        f"({ids.subtokens} sub-tokens of {ids.bits_per_subtoken} bits); an image is {ids.image_tokens} tokens"
    )
    for part, count in record["parameters"].items():
        print(f"  {part:<30} {count:>13,}")
    before, after = record["text_loss_before"], record["text_loss_after"].values()
    print(f"  text loss on {record['text_tokens']:,} tokens of {config.text or 'Python prose'}, nats per token")
    for name, value in zip(("before", "after", "after, with the image tokens"), (before, *after), strict=True):
        print(f"  {name:<30} {value:>13.6f}  {value - before:+.6f}")
    print(
        f'train it: make um3 ARGS="model.base_model={config.output_dir}/model '
        f"model.qk_norm={str(config.qk_norm).lower()} vocabulary.subtokens={ids.subtokens} "
        f'vocabulary.bits_per_subtoken={ids.bits_per_subtoken}"'
    )
