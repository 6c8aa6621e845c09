"""Configs: a dataclass defines the keys; YAML files (with `base:`) and `a.b=c` overrides set the values.

Unknown keys, renamed keys, wrong types, values out of range (`um3.core.ranges`) and missing files are one-line errors.
"""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from um3.core.errors import UserError
from um3.core.files import write_text
from um3.core.ranges import EXACT_BELOW, Range
from um3.core.text import printable

ConfigT = TypeVar("ConfigT")
SECTIONS = (
    "stage1", "stage2", "codes", "um3-init", "um3", "um3-instruct", "llamagen", "llava-align", "llava-instruct", "eval",
)  # fmt: skip
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
"""Old name -> new name, for the error about an unknown key."""
MAX_DEPTH, MAX_NODES = 50, 100_000
"""Levels and values of a YAML file, its aliases written out."""


def load_config(
    schema: type[ConfigT],
    *,
    path: str | Path | None = None,
    section: str = "",
    overrides: Sequence[str] = (),
    partial: bool = False,
) -> ConfigT:
    """Build `schema` from its defaults, then the YAML file (and its `base:` files), then `a.b=c` overrides.

    `section` of an experiment's file is described by `schema`; empty if the file holds `schema` alone. `partial` skips
    keys that `schema` lacks at its top level. UserError for any mistake; it suggests the right name of a wrong key.
    """
    layers = [] if path is None else _yaml_layers(Path(path), section=section)
    if path is not None and not layers:
        raise UserError(f"{path} has no section '{section}'; add one, or set --config to a file that has it")
    layers += [(f"override '{_short(override)}'", _parse_override(override)) for override in overrides]
    return build_config(schema, layers, origin=str(path or schema.__name__), partial=partial)


def build_config(
    schema: type[ConfigT], layers: Sequence[tuple[str, Any]], *, origin: str, partial: bool = False
) -> ConfigT:
    """Build `schema` from its defaults and plain values: (their origin for messages, dictionary); see `load_config`."""
    config, where = OmegaConf.structured(schema), origin
    try:
        for where, values in layers:  # noqa: B007 (for the message)
            config = OmegaConf.merge(config, {k: v for k, v in values.items() if k in config} if partial else values)
        where = origin
        _check_values(OmegaConf.to_container(config, resolve=True, throw_on_missing=True), hint=schema, name="")
        return cast(ConfigT, OmegaConf.to_object(config))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def unknown_key(schema: type[Any], override: str) -> str:
    """What is wrong with the key of an `a.b=c` override, and the right name; empty if `schema` has the key."""
    try:
        OmegaConf.merge(OmegaConf.structured(schema), _parse_override(override))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        problem, name = _explain(error), override.partition("=")[0].strip()
        if "'DictConfig'" in problem:
            return f"unknown key '{name}'; '{getattr(error, 'full_key', '')}' is one value"
        return problem if problem.startswith("unknown key") else ""
    return ""


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dictionary of a config dataclass (JSON-ready)."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved config as YAML; `load_config` reads it back to an equal object."""
    write_text(path, to_yaml(to_dict(config)))


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `load_config` reads back as they are."""
    escaped = json.loads(json.dumps(values).replace("${", "\\\\${"))  # no interpolation, but these characters
    return OmegaConf.to_yaml(OmegaConf.create(escaped))


def with_defaults(schema: type[Any], values: dict[str, Any], *, origin: str) -> dict[str, Any]:
    """A stored config (`to_dict`), with the defaults of the settings of `schema` that are newer than it."""
    layer = OmegaConf.to_container(OmegaConf.create(to_yaml(values)))
    return to_dict(build_config(schema, [(origin, layer)], origin=origin))


def differences(old: dict[str, Any], new: dict[str, Any], *, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs between two `to_dict` results, also in lists of equal length.

    Two paths of the same existing file or folder do not differ.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, prefix=f"{prefix}{key}.")
        elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
            for number, (part, other) in enumerate(zip(before, after, strict=True)):
                lines += differences(part, other, prefix=f"{prefix}{key}[{number}].")
        elif before != after and not _is_same_place(before, after):
            lines.append(f"{prefix}{key}: {_outline(before)} -> {_outline(after)}")
    return lines


def _are_sections(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_same_place(path: Any, other: Any) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return isinstance(path, str) and isinstance(other, str) and Path(path).samefile(other)
    return False


def _outline(value: Any) -> Any:
    """Of sections, such as a list of sources, their names."""
    is_named = _are_sections(value) and all("name" in item for item in value)
    return f"[{', '.join(str(item['name']) for item in value)}]" if is_named else value


def _check_values(value: Any, *, hint: Any, name: str) -> None:
    """Refuse values out of their range, and a list or section in the place of one value of a list or dictionary.

    OmegaConf accepts the latter: `lrs.a.b=1` would make the dict[str, float] `lrs` hold {a: {b: 1}}.
    """
    limits = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)), Range())
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(hint) in (Union, UnionType):
        _check_values(value, hint=get_args(hint)[0], name=name)
    elif dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for key, item in (value or {}).items():
            _check_values(item, hint=hints[key], name=f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | dict):
        if hint in (int, float, str, bool):
            raise ValueError(f"{name} holds {_short(value)}, not one value; write dotted names as {{a.b: 1}}")
        if not limits.holds(len(value)):
            raise ValueError(f"{name} has {len(value)} values; their number must be {limits}")
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            _check_values(item, hint=get_args(hint)[-1] if get_args(hint) else Any, name=f"{name}[{key}]")
    elif isinstance(value, int | float) and not limits.holds(value):
        is_large = isinstance(value, int) and abs(value) >= EXACT_BELOW
        raise ValueError(f"{name} is {_short(value)}; it must be {'below 2**53' if is_large else limits}")


def _short(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_yaml(text: str) -> None:
    """Refuse YAML that would exhaust the parser's stack (deep nesting) or the memory (aliases of aliases)."""
    nodes, sizes, parents = 0, dict[str | None, int](), list[tuple[str | None, int]]()
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = parents.pop()
            sizes[anchor] = nodes - before
        elif isinstance(event, yaml.AliasEvent):
            nodes += MAX_NODES if event.anchor in dict(parents) else sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            parents += [(event.anchor, nodes)] if isinstance(event, yaml.CollectionStartEvent) else []
        if len(parents) > MAX_DEPTH or nodes > MAX_NODES:
            mark: Any = event.start_mark
            problem = f"nested deeper than {MAX_DEPTH}, or more than {MAX_NODES} values with its aliases written out"
            raise MarkedYAMLError(problem=problem, problem_mark=mark)


