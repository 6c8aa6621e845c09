"""A table of real runs at the smallest size, the rule for the weights, and tables that cannot be made."""

import json
from pathlib import Path

import pytest

from eval.ablation import Table, balance, main, markdown
from eval.scores import Measurement
from tests.train.conftest import ROOT, TINY
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.metrics import read_metrics

TABLE = """
title: Two weights
columns: {scenes_reconstruction_stage1/psnr: PSNR, digits_classification/zero_shot: zero-shot}
rows:
  - {name: "1 : 0", stage1: [loss.contrastive=1, loss.mse=0], alone: contrastive, paper: [11.7, 0.757]}
  - {name: "0 : 1", stage1: [loss.contrastive=0, loss.mse=100], alone: mse}
"""


def write(folder: Path, text: str) -> str:
    (folder / "table.yaml").write_text(text)
    return str(folder / "table.yaml")


def test_rows_are_trained_measured_and_weighed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "stage1.yaml").write_text(f"base: {ROOT}/configs/demo/stage1.yaml\n")
    (configs / "eval.yaml").write_text("tokenizer: {num_images: 4, labelled: true}\nnum_threads: 1\n")
    command = ["--table", write(tmp_path, TABLE), "--config", str(configs), "--run", str(tmp_path / "run"), "--alone"]
    main([*command, *TINY["stage1"]])
    lines = (tmp_path / "run/balance.md").read_text().splitlines()
    assert lines[0] == "# Two weights" and lines[2] == "| | PSNR | zero-shot |"
    values = json.loads((tmp_path / "run/balance.json").read_text())
    psnr = values["1 : 0"]["scenes_reconstruction_stage1/psnr"]["value"]
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


def test_a_row_that_fails_ends_the_table_in_one_line(tmp_path: Path) -> None:
    table = write(tmp_path, TABLE.replace("loss.mse=0", "loss.nothing=0"))
    with pytest.raises(UserError, match="row '1 : 0' stopped in stage1 with exit code 2"):
        main(["--table", table, "--config", str(ROOT / "configs/demo"), "--run", str(tmp_path / "run")])


def test_the_rule_needs_both_losses(tmp_path: Path) -> None:
    assert balance({"mse": tmp_path}) == ""


def test_a_table_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for text, message in (
        ("rows: []", "a table needs rows"),
        ("rows: [{name: a}, {name: a}]", "each with a name of its own"),
        ("columns: {a/b: B}\nrows: [{name: a, paper: [1, 2]}]", "2 values of the paper for 1 columns"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(Table, path=write(tmp_path, text))
    table = load_config(Table, path=write(tmp_path, "columns: {x/psnr: PSNR, x/none: none}\nrows: [{name: a}]"))
    with pytest.raises(UserError, match="no run has a score 'x/none'; there are x/psnr"):
        markdown(table, scores={"a": {"x/psnr": Measurement("x", 0).score("psnr", 20.0, n=1)}})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").iterdir()), ids=lambda path: path.stem)
def test_every_table_of_the_project_loads(path: Path) -> None:
    assert load_config(Table, path=path).title
