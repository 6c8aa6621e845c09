"""`make um3-init`: a Llama or Qwen and a visual tokenizer -> the UM3 that training starts from, and what that changed.

Everything is computed in float32 and rounded to the type that is saved before the second text loss, so the figure is
of the model in the folder.

Shapes: T positions of a row, X those with a target, V entries, D width.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_mix.batches.token_stream import TokenStream
from data_mix.samples import BadSample
from data_mix.sources.tables import looks_like_hub
from data_mix.sources.text import ListedDocuments, TextSourceConfig, open_text_source
from tokenizer.modeling import load_qlip
from train.config import folder_digest
from um3.core.commands import command_parser, read_config
from um3.core.config import to_dict
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.files import atomic_folder, read_json, write_json
from um3.core.log import quiet_model_files, setup_logging
from um3.core.progress import peak_memory_gib, track
from um3.core.provenance import commit, machine, versions
from um3.model.configuration import NewTokenInit
from um3.model.extend import (
    check_vocabulary,
    extend_model,
    fit_gains,
    inserts_qk_norm,
    load_base,
    load_base_tokenizer,
    read_base_config,
)
from um3.model.language_model import count_parameters, save_model
from um3.model.sequences import Row
from um3.model.text_tokenizer import make_vocabulary
from um3.model.vocabulary import UnifiedVocabulary

MAX_BITS_PER_SUBTOKEN = 14  # the paper's cut of 28 bits: 16,384 rows a subtoken
CHARS_PER_TOKEN = 12  # more than any text has: enough text is read, whatever the tokenizer


@dataclass
class InitConfig:
    """What the starting model is made of.

    base_model: Llama or Qwen language model, a folder or hub id.
    visual_tokenizer: QLIP folder or hub id.
    output_dir: folder to write.
    subtokens, bits_per_subtoken: how a code becomes tokens; 0: the fewest subtokens of equally many bits, at most 14.
    text: a .txt, .jsonl or .parquet file (folder, glob) or hub id; empty: Python's own prose.
    rows, seq_len: this much text fits the gains of an inserted normalisation, and as much after it is measured.
    dtype: of the saved weights; "base" keeps the base's.
    """

    base_model: str = ""
    visual_tokenizer: str = ""
    output_dir: str = ""
    subtokens: int = 0
    bits_per_subtoken: int = 0
    qk_norm: bool = True
    new_token_init: NewTokenInit = "mean"
    text: str = ""
    rows: int = 8
    seq_len: int = 512
    seed: int = 0
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"

    def __post_init__(self) -> None:
        for name in ("subtokens", "bits_per_subtoken"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.rows < 1 or self.seq_len < 8:
            raise ValueError(f"rows={self.rows} seq_len={self.seq_len}: use 1 or more rows of 8 tokens or more")


class TextLoss(NamedTuple):
    """Cross entropy in nats per token: among the base's own text entries, and among all of UM3's."""

    base_entries: float
    text_vocab_size: float


def main(arguments: Sequence[str]) -> None:
    """Make the starting model that the settings describe, unless it exists."""
    parser = command_parser("python -m train um3-init", "Make a starting UM3 from a Llama or Qwen and a QLIP.")
    config, _ = read_config(InitConfig, parser, arguments=arguments)
    # Saving imports DeepSpeed, which without this says that it looked for an accelerator.
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    setup_logging()
    quiet_model_files()
    if not config.base_model or not config.output_dir:
        raise UserError(
            "give the language model and the folder to write: make um3-init BASE=FOLDER_OR_HUB_ID RUN=FOLDER"
        )
    request = {
        "config": to_dict(config),
        "inputs": {"visual_tokenizer": folder_digest(config.visual_tokenizer, made_by="stage2")},
    }
    if _is_done(Path(config.output_dir), request=request):
        print(f"{config.output_dir} is up to date")
        return
    make_start(config, request=request)


def make_start(config: InitConfig, *, request: dict[str, Any]) -> dict[str, Any]:
    """Write `out/model` and `out/done.json` (both or nothing), print and return the record; `request` goes into it.

    Raises:
        UserError: a base, tokenizer or text that cannot be used.
    """
    began = time.monotonic()
    stored = read_base_config(config.base_model)
    text_tokenizer, entries = load_base_tokenizer(config.base_model)
    check_vocabulary(entries, rows=stored.vocab_size)
    ids = _ids(config, text_tokenizer=text_tokenizer)
    seq_len = min(config.seq_len, stored.max_position_embeddings)
    calibration, measured = _text_rows(config, seq_len=seq_len, text_tokenizer=text_tokenizer, ids=ids)
    base = load_base(config.base_model).to(device())  # type: ignore[arg-type]
    architecture = type(base).__name__
    before = text_loss(base, rows=measured, sizes=(entries, entries))
    gains = {}
    if inserts_qk_norm(base.config, qk_norm=config.qk_norm):
        gains = fit_gains(base, calibration=[row.input_ids[None] for row in calibration])
    model = extend_model(
        base,
        ids=ids,
        qk_norm=config.qk_norm,
        base_entries=entries,
        gains=gains,
        new_token_init=config.new_token_init,
        seed=config.seed,
    ).eval()
    del base
    dtype = _dtype(config, stored=stored.dtype)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))
    after = text_loss(model, rows=measured, sizes=(entries, ids.text_vocab_size))
    parts = count_parameters(model, ids=ids).by_part()
    model.to("cpu", dtype)
    with atomic_folder(config.output_dir) as partial:
        shared: dict[str, Any] = {"text_tokenizer": text_tokenizer, "ids": ids, "qlip_folder": config.visual_tokenizer}
        save_model(partial / "model", model=model, trained=False, **shared)
        record = request | {
            "parameters": parts,
            "base_architecture": architecture,
            "architecture": type(model).__name__,
        }
        record |= {"text_loss_before": before.base_entries, "text_loss_after": after._asdict()}
        record |= {"text_tokens": sum(int(row.targets.sum()) for row in measured), "dtype": str(dtype)}
        record |= {"seconds": round(time.monotonic() - began, 1), "peak_memory_gib": round(peak_memory_gib(), 3)}
        write_json(partial / "done.json", record | {"commit": commit(), "versions": versions(), "machine": machine()})
    _print(record, config=config, ids=ids)
    return record


@torch.no_grad()
def text_loss(model: PreTrainedModel, *, rows: Sequence[Row], sizes: tuple[int, int]) -> TextLoss:
    """The loss of text rows under the softmax over the first so many entries, for two such numbers."""
    sums, count = [0.0, 0.0], 0
    head_VD = model.get_output_embeddings().weight
    for row in track(rows, total=len(rows), label="text loss", unit="rows"):
        input_ids_T, is_target_T = (part.to(model.device) for part in row)
        hidden_TD = model.model(input_ids=input_ids_T[None, :-1], use_cache=False).last_hidden_state[0]
        hidden_XD, targets_X = hidden_TD[is_target_T[1:]], input_ids_T[1:][is_target_T[1:]]
        for index, size in enumerate(sizes):
            sums[index] += float(F.cross_entropy(F.linear(hidden_XD, head_VD[:size]), targets_X, reduction="sum"))
        count += len(targets_X)
    return TextLoss(*(total / count for total in sums))


def _is_done(out: Path, *, request: dict[str, Any]) -> bool:
    """True if `out` holds just what is asked for; UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    done = out / "done.json"
    if done.exists():
        record = read_json(done)
        if all(record.get(key) == value for key, value in request.items()):
            return True
    raise UserError(f"{out} exists and holds something else; use another RUN=, or delete that folder to make it anew")


