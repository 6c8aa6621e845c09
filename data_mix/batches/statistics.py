"""Samples and tokens seen per task and source, compared with the schedule.

Shape legend: K = pairs of task and source, C = the columns of COUNTED.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COUNTED = ("samples", "text_tokens", "visual_tokens", "replaced")
"""Tokens are counted without padding, by the half of the vocabulary that they belong to. A sample is replaced where its
shard cannot be read."""


class MixStatistics:
    """Sums over all steps and ranks; `keys` are "task/source"."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self.total_KC = np.zeros((len(self.keys), len(COUNTED)), dtype=np.int64)

    def add(self, seen_KC: np.ndarray) -> None:
        """Add what all ranks together saw in one step."""
        self.total_KC += seen_KC

    def metrics(self, *, scheduled: Mapping[str, float]) -> dict[str, float]:
        """The sums as data/samples/TASK, data/samples/TASK/SOURCE and so on; `scheduled` becomes data/scheduled/..."""
        values = {f"data/scheduled/{key}": count for key, count in scheduled.items()}
        samples = dict(zip(self.keys, self.total_KC[:, 0].tolist(), strict=True))
        for task in dict.fromkeys(key.partition("/")[0] for key in self.keys):
            values[f"data/samples/{task}"] = float(sum(samples[key] for key in self.keys if key.startswith(f"{task}/")))
        for key, counts in self.state().items():
            if key.startswith("text/"):
                del counts["visual_tokens"]
            if not counts["replaced"]:
                del counts["replaced"]
            values |= {f"data/{name}/{key}": float(count) for name, count in counts.items()}
        return values

    def state(self) -> dict[str, dict[str, int]]:
        """The sums as JSON."""
        sums = (dict(zip(COUNTED, row, strict=True)) for row in self.total_KC.tolist())
        return dict(zip(self.keys, sums, strict=True))

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`; counts that an older checkpoint lacks begin at 0."""
        for row_C, key in zip(self.total_KC, self.keys, strict=True):
            row_C[:] = [state.get(key, {}).get(name, 0) for name in COUNTED]
