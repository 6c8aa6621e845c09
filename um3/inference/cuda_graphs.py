"""CUDA graphs for the steps of a loop: one launch replays a whole step. Not yet run on a GPU."""

from collections.abc import Callable

import torch


class CudaGraphs:
    """Calls `function(*key)`; on a GPU the second call with a key records a CUDA graph, later calls replay it.

    Always pass the same function. It must work on tensors that keep their place in memory, without reading their
    contents on the host. The first call with a key runs normally, which warms up what the recording needs. On a CPU
    every call runs normally.
    """

    def __init__(self, *, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # No intermediate tensor outlives a step, so all graphs can share memory, in any order.
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}

    def __call__(self, function: Callable[..., None], *key: int) -> None:
        if self.stream is None:
            function(*key)
        elif key not in self.graphs:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                function(*key)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            self.graphs[key] = None
        else:
            graph = self.graphs[key]
            if graph is None:
                self.graphs[key] = graph = torch.cuda.CUDAGraph()
                # Other threads may use the GPU meanwhile, as NCCL's do in a training run that evaluates.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    function(*key)
            graph.replay()