def _dtype(config: InitConfig, *, stored: torch.dtype | str | None) -> torch.dtype:
    if config.dtype != "base":
        return getattr(torch, config.dtype)
    return stored if isinstance(stored, torch.dtype) else getattr(torch, stored or "float32")


def _ids(config: InitConfig, *, text_tokenizer: PreTrainedTokenizerBase) -> UnifiedVocabulary:
    qlip = load_qlip(config.visual_tokenizer)
    bits = qlip.num_bits
    subtokens = config.subtokens or (
        bits // config.bits_per_subtoken if config.bits_per_subtoken else _fewest_subtokens(bits)
    )
    bits_per_subtoken = config.bits_per_subtoken or bits // max(subtokens, 1)
    if subtokens * bits_per_subtoken != bits:
        raise UserError(
            f"subtokens={subtokens} x bits_per_subtoken={bits_per_subtoken} is not the {bits} bits of a code of {config.visual_tokenizer}; "
            "choose factors of that, or leave both out"
        )
    try:
        return make_vocabulary(
            text_tokenizer, subtokens=subtokens, bits_per_subtoken=bits_per_subtoken, num_patches=qlip.num_patches
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _fewest_subtokens(bits: int) -> int:
    return next(subtokens for subtokens in range(-(-bits // MAX_BITS_PER_SUBTOKEN), bits + 1) if bits % subtokens == 0)


def _text_rows(
    config: InitConfig, *, seq_len: int, text_tokenizer: PreTrainedTokenizerBase, ids: UnifiedVocabulary
) -> tuple[list[Row], list[Row]]:
    """The first rows of the text, for calibration, and as many after them, held out for the loss."""
    source = TextSourceConfig(name="text", path=config.text) if config.text else TextSourceConfig()
    source.val_fraction = 0.0  # nothing here is trained on
    needed_chars = 2 * config.rows * seq_len * CHARS_PER_TOKEN
    if looks_like_hub(config.text):
        source.stream = needed_chars  # documents, more than it takes
    documents = open_text_source(source, split="train")
    texts, chars = [], 0
    for index in range(len(documents)):
        if chars > needed_chars:
            break
        with contextlib.suppress(BadSample):
            texts.append(documents[index])
            chars += len(texts[-1])
    with TemporaryDirectory() as cache:
        listed = ListedDocuments(documents.name, texts)
        stream = TokenStream(listed, tokenizer=text_tokenizer, ids=ids, seq_len=seq_len, cache=cache)
        rows = [stream[index] for index in range(min(len(stream), 2 * config.rows))]
    if len(rows) < 2:
        raise UserError(f"'{config.text}' has fewer than {seq_len} tokens; give more text or a smaller seq_len")
    half = len(rows) // 2
    return rows[:half], rows[half:]


def _print(record: dict[str, Any], *, config: InitConfig, ids: UnifiedVocabulary) -> None:
    print(
        f"{config.output_dir}/model: {record['base_architecture']} -> {record['architecture']}, saved as {record['dtype']}"
    )
    print(
        f"  {ids.text_vocab_size:,} text entries + {ids.visual_vocab_size:,} visual "
        f"({ids.subtokens} subtokens of {ids.bits_per_subtoken} bits); an image is {ids.image_tokens} tokens"
    )
    for part, count in record["parameters"].items():
        print(f"  {part:<30} {count:>13,}")
    before, after = record["text_loss_before"], TextLoss(**record["text_loss_after"])
    print(f"  text loss, {record['text_tokens']:,} held-out tokens of {config.text or 'Python prose'}, nats per token")
    for name, value in (
        ("before", before),
        ("after", after.base_entries),
        ("after, image marks among them", after.text_vocab_size),
    ):
        print(f"  {name:<30} {value:>13.6f}  {value - before:+.6f}")
    print(
        f'train from it: make um3 ARGS="model.base_model={config.output_dir}/model model.qk_norm={str(config.qk_norm).lower()} '
        f'vocabulary.subtokens={ids.subtokens} vocabulary.bits_per_subtoken={ids.bits_per_subtoken}"'
    )
