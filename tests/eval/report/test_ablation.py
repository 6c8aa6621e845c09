"""A table of real runs at the smallest size, the rule for the weights, and tables that cannot be made."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.report.ablation import Table, balance, main, markdown
from eval.scores import Measurement
from tests.train.conftest import ROOT, TINY, environment
from tokenizer import load
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.images import read_image
from um3.core.metrics import read_metrics

TABLE = """
title: Two weights
columns: {scenes_reconstruction_stage1/psnr: PSNR, digits_classification/zero_shot: zero-shot}
rows:
  - {name: "1 : 0", stage1: [loss.contrastive=1, loss.mse=0], alone: contrastive, paper: [11.7, 0.757]}
  - {name: "0 : 1", stage1: [loss.contrastive=0, loss.mse=100], alone: mse}
"""
CHAIN = """
title: One after the other
columns: {scenes_reconstruction_stage1/psnr: PSNR, scenes_reconstruction_stage2/psnr: after stage 2}
curves: {train/mse: squared error, gradients/mse: its gradient}
rows:
  - {name: first, stage1: [gradient_norms=true]}
  - {name: second, after: first, stage1: ["model.encoder_weights={after}/stage1/model", optimizer.lr=1e-9]}
  - {name: third, after: first, stage2: ["init_from={after}/stage1/model", "data.sources=[{name: digits}]"]}
"""


CONFIGS = {
    "stage1": f"base: {ROOT}/configs/demo.yaml\n",
    "stage2": f"base: {ROOT}/configs/demo.yaml\nloop: {{max_steps: 2, batch_size: 8}}\n",
    "eval": "tokenizer: {num_images: 4, labelled: true}\nnum_threads: 1\n",
}


@pytest.fixture
def configs(tmp_path: Path) -> str:
    """A folder of small configs for the rows."""
    (tmp_path / "configs").mkdir()
    for phase, text in CONFIGS.items():
        (tmp_path / "configs" / f"{phase}.yaml").write_text(text)
    return str(tmp_path / "configs")


def write(folder: Path, text: str) -> str:
    (folder / "table.yaml").write_text(text)
    return str(folder / "table.yaml")


def test_rows_are_trained_measured_and_weighed(tmp_path: Path, configs: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--table", write(tmp_path, TABLE), "--config", configs, "--run", str(tmp_path / "run"), "--alone"]
    main([*command, *TINY["stage1"]])
    lines = (tmp_path / "run/balance.md").read_text().splitlines()
    assert lines[0] == "# Two weights" and lines[2] == "| | PSNR | zero-shot |"
    values = json.loads((tmp_path / "run/balance.json").read_text())
    psnr = values["1 : 0"][0]["scenes_reconstruction_stage1/psnr"]["value"]
    assert lines[4].startswith(f"| 1 : 0 | {psnr:.2f} dB (paper 11.70 dB) | ") and lines[4].endswith(
        " (paper 75.7 %) |"
    )
    last = {}
    for name, key in (("1-0", "train/contrastive"), ("0-1", "train/mse")):
        last[name] = read_metrics(tmp_path / "run" / name / "stage1/metrics.jsonl")[-1][key]
    assert lines[-1].startswith(f"a_r / a_a = {last['1-0'] / last['0-1']:.3g}: ")
    capfd.readouterr()
    main([*command, *TINY["stage1"]])
    assert capfd.readouterr().out.count("is up to date") == 4


def test_a_row_starts_from_the_one_it_comes_after(tmp_path: Path, configs: str) -> None:
    run = tmp_path / "run"
    main(["--table", write(tmp_path, CHAIN), "--config", configs, "--run", str(run), *TINY["stage1"]])
    first, second = (load(run / name / "stage1/model")[0] for name in ("first", "second"))
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(second.vision_features(pixels), first.vision_features(pixels))
    values = json.loads((run / "table.json").read_text())
    # Trained on digits, but measured on the scenes that the first row holds out, like the others.
    assert values["third"][0]["scenes_reconstruction_stage2/psnr"]["value"] > 0
    assert (run / "table.md").read_text().splitlines()[4].endswith(" dB | – |")
    assert read_image(run / "curves.png").width > 1000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_table_that_is_stopped_saves_its_row_and_goes_on(
    number: signal.Signals, tmp_path: Path, configs: str
) -> None:
    command = ["--table", write(tmp_path, TABLE), "--config", configs, "--run", str(tmp_path / "run"), "--alone"]
    command = [sys.executable, "-m", "eval.report.ablation", *command, *TINY["stage1"], "loop.max_steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/1-0/stage1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "run the same command to go on" in said
    saved = sorted((tmp_path / "run/1-0/stage1/checkpoints").glob("step-*/meta.json"))
    assert int(saved[-1].parent.name.removeprefix("step-")) >= len(metrics.read_text().splitlines()) - 1 > 2


def test_several_seeds_give_a_mean_and_a_spread(tmp_path: Path) -> None:
    table = load_config(Table, path=write(tmp_path, "columns: {x/a: A}\nseeds: 3\nrows: [{name: r, stage1: []}]"))
    seeds = [{"x/a": Measurement("x", 0).score("a", value, n=9, unit="%")} for value in (0.2, 0.3, 0.4)]
    assert markdown(table, scores={"r": seeds})[-1] == "| r | 30.0 % ± 10.0 % |"


def test_a_row_that_fails_ends_the_table_in_one_line(tmp_path: Path) -> None:
    table = write(tmp_path, TABLE.replace("loss.mse=0", "loss.nothing=0"))
    with pytest.raises(UserError, match="row '1 : 0' stopped with exit code 2 in stage1"):
        main(["--table", table, "--config", str(ROOT / "configs/demo"), "--run", str(tmp_path / "run")])


def test_the_rule_needs_both_losses(tmp_path: Path) -> None:
    assert balance({"mse": tmp_path}) == ""


def test_a_table_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for text, message in (
        ("rows: []", "a table needs rows"),
        ("rows: [{name: a, stage1: []}, {name: a, stage1: []}]", "letters or digits of its own"),
        ("rows: [{name: 1.0, stage1: []}, {name: '1 0', stage1: []}]", "letters or digits of its own"),
        ("rows: [{name: '---', stage1: []}]", "letters or digits of its own"),
        ("seeds: 0\nrows: [{name: a, stage1: []}]", "seeds is 0"),
        ("rows: [{name: a, stage2: []}]", "row 'a' needs a stage1"),
        ("rows: [{name: a, stage1: []}, {name: b}]", "row 'b' needs a stage1"),
        (
            "rows: [{name: a, stage1: [], after: b}, {name: b, stage1: []}]",
            "'a' comes after 'b', which is no row above",
        ),
        ("columns: {a/b: B}\nrows: [{name: a, stage1: [], paper: [1, 2]}]", "2 values of the paper for 1 columns"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(Table, path=write(tmp_path, text))
    table = load_config(
        Table, path=write(tmp_path, "columns: {x/psnr: PSNR, x/none: none}\nrows: [{name: a, stage1: []}]")
    )
    with pytest.raises(UserError, match="no run has a score 'x/none'; there are x/psnr"):
        markdown(table, scores={"a": [{"x/psnr": Measurement("x", 0).score("psnr", 20.0, n=1)}]})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").iterdir()), ids=lambda path: path.stem)
def test_every_table_of_the_project_loads(path: Path) -> None:
    assert load_config(Table, path=path).title
