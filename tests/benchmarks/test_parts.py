"""A run of many benchmarks loses no part to another, and puts their figures on one page."""

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import parts
from benchmarks.__main__ import COMMANDS
from um3.core.errors import UserError

DECODE, LLAMAGEN, LLAVA = "decode, batch 1", "LlamaGen-XL", "LLaVA-7B, ZeRO 3 with offload"


def prove(out, *names):
    parts.main(["gpu-proof", "--small", "--out", str(out), "--parts", *names])
    return results(out)


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_part_runs_at_a_small_size(tmp_path, capsys):
    parts.main(["gpu-proof", "--small", "--out", str(tmp_path), "--minutes", "40"])
    assert [result["part"] for result in results(tmp_path)] == [
        "tests", "UM3 step", DECODE, "tokenizer", "steps of stages 1 and 2", LLAMAGEN, LLAVA
    ]  # fmt: skip
    assert {result["status"] for result in results(tmp_path)} == {"done"}
    page = (tmp_path / "page.md").read_text()
    for quantity in (
        "speedup",
        "utilisation",
        "share of memory bound",
        "B-16 speedup.encode",
        "stage2.utilisation",
        "plan to measured.memory",
    ):
        assert page.count(f"| {quantity} |") == 1
    assert capsys.readouterr().out.count(": done") == 7


def test_a_failed_part_is_run_again_and_a_finished_one_is_not(tmp_path, monkeypatch, capsys):
    commands = []

    def run_process(command, *, label, limit_s):
        commands.append(label)
        if label == DECODE and commands.count(label) == 1:
            raise UserError(f"{label}: stopped at its limit of {limit_s:.0f} s")
        return 'a line\n{"share_of_memory_bound": 0.256}\n'

    monkeypatch.setattr(parts, "run_process", run_process)
    with pytest.raises(UserError, match=f"1 of 2 parts failed or did not run: {DECODE}"):
        prove(tmp_path, DECODE, LLAMAGEN)
    first, second = results(tmp_path)
    assert "stopped at its limit" in first["status"] and second["status"] == "done"
    assert len(prove(tmp_path, DECODE, LLAMAGEN)) == 3 and commands == [DECODE, LLAMAGEN, DECODE]
    page = (tmp_path / "page.md").read_text()
    assert f"| {DECODE} | share of memory bound | 0.26 | 0.7 |" in page and page.count("a line") == 2
    assert str(tmp_path / "page.md") in capsys.readouterr().out


def test_all_starts_anew_and_tables_the_figures(tmp_path, monkeypatch, capsys):
    lines = {"LlamaGen": "step: 2.00 s, flat 4.00: 0.50x by the clock, 0.55x in CPU time\n{}"}
    monkeypatch.setattr(parts, "run_process", lambda command, *, label, limit_s: lines[label])
    for _ in range(2):
        parts.main(["all", "--out", str(tmp_path), "--parts", "LlamaGen"])
        (result,) = results(tmp_path)
        row = f"| LlamaGen | {result['seconds']:.0f} | step: 2.00 s, flat 4.00: 0.50x by the clock |"
        assert row in capsys.readouterr().out and row in (tmp_path / "page.md").read_text()


def test_all_has_a_part_for_every_benchmark():
    rows = yaml.safe_load(Path(parts.__file__).with_name("all.yaml").read_text())
    assert {row["command"].split()[1] for row in rows} == COMMANDS.keys() - parts.RUNS.keys()
    assert all(re.compile(row["figure"]) for row in rows)


def test_a_goal_may_be_a_range(tmp_path, monkeypatch):
    numbers = {"speedup": 2.0, "utilisation": 0.5, "plan_to_measured": {"time": 1.234, "memory": 0.987}}
    monkeypatch.setattr(parts, "run_process", lambda *args, **kwargs: json.dumps(numbers))
    prove(tmp_path, "UM3 step")
    page = (tmp_path / "page.md").read_text()
    assert "| UM3 step | utilisation | 0.50 | 0.6 |" in page
    assert "| UM3 step | plan to measured.memory | 0.99 | [0.9, 1.1] |" in page


def test_without_a_gpu_the_full_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "device_name", lambda: "")
    with pytest.raises(UserError, match="no GPU"):
        parts.main(["gpu-proof", "--out", str(tmp_path)])


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
    assert parts.peak_option(device) == option
