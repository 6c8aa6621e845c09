"""The GPU proof runs every benchmark, loses no part to another, and puts their figures on one page."""

import json

import pytest

from benchmarks import gpu_proof
from um3.core.errors import UserError

DECODE, LLAMAGEN = "decode, batch 1", "LlamaGen-XL"


def prove(out, *parts):
    gpu_proof.main(["--small", "--out", str(out), "--parts", *parts])
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_part_runs_at_a_small_size(tmp_path, capsys):
    gpu_proof.main(["--small", "--out", str(tmp_path), "--minutes", "40"])
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["part"] for result in results] == [
        "tests", "UM3 step", DECODE, "tokenizer", "steps of stages 1 and 2", LLAMAGEN
    ]  # fmt: skip
    assert {result["status"] for result in results} == {"done"}
    page = (tmp_path / "page.md").read_text()
    for quantity in ("speedup", "utilisation", "share of memory bound", "B-16 speedup.encode", "stage2.utilisation"):
        assert page.count(f"| {quantity} |") == 1
    assert capsys.readouterr().out.count(": done") == 6


def test_a_failed_part_is_run_again_and_a_finished_one_is_not(tmp_path, monkeypatch, capsys):
    commands = []

    def run_process(command, *, label, limit_s):
        commands.append(label)
        if label == DECODE and commands.count(label) == 1:
            raise UserError(f"{label}: stopped at its limit of {limit_s:.0f} s")
        return 'a line\n{"share_of_memory_bound": 0.256}\n'

    monkeypatch.setattr(gpu_proof, "run_process", run_process)
    first, second = prove(tmp_path, DECODE, LLAMAGEN)
    assert "stopped at its limit" in first["status"] and second["status"] == "done"
    assert len(prove(tmp_path, DECODE, LLAMAGEN)) == 3 and commands == [DECODE, LLAMAGEN, DECODE]
    page = (tmp_path / "page.md").read_text()
    assert f"| {DECODE} | share of memory bound | 0.26 | 0.7 |" in page and page.count("a line") == 2
    assert str(tmp_path / "page.md") in capsys.readouterr().out


def test_without_a_gpu_the_full_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proof, "device_name", lambda: "")
    with pytest.raises(UserError, match="no GPU"):
        gpu_proof.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("device", "option"),
    [
        ("NVIDIA H200", "--peak-tflops 989"),
        ("NVIDIA A100-SXM4-80GB", "--peak-tflops 312"),
        ("NVIDIA GeForce RTX 4090", "--peak-tflops 165"),
        ("NVIDIA L40", ""),
    ],
)
def test_the_peak_is_that_of_the_devices_data_sheet(device, option):
    assert gpu_proof.peak_option(device) == option
