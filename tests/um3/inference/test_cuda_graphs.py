"""What the recording of steps on a GPU relies on, as far as a CPU can show it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from um3.inference.cuda_graphs import Replayed
from um3.inference.decoder import Body, Decoder
from um3.inference.generate import _Images, _Samples, _Texts
from um3.inference.sampling_params import Sampling
from um3.model import sequences as rows
from um3.model.language_model import ModelConfig, build_model
from um3.model.vocabulary import UnifiedVocabulary

LOOKING = {"_local_scalar_dense", "nonzero", "item", "_unique2", "masked_select"}


class Blindfold(TorchDispatchMode):
    """Refuses operations that need to know what is in a tensor, or that copy to another device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in LOOKING, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["image", "kept", "text"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5, "min_p": 0.01}])
def test_a_step_looks_at_nothing_and_leaves_its_tensors_in_place(
    make_ids: Callable[..., UnifiedVocabulary], kind: str, options: dict[str, Any]
) -> None:
    ids = make_ids(num_patches=4)
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
    model = build_model(config, ids=ids).eval()
    prompts = [rows.image_prompt(caption, ids=ids) for caption in ([10, 11], [12])]
    scale = {} if kind == "text" else {"guidance_scale": (1.0, 3.0)}
    shared: dict[str, Any] = {"ids": ids, "sampling": Sampling(**options, **scale), "uniforms_BP": torch.rand(2, 16)}
    with torch.inference_mode():
        body = Body(model)
        decoder = Decoder(body, prompts=prompts if kind == "text" else [*prompts, *[prompts[0]] * 2], num_new=16)
        samples: _Samples
        if kind == "text":
            samples = _Texts(decoder, **shared, ends={ids.eos_id})
        else:
            kept = ids.codes_to_ids(torch.tensor([[1, 2, 3, 4]] * 2)) if kind == "kept" else None
            samples = _Images(decoder, **shared, kept_BP=kept)
        samples.draw(decoder.prefill(), 0)

        def places() -> dict[str, int]:
            state = {**vars(samples), **vars(decoder)}
            return {name: each.data_ptr() for name, each in state.items() if isinstance(each, torch.Tensor)}

        before = places()
        with Blindfold():
            for position in range(1, 16):
                samples.advance(decoder.window(position), 0 if kind == "text" else position % ids.subtokens)
    assert places() == before and int(samples.position_1) == 16


def test_without_a_gpu_every_call_is_plain() -> None:
    calls: list[tuple[int, ...]] = []
    run = Replayed(lambda *key: calls.append(key), device=torch.device("cpu"))
    for key in ((1, 2), (1, 2), (1, 3)):
        run(*key)
    assert calls == [(1, 2), (1, 2), (1, 3)]


def test_on_a_gpu_the_first_call_of_a_key_warms_up_and_the_second_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for torch's: a graph that is replayed says so, and one memory serves all."""
    events: list[Any] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextlib.contextmanager
    def recording(graph: Graph, **options: Any) -> Iterator[None]:
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
    run = Replayed(lambda *key: events.append(key), device=torch.device("cuda", 0))
    for key in ((1,), (2,), (1,), (1,), (2,)):
        run(*key)
    options = {"pool": "pool", "stream": run.stream, "capture_error_mode": "thread_local"}
    assert events == [(1,), (2,), options, (1,), "replay", "replay", options, (2,), "replay"]
