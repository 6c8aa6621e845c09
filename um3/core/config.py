"""Configs: a dataclass defines the keys; YAML files (with `base:`) and `a.b=c` overrides set the values.

Unknown keys, renamed keys, wrong types and missing files are one-line errors.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from um3.core.errors import UserError
from um3.core.files import write_text

ConfigT = TypeVar("ConfigT")
SECTIONS = ("stage1", "stage2", "codes", "um3", "eval")
"""Sections of an experiment's YAML file, one per phase. `base:` names the file that it extends."""
RENAMED_KEYS = {
    "adapter": "preset", "average_decay": "ema_decay", "base": "base_model", "bits_per_slot": "bits_per_subtoken",
    "features": "fid_features", "folder": "output_dir", "guard": "text_validation", "mlp_width": "intermediate_size",
    "new_rows": "new_token_init", "out": "output_dir", "qlip": "visual_tokenizer", "row_tokens": "seq_len",
    "rows": "num_sequences", "rows_per_shard": "samples_per_shard", "shared_bits": "bit_embeddings",
    "slots": "subtokens", "start": "init_from", "text_entries": "text_vocab_size", "text_row_tokens": "text_seq_len",
    "tokenizer": "init_from", "total_steps": "max_steps", "track": "loggers", "trained": "trainable",
    "width": "hidden_size",
}  # fmt: skip
"""Old name -> new name. A schema that has the old name itself, or lacks the new one, is not concerned."""
RENAMED_VALUES = {"precision": {"float32": "fp32", "bf16": "bf16-true", "autocast": "bf16-mixed"}}
RENAMED_FILES = {"paper": "um3_llama3_1b", "in1k": "qlip_b16_in1k"}
"""Old names of experiments in configs/."""


