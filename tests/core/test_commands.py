"""`python -m ROOM COMMAND`: help, wrong names, and how a command receives its arguments and config."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.processes import ROOT
from um3.core import commands
from um3.core.commands import Command, command_parser, read_config, run_room
from um3.core.errors import UserError


@dataclass
class Config:
    steps: int = 1
    name: str = ""


COMMANDS = {"draw": Command("fake_room", "draw it"), "phase1": Command("fake_room", "train it", named=True)}


def run(monkeypatch, *arguments):
    """The arguments that reach the command's `main`."""
    received = []
    module = ModuleType("fake_room")
    module.main = received.extend
    monkeypatch.setitem(sys.modules, "fake_room", module)
    monkeypatch.setattr(commands, "run_main", lambda main: main())  # no signal handlers in this process
    monkeypatch.setattr(sys, "argv", ["python -m room", *arguments])
    run_room("room", COMMANDS)
    return received


def test_a_command_receives_its_arguments(monkeypatch):
    assert run(monkeypatch, "draw", "--config", "x", "a=1") == ["--config", "x", "a=1"]
    assert run(monkeypatch, "phase1", "a=1") == ["phase1", "a=1"]  # it serves several commands


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--help"], 0), (["paint"], 2)])
def test_help_and_a_wrong_name_list_the_commands(arguments, code, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    output = capsys.readouterr()
    assert caught.value.code == code and all(name in output.out + output.err for name in COMMANDS)


def test_settings_may_stand_before_and_after_options(tmp_path):
    (tmp_path / "a.yaml").write_text("stage1: {steps: 5, name: file}\n")
    parser = command_parser("python -m room draw", "Draw.", config="required")
    parser.add_argument("--out", default="")
    arguments = ["steps=7", "--config", str(tmp_path / "a.yaml"), "--out", "x", "name=a b"]
    config, options = read_config(Config, parser, section="stage1", arguments=arguments)
    assert config == Config(steps=7, name="a b") and options.out == "x"
    with pytest.raises(UserError, match="stage2"):
        read_config(Config, parser, section="stage2", arguments=arguments)


def test_shared_settings_of_other_phases_are_skipped(tmp_path):
    (tmp_path / "a.yaml").write_text("stage1: {steps: 5}\n")
    parser = command_parser("python -m room draw", "Draw.", config="required")
    arguments = ["--config", str(tmp_path / "a.yaml"), "stage1.name=a", "stage2.name=b", "name.b=2", "loop.x=1"]
    config, _ = read_config(Config, parser, section="stage1", arguments=[*arguments, "--shared"])
    assert config == Config(steps=5, name="a")
    with pytest.raises(UserError, match=r"stage1\.name"):
        read_config(Config, parser, section="stage1", arguments=arguments)


def test_a_name_is_an_experiment_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml", "configs/demo.yaml"):
        assert commands.find_config(name) == ROOT / "configs" / "demo.yaml"
    (tmp_path / "demo.yaml").touch()
    assert commands.find_config("demo.yaml") == Path("demo.yaml")  # an existing path comes first
    assert commands.find_config("folder/nowhere.yaml") == Path("folder/nowhere.yaml")
    with pytest.raises(UserError, match=r"'paper'.*demo, .*um3_llama3_1b"):  # an old name
        commands.find_config("paper")
