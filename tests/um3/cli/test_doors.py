"""The commands of `um3` that start a phase: from any folder, with `--run`, and with a phase's exit code and signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.processes import ROOT
from train.settings.tokenizer import Stage1Config
from um3 import cli
from um3.cli import doors
from um3.core.commands import find_config
from um3.core.config import load_config


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "um3", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_door_opens_from_a_folder_with_modules_of_the_same_names(tmp_path: Path) -> None:
    for name in ("train", "eval", "tokenizer", "configs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    listed = start("train", "--help", cwd=tmp_path)
    assert listed.returncode == 0 and "um3-instruct" in listed.stdout, listed.stderr
    assert listed.stdout.startswith("usage: um3 train COMMAND ...")
    refused = start("train", "stage1", "--config", "demo", "optimizer.lrr=1", cwd=tmp_path)
    assert refused.returncode == 2 and "unknown key 'optimizer.lrr'" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("run", ["runs/mine", "odd ' # $HOME name"])
def test_run_stands_for_the_folders_of_a_run(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append((words[1:], environment)))

    def words(*arguments: str) -> list[str]:
        assert CliRunner().invoke(cli.app, arguments).exception is None
        return started[-1][0]

    trained = words("train", "stage1", "--config", "demo", "--run", run, "loop.seed=3")
    assert trained[:3] == ["-m", "train", "stage1"] and trained[-3:] == ["--config", "demo", "loop.seed=3"]
    monkeypatch.setenv("RUN", started[-1][1]["RUN"])
    config = load_config(Stage1Config, overrides=[*filter(re.compile("=").search, trained), "data.sources=[{name: a}]"])
    assert config.loop.output_dir == f"{run}/stage1" and config.loop.seed == 3
    assert words("check", f"--run={run}") == ["-m", "train", "check", run]
    assert words("report", "--run", run, "b") == ["-m", "eval", "report", "--run", run, "b"]  # its own option
    assert words("codes", "a=1") == ["-m", "data_mix", "encode", "a=1"]
    assert words("benchmark", "dpg", "-h") == ["-m", "eval", "dpg", "-h"]


def test_the_demo_stops_at_the_first_phase_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Child:
        def __init__(self, words: list[str], env: dict[str, str]) -> None:
            calls.append([*words[2:4], env["RUN"]])

        def wait(self) -> int:
            return 2 if calls[-1][1] == "encode" else 0

    monkeypatch.setattr(subprocess, "Popen", Child)
    result = CliRunner().invoke(cli.app, ["demo"])
    names = ["train settings", "train stage1", "train stage2", "data_mix encode"]
    assert result.exit_code == 2 and calls == [[*name.split(), "runs/demo"] for name in names]


def test_the_demo_takes_own_data_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(doors, "_call", lambda words, environment: calls.append((list(words), dict(environment))))
    result = CliRunner().invoke(cli.app, ["demo", "--data", "my images", "--text", "t.txt", "um3.loop.max_steps=3"])
    assert result.exit_code == 0, result.output
    *phases, (report, _) = calls
    assert report == ["eval", "report", "--run", "runs/own_images"] and len(phases) == 7
    (chosen, _) = phases.pop(1)
    assert chosen[:4] == ["train", "own-images", "--config", str(find_config("own_images"))]
    assert chosen[chosen.index("--out") + 1] == "runs/own_images/own_images.yaml"
    for words, environment in phases:
        assert (environment["DATA"], environment["TEXT"], words[-1]) == ("my images", "t.txt", "um3.loop.max_steps=3")
        assert words[1] == "settings" or "--shared" in words
    monkeypatch.setenv("DATA", "my images")
    assert not any(word.startswith("data.sources") for word in phases[1][0])
    config = load_config(Stage1Config, overrides=[f"data.sources={chosen[chosen.index('--sources') + 1]}"])
    assert config.data.sources[0].path == "my images"


def test_a_signal_reaches_the_phase_and_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
    popen: Any = subprocess.Popen

    def child(words: list[str], env: dict[str, str]) -> Any:
        started = popen([sys.executable, "-c", script])
        time.sleep(1)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return started

    monkeypatch.setattr(subprocess, "Popen", child)
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as caught:
            doors._call(["train", "stage1"], {})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert caught.value.code == 128 + signal.SIGTERM  # the phase has saved its state and ended with 0


def test_the_version_and_completion() -> None:
    for option in ("-h", "--help"):
        assert "um3" in CliRunner().invoke(cli.app, [option]).output
    assert CliRunner().invoke(cli.app, ["--version"]).output.startswith("um3 0.")
    environment = os.environ | {"_UM3_COMPLETE": "complete_bash", "COMP_WORDS": "um3 gen", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from um3.cli import entry_point; entry_point()"]
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert completed.stdout.split() == ["generate"], completed.stderr
