"""The choice between oneDNN and torch's library for float32 products."""

import platform
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokenizer import onednn
from tokenizer.layers import Linear


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("vendor_id: AuthenticAMD\nflags: fpu avx512f", True),
        ("vendor_id: HygonGenuine\nflags: fpu avx2", True),
        ("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", True),  # Windows
        ("vendor_id: GenuineIntel\nflags: fpu avx512f amx_bf16", False),
        ("CPU implementer: 0x41\nFeatures: fp asimd", False),  # ARM
    ],
)
def test_the_maker_of_the_processor_chooses_the_library(processor, expected):
    assert onednn.is_faster(processor) == expected


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel"])
def test_the_environment_overrides_the_choice(maker, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: maker)
    for choice, is_faster in {"": maker == "AuthenticAMD", "1": True}.items():
        monkeypatch.setenv("UM3_ONEDNN", choice)
        assert runpy.run_path(onednn.__file__)["IS_FASTER"] == is_faster
    monkeypatch.setenv("UM3_ONEDNN", "0")
    x = torch.ones(2, 2)
    assert not runpy.run_path(onednn.__file__)["supports"](x, x)


@pytest.mark.skipif(not onednn.AVAILABLE, reason="torch without oneDNN")
@pytest.mark.parametrize("is_faster", [True, False])
def test_a_linear_layer_uses_the_chosen_library_without_gradient_only(is_faster, monkeypatch):
    calls = []
    monkeypatch.setattr(onednn, "linear", lambda *tensors: calls.append(tensors) or F.linear(*tensors))
    monkeypatch.setattr(onednn, "IS_FASTER", is_faster)
    linear, x = Linear(8, 4), torch.ones(2, 8)
    with torch.no_grad():
        linear(x)
    assert len(calls) == is_faster
    linear(x)
    assert len(calls) == is_faster
