"""`python -m train PHASE --config FILE [section.key=value ...]`; PHASE is stage1, stage2 or um3.

Also what `torchrun`, `deepspeed` and a Slurm script start, with the same arguments.
"""

import argparse
import importlib
import sys
from typing import Any

from train.config import Stage1Config, Stage2Config, UM3Config, inputs_of, is_done, start_folder
from train.launch import is_worker, launch
from um3.core.config import load_config
from um3.core.distributed import leave_group
from um3.core.errors import Interrupted, UserError, run_main
from um3.core.log import quiet_model_files

CONFIGS: dict[str, type[Any]] = {"stage1": Stage1Config, "stage2": Stage2Config, "um3": UM3Config}


def main() -> None:
    """Load the config, end at once if the phase is up to date, else run its recipe."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("phase", choices=CONFIGS)
    parser.add_argument("--config", required=True, help="YAML file of the phase, such as configs/demo/stage1.yaml")
    parser.add_argument("--processes", type=int, default=1, help="training processes on this machine (default 1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the file's")
    arguments = parser.parse_intermixed_args()
    config = load_config(CONFIGS[arguments.phase], path=arguments.config, overrides=arguments.overrides)
    if not config.loop.output_dir:
        raise UserError("loop.output_dir is empty; set it to the folder of this phase, such as runs/demo/stage1")
    inputs = inputs_of(config)
    if is_done(config, inputs=inputs):
        print(f"{arguments.phase}: {config.loop.output_dir} is up to date")
        return
    if arguments.processes > 1 and not is_worker():
        sys.exit(launch(sys.argv[1:], processes=arguments.processes))
    recipe = importlib.import_module(f"train.recipes.{arguments.phase}")
    from train import engine, loop

    quiet_model_files()
    engine.start_runtime(config.loop)
    start_folder(config)
    try:
        loop.run(recipe.build_task(config), config=config, inputs=inputs)
    except Interrupted:
        sys.exit(0)


if __name__ == "__main__":
    run_main(main)
    leave_group()
