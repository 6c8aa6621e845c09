"""Evaluation during UM3's training: the evaluators and files of `make eval`, on the model of the current step."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from eval.config import EvalConfig, PartName
from eval.part_files import read_part
from eval.report.samples import MAKERS
from eval.run import evaluate, with_sources
from eval.scores import read_scores
from train.settings.um3 import UM3Config
from um3.core.commands import find_config
from um3.core.config import load_config
from um3.core.distributed import is_main, wait_for_main
from um3.core.errors import UserError
from um3.core.metrics import NO_SAMPLES, Samples

NUM_SHOWN = 16
logger = logging.getLogger(__name__)


class Evaluation:
    """FOLDER/eval/step-NNNNNNNN/PART.json, and metrics named eval/...; UserError if config or data cannot be read."""

    def __init__(self, config: UM3Config):
        self.folder = Path(config.loop.output_dir)
        settings = load_config(EvalConfig, path=find_config(config.evaluate.config), section="eval")
        parts: list[PartName] = list(config.evaluate.parts)
        # Threads stay as they are: another number would change the last digits of the training steps that follow.
        settings = dataclasses.replace(
            settings,
            run=str(self.folder.parent),
            parts=parts,
            num_threads=0,
            texts=settings.texts or config.data.texts,  # the run's config.yaml is not written yet
        )
        self.config = with_sources(settings)
        self.shown: Mapping[str, Samples] = NO_SAMPLES
        """Images of the last evaluation."""

    def measure(self, write_model: Callable[[Path], None], *, step: int) -> dict[str, float]:
        """Evaluate on the first rank, while the others wait; return the scores as metrics there (a collective call).

        `write_model` writes the current model to a folder; every rank calls it. A UserError is reported and does not
        stop the run.
        """
        self.shown = NO_SAMPLES
        step_folder = self.folder / "eval" / f"step-{step:08d}"
        model = step_folder / "model"
        write_model(model)
        values = {}
        if is_main():
            config = dataclasses.replace(self.config, model=str(model), output_dir=str(step_folder))
            try:
                evaluate(config)
            except UserError as error:
                logger.warning("step %d: the evaluation was skipped: %s", step, error)
            else:
                files = [config.results_dir / f"{part}.json" for part in config.parts]
                scores = [score for file in files for score in read_scores(file)]
                values = {f"eval/{score.key}": score.value for score in scores if score.value is not None}
                self.shown = _samples(config)
            shutil.rmtree(model, ignore_errors=True)
        wait_for_main()
        return values


def _samples(config: EvalConfig) -> dict[str, Samples]:
    """The first generated and captioned images of every source, from the files of the evaluation."""
    shown = {}
    for name in ("captions", "generated"):
        part, make = MAKERS[name]
        for group in make(read_part(config.results_dir / f"{part}.json"), {}) if part in config.parts else []:
            tiles = group.tiles[:NUM_SHOWN]
            images_NHWC = np.stack([tile.image for tile in tiles])
            shown[f"eval/{name}/{group.title}"] = Samples(images_NHWC, [tile.text for tile in tiles])
    return shown
