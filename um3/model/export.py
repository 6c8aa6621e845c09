"""`um3 export`: the text half of a UM3 as a plain language model, without visual rows and image tokens.

Shapes: V entries, D width.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from um3.core.files import atomic_folder, check_new, read_json, write_json, write_text
from um3.core.hub import save_tokenizer
from um3.model.extend import EMBEDDING, HEAD, assemble_model
from um3.model.language_model import QLIP_FOLDER, load_model, render_card


def export_text_half(folder: str | Path, *, out: str | Path) -> str:
    """Write the text half of the UM3 in `folder` to `out` and return a summary for the user.

    It keeps the rows of the base's own tokenizer (without a base: of all text entries), so the text logits are
    unchanged. The head is tied again if the base's was tied and its rows still equal those of the embedding.
    """
    out = Path(out)
    check_new(out, kind="folder")
    loaded = load_model(folder)
    base: dict[str, Any] = loaded.model.config.um3.get("base") or {}
    entries = int(base.get("entries", loaded.ids.text_vocab_size))
    tied = bool(base.get("tied", loaded.model.config.tie_word_embeddings))
    with torch.no_grad():
        weights: dict[str, Tensor] = dict(loaded.model.state_dict())
        weights[EMBEDDING] = weights[EMBEDDING][:entries].clone()
        head_VD = loaded.model.get_output_embeddings().weight[:entries]
        config, ids = copy.deepcopy(loaded.model.config), loaded.ids
        config.vocab_size, config.tie_word_embeddings = entries, tied and torch.equal(weights[EMBEDDING], head_VD)
        weights[HEAD] = weights[EMBEDDING] if config.tie_word_embeddings else head_VD.clone()
        del config.um3
        model = assemble_model(type(loaded.model), config, weights)
    pad_id = ids.pad_id if ids.pad_id < entries else None
    model.generation_config = GenerationConfig(bos_token_id=ids.bos_id, eos_token_id=ids.eos_id, pad_token_id=pad_id)
    if not base:  # Training started texts with bos. A base's tokenizer keeps its own setting.
        loaded.text_tokenizer.add_bos_token = True
    name = type(model).__name__
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = {"architecture": name, "entries": entries, "parameters": count, "tied": model.config.tie_word_embeddings}
    template = Path(__file__).with_name("export_card.md")
    qlip = Path(folder) / QLIP_FOLDER / "config.json"
    licence = str(read_json(qlip, dict).get("weights_license") or "") if qlip.is_file() else ""
    card = render_card(template, pipeline_tag="text-generation", base=base, qlip_license=licence, **facts)
    with atomic_folder(out) as partial:
        model.save_pretrained(partial)
        _save_tokenizer(partial, loaded.text_tokenizer, entries=entries)
        write_text(partial / "README.md", card)
    head = "tied" if model.config.tie_word_embeddings else "untied"
    summary = f"{out}: {name}, {entries:,} text entries, {count:,} parameters, {head} head."
    if base and base["architecture"] != name:
        summary += f" The base was a {base['architecture']}; with the inserted query-key normalisation it is a Qwen3."
    return summary


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, *, entries: int) -> None:
    """Save a tokenizer without the entries that UM3 added: those with ids from `entries` on."""
    save_tokenizer(tokenizer, folder)
    backend = read_json(folder / "tokenizer.json")
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < entries]
    write_json(folder / "tokenizer.json", backend)
    removed = {token for token, index in tokenizer.get_vocab().items() if index >= entries}

    def is_kept(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(content, str) and content in removed)

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items() if is_kept(part)}
        return [kept(part) for part in value if is_kept(part)] if isinstance(value, list) else value

    write_json(folder / "tokenizer_config.json", kept(read_json(folder / "tokenizer_config.json")))
