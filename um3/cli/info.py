"""`um3 info`, facts about a model folder from its JSON files and weight headers; `um3 export` and `um3 gguf`."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from um3.cli import options
from um3.cli.inputs import json_text
from um3.core.errors import UserError
from um3.core.files import folder_lock, read_json, walk_files
from um3.core.hub import model_folder
from um3.core.text import printable
from um3.inference.sampling_params import image_defaults
from um3.model.configuration import OLD_KEYS, GGUFType

MAX_BITS = 20
"""A sub-token has at most that many bits; see `um3.model.vocabulary`."""
UNKNOWN = "not recorded beside this folder"


@options.command("Describe a model folder.", "um3 info runs/demo/um3/model", "um3 info --json | jq .parameters")
def info(
    folder: Annotated[str, typer.Argument(help="Folder of a trained UM3, or a hub id.")] = options.DEFAULT_MODEL,
    as_json: options.AsJson = False,
) -> None:
    """Describe FOLDER: sizes, fingerprint of the visual tokenizer, training steps, licences, sampling options."""
    facts = describe_folder(model_folder(folder, kind="UM3 model"))
    if as_json:
        typer.echo(json_text(facts, indent=2))
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        typer.echo(f"{name:<{width}}{f'{value:,}' if isinstance(value, int) else printable(value)}")


@options.command(
    "Export the text half of a model as a plain language model.", "um3 export runs/demo/um3/model --out exported"
)
def export(
    folder: Annotated[str, typer.Argument(help="Folder of a trained UM3.")] = options.DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not exist.")] = Path("exported"),
) -> None:
    """Write the text half of the UM3 in FOLDER as a plain Llama or Qwen, without visual entries."""
    source = model_folder(folder, kind="UM3 model")  # before `out` is made
    with folder_lock(out):
        from um3.core.distributed import device
        from um3.core.log import quiet_model_files, setup_logging
        from um3.model.export import export_text_half

        # Saving imports DeepSpeed, which otherwise logs how it searches for an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", device().type)
        setup_logging()
        quiet_model_files()
        typer.echo(export_text_half(source, out=out))


@options.command("Write a model as a GGUF file, for llama.cpp.", "um3 gguf runs/demo/um3/model --out um3.gguf")
def gguf(
    folder: Annotated[str, typer.Argument(help="Folder of a trained UM3.")] = options.DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")] = Path("um3.gguf"),
    weights: Annotated[GGUFType, typer.Option(help="Type of the matrices.")] = "f16",
) -> None:
    """Write the whole UM3 in FOLDER, with its visual entries, as one GGUF file."""
    source = model_folder(folder, kind="UM3 model")
    with folder_lock(out.parent):
        from um3.core.log import quiet_model_files, setup_logging
        from um3.model.gguf_export import export_gguf

        setup_logging()
        quiet_model_files()
        typer.echo(export_gguf(source, out=out, weights=weights))


def describe_folder(folder: Path) -> dict[str, Any]:
    """Sizes, fingerprint, training steps and licences of a UM3 folder, as JSON values."""
    config = read_json(folder / "config.json", dict) if (folder / "config.json").is_file() else {}
    if not isinstance(config.get("um3"), dict):
        raise UserError(f"{folder} is not a UM3 model (no 'um3' in a config.json); give the folder of a trained one")
    try:
        um3 = {new: config["um3"][old] for new, old in OLD_KEYS.items() if old in config["um3"]} | config["um3"]
        if not 0 < um3["bits_per_subtoken"] <= MAX_BITS:
            raise ValueError(f"bits_per_subtoken = {um3['bits_per_subtoken']}")
        return _describe(folder, config=config, um3=um3, qlip=read_json(folder / "qlip" / "config.json", dict))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"has a wrong entry: {error}"
        raise UserError(f"{folder}: a config.json {reason}; copy or train the model again") from None


def _describe(folder: Path, *, config: dict[str, Any], um3: dict[str, Any], qlip: dict[str, Any]) -> dict[str, Any]:
    tensors = dict(_tensors(folder))
    text, bits = um3["text_vocab_size"], um3["subtokens"] * um3["bits_per_subtoken"]
    visual = um3["subtokens"] << um3["bits_per_subtoken"]
    num_tables = sum(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in tensors)
    total, per_entry = sum(math.prod(shape) for shape, _ in tensors.values()), num_tables * config["hidden_size"]
    size, depth_layers = qlip["vision_config"]["image_size"], um3.get("depth_layers", 0)
    num_tokens = um3["num_patches"] * (1 if depth_layers else um3["subtokens"])
    depth_total = sum(math.prod(shape) for _, (shape, _) in _tensors(folder / "depth")) if depth_layers else 0
    base, done = um3.get("base") or {}, folder.resolve().parent / "done.json"
    record = read_json(done, dict) if done.is_file() else {}
    qlip_total = sum(math.prod(shape) for name, (shape, _) in _tensors(folder / "qlip") if ".rope." not in name)
    return {
        "folder": str(folder),
        "architecture": ", ".join(config.get("architectures") or [config["model_type"]]),
        "parameters": total + depth_total,
        "of the layers": total - per_entry * (text + visual),
        "of the text entries": per_entry * text,
        "of the visual entries": per_entry * visual,
        "of the depth head": depth_total,
        "dtype": ", ".join(sorted({dtype for _, dtype in tensors.values()})),
        "bytes on disk": sum(file.stat().st_size for file in walk_files(folder)),
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "context": config["max_position_embeddings"],
        "text vocabulary": text,
        "visual vocabulary": visual,
        "image": f"{size} x {size} pixels, {um3['num_patches']} codes of {bits} bits in {num_tokens} tokens",
        "visual tokenizer": um3["tokenizer_fingerprint"],
        "visual tokenizer parameters": qlip_total,
        "visual tokenizer licence": qlip.get("weights_license") or "no restriction recorded",
        "image sampling": image_defaults(folder),
        "conversations": ", ".join(map(str, um3.get("conversations") or [])) or "none",
        "training steps": record.get("steps", UNKNOWN),
        "commit": record.get("commit", UNKNOWN),
        "base model": base.get("name") or "none, trained from random weights",
        "base model licence": base.get("license") or ("not recorded" if base else "none"),
    }


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[list[int], str]]]:
    """Name, shape and dtype of every stored tensor."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no weights in {folder} (no .safetensors file); copy the whole model folder")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    tensor = weights.get_slice(name)
                    yield name, (list(tensor.get_shape()), str(tensor.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); copy or train the model again") from None
