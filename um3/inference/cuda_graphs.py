"""Steps of a loop recorded on a GPU and replayed: one launch for a whole step.

Not yet run on a GPU.
"""

from collections.abc import Callable

import torch


class Replayed:
    """Calls `function(*key)`; on a GPU the second call of a key is recorded as a CUDA graph, later ones replay it.

    The function must work on tensors that stay where they are, without looking at what is in them. Its first call for
    a key runs as it is and warms up what recording needs warm. Elsewhere every call is plain.
    """

    def __init__(self, function: Callable[..., None], *, device: torch.device):
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # No tensor outlives a step, so all graphs may work in the same memory, in any order.
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}

    def __call__(self, *key: int) -> None:
        if self.stream is None:
            self.function(*key)
        elif key not in self.graphs:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.function(*key)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            self.graphs[key] = None
        else:
            graph = self.graphs[key] or self._record(key)
            graph.replay()

    def _record(self, key: tuple[int, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the GPU meanwhile is no error, as NCCL's may in a training run that evaluates.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self.function(*key)
        self.graphs[key] = graph
        return graph