def load_config(
    schema: type[ConfigT],
    *,
    path: str | Path | None = None,
    section: str = "",
    overrides: Sequence[str] = (),
    partial: bool = False,
) -> ConfigT:
    """Build `schema` from its defaults, then the YAML file (and its `base:` files), then `a.b=c` overrides.

    Args:
        section: the section of an experiment's file that `schema` describes; empty if the file holds `schema` alone.
        partial: skip keys that `schema` lacks at its top level; for a command that needs only some of a section.

    Raises:
        UserError: a missing file, invalid YAML, an unknown key (the error suggests the nearest known one), a renamed
            key, a wrong type, a missing section, a mandatory value without a setting, or a value that the
            dataclass's own checks refuse.
    """
    config = OmegaConf.structured(schema)
    layers = [] if path is None else _sections(_yaml_layers(Path(path), seen=()), path=path, section=section)
    layers += [(f"override '{override}'", _parse_override(override)) for override in overrides]
    for origin, layer in layers:
        refuse_old_names(OmegaConf.to_container(layer), schema=schema, origin=origin)
        try:
            config = OmegaConf.merge(config, OmegaConf.masked_copy(layer, list(config)) if partial else layer)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(f"{origin}: {_explain(error)}") from None
    try:
        result = cast(ConfigT, OmegaConf.to_object(config))
        _check_elements(result, where="")
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path or schema.__name__}: {_explain(error)}") from None
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dictionary of a config dataclass (JSON-ready)."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved config as YAML; `load_config` reads it back to an equal object."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def differences(old: dict[str, Any], new: dict[str, Any], *, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs between two `to_dict` results."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, prefix=f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def refuse_old_names(values: Any, *, schema: type[Any], origin: str) -> None:
    """Check the plain values of a config for keys and values that `schema` has under another name.

    Raises:
        UserError: it begins with `origin` and names the new name of each.
    """
    if renamed := dict.fromkeys(_renamed(values, schema=schema)):
        raise UserError(f"{origin}: settings have new names; rename {', '.join(renamed)}")


def _renamed(values: Any, *, schema: Any, old_prefix: str = "", new_prefix: str = "") -> Iterator[str]:
    """`old -> new` for every key and value of an old config that `schema` has under another name."""
    if isinstance(values, list):
        for item in values:
            element = next(iter(get_args(schema)), None)
            yield from _renamed(item, schema=element, old_prefix=old_prefix, new_prefix=new_prefix)
    if not isinstance(values, dict) or not dataclasses.is_dataclass(schema):
        return
    hints = get_type_hints(schema)
    for key, value in values.items():
        new_key = RENAMED_KEYS.get(str(key))
        new_key = new_key if key not in hints and new_key in hints else str(key)
        old, new = f"{old_prefix}{key}", f"{new_prefix}{new_key}"
        new_value = RENAMED_VALUES.get(new_key, {}).get(str(value))
        if new_value:
            yield f"{old}={value} -> {new}={new_value}"
        elif new_key != key:
            yield f"{old} -> {new}"
        yield from _renamed(value, schema=hints.get(new_key), old_prefix=f"{old}.", new_prefix=f"{new}.")


def _check_elements(config: Any, *, where: str) -> None:
    """Refuse a list or section in the place of a number or string inside lists and dictionaries.

    OmegaConf accepts it: `lrs.a.b=1` would make the dict[str, float] `lrs` hold {a: {b: 1}}.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_elements(value, where=f"{name}.")
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        is_plain = get_args(hints[field.name])[-1:] in [(kind,) for kind in (int, float, str, bool)]
        for key, item in items:
            if dataclasses.is_dataclass(item):
                _check_elements(item, where=f"{name}[{key}].")
            elif is_plain and isinstance(item, list | dict):
                raise ValueError(
                    f"{name}: '{key}' holds {item}, not one value; write dotted names as {name}={{a.b: 1}}"
                )


def _parse_override(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"override '{override}' is not of the form section.key=value")
    try:
        return OmegaConf.from_dotlist([f"{key.strip()}={value}"])
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"override '{override}' cannot be read: {_problem(error)}") from None


def _sections(layers: list[tuple[str, DictConfig]], *, path: str | Path, section: str) -> list[tuple[str, Any]]:
    """The part of every layer under `section`; the layers themselves if `section` is empty."""
    if not section:
        return list(layers)
    for origin, layer in layers:
        if unknown := [str(key) for key in layer if key not in SECTIONS]:
            raise UserError(
                f"{origin}: '{unknown[0]}' is not a section ({', '.join(SECTIONS)}); "
                f"put the settings of each phase under its section, such as '{section}:'"
            )
    parts = [(origin, layer[section]) for origin, layer in layers if layer.get(section) is not None]
    if not parts:
        raise UserError(f"{path} has no section '{section}'; add one, or set --config to a file that has it")
    for origin, part in parts:
        if not isinstance(part, DictConfig):
            raise UserError(f"{origin}: section '{section}' must hold 'key: value' lines")
    return parts


def _yaml_layers(path: Path, *, seen: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    if path.resolve() in seen:
        raise UserError(f"{path}: its 'base:' files include each other; remove one of the 'base:' lines")
    try:
        layer = OmegaConf.load(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        problem = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
        old = next((part for part in path.parts if part in RENAMED_FILES), "")
        name = RENAMED_FILES.get(old, "demo")
        remedy = f"'{old}' is now configs/{name}.yaml" if old else f"use a YAML file such as configs/{name}.yaml"
        raise UserError(f"config file {path} {problem}; {remedy} (make: CONFIG={name})") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where} is not readable YAML: {_problem(error)}") from None
    if not isinstance(layer, DictConfig):
        raise UserError(f"{path} must hold 'key: value' lines at its top level")
    base = layer.pop("base", None)
    layers = [(str(path), layer)]
    if base is not None:
        layers = _yaml_layers(path.parent / str(base), seen=(*seen, path.resolve())) + layers
    return layers


def _explain(error: Exception) -> str:
    message = _problem(error)
    key = str(getattr(error, "full_key", "") or "")
    section = getattr(error, "object_type", None)
    if "not in" in message and key and dataclasses.is_dataclass(section):
        known = [field.name for field in dataclasses.fields(section)]
        near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}"
    if "incompatible container" in message:
        message += "; set the whole list, such as data.sources=[...]"
    return f"{key}: {message}" if key and key not in message else message


def _problem(error: Exception) -> str:
    """The first line of an error. Of a YAML error the problem: its first line only names the part being read."""
    text = error.problem if isinstance(error, MarkedYAMLError) and error.problem else str(error)
    return " ".join(text.split("\n")[0].split())
