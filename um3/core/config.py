"""Configs: a dataclass says what exists, YAML files (with `base:`) and `a.b=c` overrides say what is set.

Unknown keys, wrong types and missing files are one-line errors.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from um3.core.errors import UserError
from um3.core.files import write_text

ConfigT = TypeVar("ConfigT")
SECTIONS = ("stage1", "stage2", "codes", "um3", "eval")
"""What the YAML file of an experiment holds: a section for each phase (and `base:`, the file it builds on)."""


def load_config(
    schema: type[ConfigT], *, path: str | Path | None = None, section: str = "", overrides: Sequence[str] = ()
) -> ConfigT:
    """Build `schema` from its defaults, then the YAML file (and its `base:` files), then `a.b=c` overrides.

    Args:
        section: the section of an experiment's file that `schema` describes; empty where the file holds `schema` alone.

    Raises:
        UserError: missing file, invalid YAML, an unknown key (the nearest known one is named), a wrong
            type, a section that the file lacks, a mandatory value left unset, or a value that the dataclass's own checks refuse.
    """
    config = OmegaConf.structured(schema)
    layers: list[tuple[str, Any]] = []
    if path is not None:
        layers += _sections(_yaml_layers(Path(path), seen=()), path=path, section=section)
    for override in overrides:
        if not all(override.partition("=")[0].strip().split(".")) or "=" not in override:
            raise UserError(f"override '{override}' is not of the form section.key=value")
        layers.append((f"override '{override}'", _parse_override(override)))
    for origin, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
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


def config_hash(config: Any) -> str:
    """Short sha256 of the resolved values: two runs with equal hashes were asked for the same thing."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


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


def _check_elements(config: Any, *, where: str) -> None:
    """Refuse a list or section in the place of a number or string inside lists and dictionaries.

    OmegaConf lets it pass: `lrs.a.b=1` would make the dict[str, float] `lrs` hold {a: {b: 1}}.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_elements(value, where=f"{name}.")
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        for key, item in items:
            if dataclasses.is_dataclass(item):
                _check_elements(item, where=f"{name}[{key}].")
            elif isinstance(item, list | dict) and get_args(hints[field.name])[-1:] in (
                (int,),
                (float,),
                (str,),
                (bool,),
            ):
                raise ValueError(
                    f"{name}: '{key}' holds {item}, not one value; write dotted names as {name}={{a.b: 1}}"
                )


def _parse_override(override: str) -> DictConfig:
    key, value = override.split("=", 1)
    config = OmegaConf.create({})
    try:
        OmegaConf.update(config, key.strip(), OmegaConf.create(f"value: {value}").value, force_add=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"override '{override}' cannot be read: {_problem(error)}") from None
    return config


def _sections(layers: list[tuple[str, DictConfig]], *, path: str | Path, section: str) -> list[tuple[str, Any]]:
    """The layers' parts for one section; the layers themselves where no section is asked for."""
    if not section:
        return [(origin, layer) for origin, layer in layers]
    for origin, layer in layers:
        if unknown := [str(key) for key in layer if key not in SECTIONS]:
            raise UserError(
                f"{origin}: '{unknown[0]}' is not a section; the file of an experiment has the sections "
                f"{', '.join(SECTIONS)}, each with the settings of one phase"
            )
    found = [(origin, layer[section]) for origin, layer in layers if layer.get(section) is not None]
    if not found:
        raise UserError(f"{path} has no section '{section}'; add one, or give a --config that has it")
    return found


def _yaml_layers(path: Path, *, seen: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    if path.resolve() in seen:
        raise UserError(f"{path}: its 'base:' files include each other; remove one of the 'base:' lines")
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(
            f"config file {path} does not exist; CONFIG= takes the name of a file in configs/, such as demo, or a path"
        ) from None
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
        message += "; a list is given whole, as key=[...]"
    return f"{key}: {message}" if key and key not in message else message


def _problem(error: Exception) -> str:
    """The first line of an error; of a YAML error what is wrong, where the first line only says what was being read."""
    text = error.problem if isinstance(error, MarkedYAMLError) and error.problem else str(error)
    return " ".join(text.split("\n")[0].split())
