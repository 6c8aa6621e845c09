"""A run of many benchmarks loses no part to another, and puts their figures on one page."""

import json
import math
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


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """A folder in which every part has run at a small size."""
    folder = tmp_path_factory.mktemp("proof")
    parts.main(["gpu-proof", "--small", "--out", str(folder), "--minutes", "40"])
    return folder


def numbers(proof, part):
    """What a part has printed: its lines, and the numbers of the last one."""
    (result,) = [result for result in results(proof) if result["part"] == part]
    return [line for line in result["lines"] if not line.startswith("{")], result["numbers"][-1]


@pytest.mark.slow
def test_every_part_runs_at_a_small_size(proof):
    assert [result["part"] for result in results(proof)] == [
        "tests", "UM3 step", DECODE, "tokenizer", "steps of stages 1 and 2", LLAMAGEN, LLAVA
    ]  # fmt: skip
    assert {result["status"] for result in results(proof)} == {"done"}
    page = (proof / "page.md").read_text()
    for quantity in (
        "speedup",
        "utilisation",
        "share of memory bound",
        "B-16 speedup.encode",
        "stage2.utilisation",
        "plan to measured.memory",
    ):
        assert page.count(f"| {quantity} |") == 1


@pytest.mark.slow
def test_um3_and_trainer_run_on_the_same_sequences(proof):
    (ours, stock, plan), measured = numbers(proof, "UM3 step")
    assert "0.1 TFLOP/s (given, fp32)" in ours and "x as fast (" in stock and "at 35% of the peak" in plan
    for side in ("ours", "stock"):
        run = measured[side]
        assert len(run["step_s"]) == len(run["step_cpu_s"]) == 1 and run["peak_gib"] > 0
    # Two text sequences, an image to its caption, and a caption to its image.
    assert measured["tokens_per_step"] == 2 * 600 + 2 * (512 + 64 + 4)
    (seconds,) = measured["ours"]["step_s"]
    assert measured["utilisation"] == pytest.approx(measured["flops_per_step"] / seconds / 1e11)
    # The plan repeats the logits, a part of the model's operations.
    assert 1 < measured["plan_s"] * 0.35 * 1e11 / measured["flops_per_step"] < 1.4
    planned = {"time": measured["plan_s"] / seconds, "memory": measured["plan_gib"] / measured["ours"]["peak_gib"]}
    assert measured["plan_to_measured"] == pytest.approx(planned) and planned["memory"] > 0


@pytest.mark.slow
def test_stages_1_and_2_are_timed(proof):
    (stage1, stage2), measured = numbers(proof, "steps of stages 1 and 2")
    assert stage1.startswith("stage1: ") and stage2.startswith("stage2: ")
    assert {"commit", "machine", "versions", "peak_kind"} < measured.keys()
    for stage in ("stage1", "stage2"):
        run = measured[stage]
        (seconds,) = run["step_s"]
        assert run["images_per_s"] == pytest.approx(8 / seconds)
        assert run["utilisation"] == pytest.approx(sum(run["flops_per_image"].values()) * run["images_per_s"] / 0.5e12)
        assert 0 < run["utilisation"] < 1 and run["peak_gib"] > 0.1


@pytest.mark.slow
def test_llava_takes_steps_from_random_weights(proof):
    (line,), measured = numbers(proof, LLAVA)
    assert "a step of 4 conversations" in line and len(measured["step_s"]) == 1 and math.isfinite(measured["loss"])
    assert measured["samples_per_s"] == pytest.approx(4 / measured["step_s"][0])
    # Table and head of 300 rows and two of added tokens, filled to 320; one layer; the projector; then the tower.
    language = 2 * 320 * 32 + 4 * 32**2 + 3 * 32 * 48 + 3 * 32
    assert measured["parameters"] > language + 2 * (32**2 + 32) and measured["zero_stage"] == 3
    assert measured["peak_gpu_gib"] is None and measured["peak_host_gib"] > 0.1


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
