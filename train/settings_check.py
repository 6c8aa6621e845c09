"""The first step of `make demo`: wrong settings and data that are not there are refused before anything trains."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from data_mix.codes.encode import EncodeConfig
from data_mix.sources.config import ImageSourceConfig, SourceConfig, TextSourceConfig
from data_mix.sources.files import source_kind
from data_mix.sources.presets import apply_preset
from eval.config import EvalConfig
from train.phase import CONFIGS
from um3.core.commands import command_parser, read_config, setting_for
from um3.core.config import unknown_key
from um3.core.errors import EXTRAS, UserError, missing_extra

PHASES: dict[str, type[Any]] = {
    **{name: CONFIGS[name] for name in ("stage1", "stage2")},
    "codes": EncodeConfig,
    "um3": CONFIGS["um3"],
    "eval": EvalConfig,
}
"""The phases of `make demo` that read settings, in their order."""


def main(arguments: Sequence[str]) -> None:
    """Print which phases each setting is for.

    Raises:
        UserError: no phase has a setting, a value is wrong, or a path or a package of the evaluation is missing.
    """
    parser = command_parser("python -m train settings", "Check the settings of all phases.", config="required")
    arguments = [*arguments, "--shared"]
    lines = []
    for setting in parser.parse_intermixed_args(arguments).overrides:
        problems = {phase: unknown_key(schema, setting_for(phase, setting)) for phase, schema in PHASES.items()}
        if all(problems.values()):
            best = max(problems.values(), key=lambda problem: (problem.endswith("'"), problem.find(";")))
            raise UserError(f"no phase of make demo has this setting: {best}")
        phases = ", ".join(name for name in PHASES if not problems[name])
        lines.append(f"setting {setting.partition('=')[0]}, for {phases}")
    for package, extra in EXTRAS.items():
        if extra == "eval" and importlib.util.find_spec(package) is None:
            raise UserError(missing_extra(package))
    for phase, schema in PHASES.items():
        config, _ = read_config(schema, parser, section=phase, arguments=arguments)
        for source in _sources(config):
            source_kind(apply_preset(source))
    for line in lines:
        print(line)


def _sources(config: Any) -> Iterator[SourceConfig]:
    """Every source of images and texts of a config and its sections."""
    for value in vars(config).values():
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, ImageSourceConfig | TextSourceConfig))
        elif dataclasses.is_dataclass(value):
            yield from _sources(value)
