"""`python -m train PHASE --config FILE [section.key=value ...]`; PHASE is a key of CONFIGS."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.launch import launch
from train.run_folder import is_done
from train.settings.llamagen import LlamaGenTrainingConfig
from train.settings.llava import LlavaAlignConfig, LlavaInstructConfig
from train.settings.tokenizer import Stage1Config, Stage2Config
from train.settings.um3 import UM3Config, UM3InitConfig, UM3InstructConfig
from um3.core.commands import command_parser, positive, read_config
from um3.core.distributed import is_main
from um3.core.errors import Interrupted, UserError
from um3.core.files import folder_lock
from um3.core.log import log_file, quiet_model_files

CONFIGS: dict[str, type[Any]] = {
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "um3-init": UM3InitConfig,
    "um3": UM3Config,
    "um3-instruct": UM3InstructConfig,
    "llamagen": LlamaGenTrainingConfig,
    "llava-align": LlavaAlignConfig,
    "llava-instruct": LlavaInstructConfig,
}
RECIPES = {"llava-align": "llava", "llava-instruct": "llava"}
"""Modules of phases that have not one of their own name."""


def main(arguments: Sequence[str]) -> None:
    """Train the phase that `arguments` starts with; return at once if its folder is up to date."""
    phase = arguments[0]
    parser = command_parser(f"python -m train {phase}", f"Train {phase}.", config="required")
    parser.add_argument("--processes", type=positive, default=1, help="training processes on this machine (default 1)")
    config, options = read_config(CONFIGS[phase], parser, section=phase, arguments=arguments[1:])
    if not config.loop.output_dir:
        raise UserError("loop.output_dir is empty; set it to the folder of this phase, such as runs/demo/stage1")
    inputs = config.inputs()
    if is_done(config, inputs=inputs):
        print(f"{phase}: {config.loop.output_dir} is up to date")
        return
    if options.processes > 1 and "RANK" not in os.environ:
        sys.exit(launch(arguments, processes=options.processes, timeout_s=config.engine.timeout_s))
    with folder_lock(config.loop.output_dir) if is_main() else contextlib.nullcontext():
        recipe = importlib.import_module(f"train.recipes.{RECIPES.get(phase, phase.replace('-', '_'))}")
        from train import engine, loop

        quiet_model_files()
        engine.start_runtime(config.loop, timeout_s=config.engine.timeout_s)
        log = Path(config.loop.output_dir, loop.LOG_FILE)
        try:
            with log_file(log) if is_main() else contextlib.nullcontext():
                loop.run(recipe.build_task(config), config=config, inputs=inputs)
        except Interrupted as stopped:
            sys.exit(stopped.code)
