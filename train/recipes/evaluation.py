"""Evaluation while UM3 trains: the evaluators and files of `make eval`, on the model as it is at that step."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from eval.config import EvalConfig, PartName
from eval.run import evaluate, out_folder, with_sources
from eval.scores import read_scores
from train.config import UM3Config
from um3.core.commands import find_config
from um3.core.config import load_config
from um3.core.distributed import is_main, wait_for_main
from um3.core.errors import UserError

logger = logging.getLogger(__name__)


class Evaluation:
    """What is measured every `evaluate.every_steps` steps: FOLDER/eval/step-NNNNNNNN/PART.json, and metrics eval/..."""

    def __init__(self, config: UM3Config):
        """Raises:
        UserError: a config that cannot be read, or data that is not there.
        """
        self.every_steps = config.evaluate.every_steps
        self.folder = Path(config.loop.output_dir)
        given = load_config(EvalConfig, path=find_config(config.evaluate.config), section="eval")
        parts: list[PartName] = list(config.evaluate.parts)
        # More threads would change the last digits of the training after it.
        given = dataclasses.replace(
            given, run=str(self.folder.parent), parts=parts, num_threads=config.loop.num_threads
        )
        self.config = with_sources(given)

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return step % self.every_steps == 0

    def measure(self, write_model: Callable[[Path], None], *, step: int) -> dict[str, float]:
        """The scores as metrics, on the first rank, while the others wait. `write_model`, which every rank calls,
        writes the model to a folder. What cannot be measured is told, and does not end the run."""
        place = self.folder / "eval" / f"step-{step:08d}"
        model = place / "model"
        write_model(model)
        values = {}
        if is_main():
            config = dataclasses.replace(self.config, model=str(model), out=str(place))
            try:
                evaluate(config)
            except UserError as error:
                logger.warning("after step %d nothing was measured: %s", step, error)
            else:
                files = [out_folder(config) / f"{part}.json" for part in config.parts]
                scores = [score for file in files for score in read_scores(file)]
                values = {f"eval/{score.key}": score.value for score in scores if score.value is not None}
            shutil.rmtree(model, ignore_errors=True)
        wait_for_main()
        return values
