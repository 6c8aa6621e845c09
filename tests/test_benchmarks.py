"""The benchmarks run at a small size and compare what computes the same."""

import json
import sys

import pytest
import torch

from benchmarks.tokenizer import _PlainFunctions, main


def test_the_plain_transcription_computes_the_same() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    functions = _PlainFunctions(torch.nn.functional)
    for is_causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(functions.scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)


def test_the_tokenizer_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--variants", "B-8", "--image-size", "32", "--layers", "1", "--batch", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.tokenizer", *small])
    main()
    line, numbers = capsys.readouterr().out.splitlines()
    assert line.startswith("B-8: ") and "x the memory" in line
    found = json.loads(numbers)
    assert found["batch"] == 2 and found["ours"][0]["seconds"] > 0 and found["plain"][0]["peak_gib"] >= 0