def _parse_override(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"override '{_short(override)}' is not of the form section.key=value")
    if re.match(r"[^'\"\[{].*( #|\n)", value, re.DOTALL):
        raise UserError(f"override '{_short(override)}': YAML cuts this value at ' #' or joins its lines; quote it")
    try:
        _check_yaml(value)
        return OmegaConf.from_dotlist([f"{key.strip()}={value}"])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"override '{_short(override)}' cannot be read: {_problem(error)}") from None


def _yaml_layers(path: Path, *, section: str, seen: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """(path, its values under `section`, or all) of the `base:` files and the file, without those that lack it."""
    if path in seen:
        raise UserError(f"{path}: its 'base:' files include each other; remove one of the 'base:' lines")
    try:
        _check_yaml(path.read_text(encoding="utf-8"))
        layer: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (FileNotFoundError, IsADirectoryError) as error:
        problem = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
        problem += "; use a YAML file such as configs/demo.yaml (make: CONFIG=demo)"
        raise UserError(f"config file {path} {problem}") from None
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else _short(path)
        raise UserError(f"{where} is not readable YAML: {_problem(error)}") from None
    if isinstance(layer, dict):
        base = layer.pop("base", None)
        below = _yaml_layers((path.parent / str(base)).resolve(), section=section, seen=(*seen, path)) if base else []
        if section and (unknown := [str(key) for key in layer if key not in SECTIONS]):
            remedy = f"put the settings of each phase under its section, such as '{section}:'"
            raise UserError(f"{path}: '{unknown[0]}' is not a section ({', '.join(SECTIONS)}); {remedy}")
        layer = layer.get(section) if section else layer
        if layer is None:
            return below
    if not isinstance(layer, dict):
        raise UserError(f"{path} must hold 'key: value' lines" + (f" in its section '{section}'" if section else ""))
    return [*below, (str(path), layer)]


def _explain(error: Exception) -> str:
    message = _problem(error)
    key = str(getattr(error, "full_key", "") or "")
    section = getattr(error, "object_type", None)
    if "not in" in message and key and dataclasses.is_dataclass(section):
        known, name = [field.name for field in dataclasses.fields(section)], key.rpartition(".")[2]
        near = difflib.get_close_matches(name, known, n=1)
        section_of_key = key.removesuffix(name)
        hint = f"did you mean '{section_of_key}{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        hint = f"its new name is '{RENAMED_KEYS[name]}'" if RENAMED_KEYS.get(name) in known else hint
        return f"unknown key '{key}'; {hint}"
    if "incompatible container" in message:
        message += "; set the whole list, such as data.sources=[...]"
    return f"{key}: {message}" if key and key not in message else message


def _problem(error: Exception) -> str:
    """The first line of an error. Of a YAML error the problem: its first line only names the part being read."""
    text = error.problem if isinstance(error, MarkedYAMLError) and error.problem else str(error)
    return " ".join(text.split("\n")[0].split())
