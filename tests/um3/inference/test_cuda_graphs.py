"""What recording steps on a GPU relies on, as far as a CPU can show it."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.tiny_um3 import make_ids, make_model
from um3.inference.cuda_graphs import CudaGraphs
from um3.inference.generate import Sampler
from um3.inference.sampling_params import Sampling
from um3.model import sequences

READS_VALUES = {"_local_scalar_dense", "nonzero", "item", "_unique2", "masked_select"}


class NoValues(TorchDispatchMode):
    """Refuses operations that read the values of a tensor on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in READS_VALUES, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["image", "kept", "text"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5, "min_p": 0.01}])
def test_steps_read_no_values_and_keep_their_tensors_in_place_over_batches(kind, options):
    ids = make_ids(num_patches=4)
    sampler = Sampler(make_model(ids), ids=ids)
    sampling = Sampling(**options, **({} if kind == "text" else {"guidance_scale": (1.0, 3.0)}))
    kept = ids.codes_to_ids(torch.tensor([[1, 2, 3, 4]] * 2)) if kind == "kept" else None
    places = []

    def step(function, *key):
        batch = function.__self__
        state = {**vars(batch), **vars(batch.sequences)}
        places.append({name: value.data_ptr() for name, value in state.items() if isinstance(value, torch.Tensor)})
        with NoValues():
            function(*key)

    for captions in ([[10, 11], [12]], [[13], [14, 15, 16]]):
        prompts = [sequences.image_prompt(caption, ids=ids) for caption in captions]
        shared = {"prompts": prompts, "sampling": sampling, "uniforms_BP": torch.rand(2, 16)}
        with mock.patch.object(CudaGraphs, "__call__", lambda _, *arguments: step(*arguments)):
            if kind == "text":
                sampler.texts(**shared)
            else:
                sampler.images(**shared, unconditional_prompt=sequences.image_prompt([], ids=ids), kept_BP=kept)
    assert len(places) == 30 or kind == "text"  # a text may end early
    assert len(places[0]) > 6 and all(place == places[0] for place in places)


def test_on_a_gpu_the_first_call_warms_up_the_second_records_and_later_ones_replay(monkeypatch):
    """With stand-ins for torch's objects; all graphs share one memory pool."""
    events = []

    class Graph:
        def replay(self):
            events.append("replay")

    @contextlib.contextmanager
    def recording(graph, **options):
        events.append(options)
        yield

    stand_ins = {
        "Stream": lambda device: mock.Mock(),
        "current_stream": lambda device: mock.Mock(),
        "stream": contextlib.nullcontext,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph,
        "graph": recording,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs = CudaGraphs(device=torch.device("cuda", 0))
    for key in ((1,), (2,), (1,), (1,), (2,)):
        graphs(lambda *key: events.append(key), *key)
    options = {"pool": "pool", "stream": graphs.stream, "capture_error_mode": "thread_local"}
    assert events == [(1,), (2,), options, (1,), "replay", "replay", options, (2,), "replay"]
