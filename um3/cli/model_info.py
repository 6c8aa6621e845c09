"""What a model folder is, from its JSON files and the headers of its weights: none are loaded, nor is torch."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.files import read_json
from um3.inference.generation_defaults import image_defaults

UNKNOWN = "not recorded beside this folder"


class Stored(NamedTuple):
    """A tensor as the header of its file tells it."""

    name: str
    shape: list[int]
    dtype: str


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """Sizes, fingerprint, training step and licences of a UM3 folder under names a reader knows, as plain JSON.

    Raises:
        UserError: no such folder, a model that is no UM3, or a file of it that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make demo or pass the folder of a trained one")
    config = read_json(folder / "config.json")
    about = config.get("um3") if isinstance(config, dict) else None
    if not about:
        raise UserError(f"{folder} holds no UM3 (no 'um3' in its config.json)")
    try:
        return _describe(folder, config=config, about=about, qlip=read_json(folder / "qlip" / "config.json"))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a config.json in {folder} lacks what a UM3's says ({error}); copy or train it again"
        ) from None


def _describe(folder: Path, *, config: dict[str, Any], about: dict[str, Any], qlip: dict[str, Any]) -> dict[str, Any]:
    tensors = list(_tensors(folder))
    text, bits = about["text_vocab_size"], about["subtokens"] * about["bits_per_subtoken"]
    visual = about["subtokens"] << about["bits_per_subtoken"]
    tables = sum(each.name.endswith(("embed_tokens.weight", "lm_head.weight")) for each in tensors)
    total = _count(tensors)
    rows = {"text rows": tables * text * config["hidden_size"], "visual rows": tables * visual * config["hidden_size"]}
    size = qlip["vision_config"]["image_size"]
    return {
        "folder": str(folder),
        "architecture": ", ".join(config.get("architectures") or [config["model_type"]]),
        "parameters": total,
        "body": total - sum(rows.values()),
        **rows,
        "stored as": ", ".join(sorted({each.dtype for each in tensors})),
        "size on disk": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "context": config["max_position_embeddings"],
        "text entries": text,
        "visual entries": visual,
        "an image": f"{size} x {size} pixels, {about['num_patches']} codes of {bits} bits in "
        f"{about['num_patches'] * about['subtokens']} tokens",
        "visual tokenizer": about["tokenizer_fingerprint"],
        "its parameters": _count([each for each in _tensors(folder / "qlip") if ".rope." not in each.name]),
        "sampling": image_defaults(folder),
        **_training(folder),
        **_licences(about.get("base") or {}, of_qlip=qlip.get("weights_license") or ""),
    }


def _tensors(folder: Path) -> Iterator[Stored]:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no weights in {folder} (no .safetensors file); copy the whole model folder")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dict
                    piece = weights.get_slice(name)
                    yield Stored(name, list(piece.get_shape()), str(piece.get_dtype()))
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read ({error}); copy or train it again") from None


def _count(tensors: Iterable[Stored]) -> int:
    return sum(math.prod(each.shape) for each in tensors)


def _training(folder: Path) -> dict[str, Any]:
    """What the run that wrote the folder says beside it."""
    path = folder.resolve().parent / "done.json"
    record = read_json(path) if path.is_file() else {}
    return {"training steps": record.get("steps", UNKNOWN), "commit": record.get("commit", UNKNOWN)}


def _licences(base: dict[str, Any], *, of_qlip: str) -> dict[str, str]:
    named = f"{base.get('name')}, licence {base.get('license') or 'not at hand: see there'}"
    return {
        "base": named if base else "none, trained from fresh weights",
        "licence of the visual tokenizer": of_qlip or "its weights name no restriction",
    }
