"""`make um3-export`: the text half of a UM3 as a plain language model, without visual rows and image marks.

Shapes: V entries, D width.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from um3.core.errors import UserError
from um3.core.files import atomic_folder, read_json, write_json
from um3.model.extend import EMBEDDING, HEAD, assemble_model
from um3.model.language_model import load_model
from um3.model.vocabulary import UnifiedVocabulary


def export_text_half(folder: str | Path, *, out: str | Path) -> str:
    """Write the text half of the UM3 in `folder` to `out`; returns a sentence or two on what it is.

    The rows are those of the base's own tokenizer (of all text entries where there was no base), so text logits stay
    what they were. The head is tied again if the base's was and its rows still equal the embedding's.

    Raises:
        UserError: no UM3 there, or `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder or delete it")
    loaded = load_model(folder)
    base: dict[str, Any] = loaded.model.config.um3.get("base") or {}
    entries = int(base.get("entries", loaded.ids.text_vocab_size))
    tied = bool(base.get("tied", loaded.model.config.tie_word_embeddings))
    model = text_half(loaded.model, ids=loaded.ids, entries=entries, tie=tied)
    if not base:
        # Other software begins a text as training did, with bos. A base's tokenizer keeps the habit it came with.
        loaded.text_tokenizer.add_bos_token = True
    with atomic_folder(out) as partial:
        model.save_pretrained(partial)
        _save_tokenizer(partial, loaded.text_tokenizer, entries=entries)
    name = type(model).__name__
    count = sum(parameter.numel() for parameter in model.parameters())
    head = "tied" if model.config.tie_word_embeddings else "untied"
    lines = [f"{out}: {name}, {entries:,} text entries, {count:,} parameters, {head} head."]
    if base and base["architecture"] != name:
        lines.append(
            f"The base was a {base['architecture']}; the query-key normalisation inserted since does not fit that, so "
            "this is the Qwen3 layout."
        )
    return " ".join(lines)


@torch.no_grad()
def text_half(model: PreTrainedModel, *, ids: UnifiedVocabulary, entries: int, tie: bool) -> PreTrainedModel:
    """A model of the same architecture with the first `entries` rows only; the body's tensors are shared."""
    weights: dict[str, Tensor] = dict(model.state_dict())
    weights[EMBEDDING] = weights[EMBEDDING][:entries].clone()
    head_VD = model.get_output_embeddings().weight[:entries]
    config = copy.deepcopy(model.config)
    config.vocab_size = entries
    config.tie_word_embeddings = tie and torch.equal(weights[EMBEDDING], head_VD)
    weights[HEAD] = weights[EMBEDDING] if config.tie_word_embeddings else head_VD.clone()
    del config.um3
    half = assemble_model(type(model), config, weights)
    pad_id = ids.pad_id if ids.pad_id < entries else None
    half.generation_config = GenerationConfig(bos_token_id=ids.bos_id, eos_token_id=ids.eos_id, pad_token_id=pad_id)
    return half.eval()


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, *, entries: int) -> None:
    """Save a tokenizer without the entries from `entries` on, which UM3 added to it."""
    added = {token for token, index in tokenizer.get_vocab().items() if index >= entries}
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    backend = read_json(file)
    backend["added_tokens"] = [entry for entry in backend["added_tokens"] if entry["id"] < entries]
    write_json(file, backend)
    file = folder / "tokenizer_config.json"
    write_json(file, _without(read_json(file), added))


def _without(values: Any, dropped: set[str]) -> Any:
    """JSON without the tokens `dropped`: as value, in a list, or as the content of an added token."""
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if not _names(value, dropped)}
        return {key: _without(value, dropped) for key, value in kept.items()}
    if isinstance(values, list):
        return [_without(value, dropped) for value in values if not _names(value, dropped)]
    return values


def _names(value: Any, dropped: set[str]) -> bool:
    return (value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None) in dropped
