"""What a run has had of every source for every task: samples and tokens, against what the schedule asks for.

Shape legend: K = pairs of task and source, C = the columns of COUNTED.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COUNTED = ("samples", "text_tokens", "visual_tokens", "replaced")
"""tokens: ids of the samples, padding not counted, by the half of the vocabulary they belong to; replaced: samples that
stand for others whose shard cannot be read."""


class MixAccount:
    """Sums over all steps and ranks; `keys` are "task/source"."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self.total_KC = np.zeros((len(self.keys), len(COUNTED)), dtype=np.int64)

    def add(self, seen_KC: np.ndarray) -> None:
        """Count what all ranks together have had in one step."""
        self.total_KC += seen_KC.astype(np.int64)

    def metrics(self, *, due: Mapping[str, float]) -> dict[str, float]:
        """data/samples/TASK, data/samples/TASK/SOURCE and so on; what is scheduled, `due`, as data/scheduled/..."""
        values = {f"data/scheduled/{key}": count for key, count in due.items()}
        for task in dict.fromkeys(key.partition("/")[0] for key in self.keys):
            mine = [number for number, key in enumerate(self.keys) if key.startswith(f"{task}/")]
            values[f"data/samples/{task}"] = float(self.total_KC[mine, 0].sum())
        for key, row_C in zip(self.keys, self.total_KC.tolist(), strict=True):
            counts = dict(zip(COUNTED, map(float, row_C), strict=True))
            if key.startswith("text/"):
                del counts["visual_tokens"]
            if not counts["replaced"]:
                del counts["replaced"]
            values |= {f"data/{name}/{key}": count for name, count in counts.items()}
        return values

    def state(self) -> dict[str, dict[str, int]]:
        """The sums as JSON."""
        return {
            key: dict(zip(COUNTED, row, strict=True))
            for key, row in zip(self.keys, self.total_KC.tolist(), strict=True)
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; what an older checkpoint did not count begins at 0."""
        for row_C, key in zip(self.total_KC, self.keys, strict=True):
            row_C[:] = [state.get(key, {}).get(name, 0) for name in COUNTED]
