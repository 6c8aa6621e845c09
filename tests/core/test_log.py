"""The log file of a run: what was logged, progress and errors, on lines of their own."""

import logging
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from um3.core.errors import UserError
from um3.core.log import log_file
from um3.core.progress import track

logger = logging.getLogger("train.loop")


def lines(path):
    """The lines without date and time."""
    return [line.split(" ", 2)[2] if line[:2] == "20" else line for line in path.read_text().splitlines()]


def test_it_holds_messages_progress_and_the_error_of_every_start(tmp_path):
    path = tmp_path / "stage1" / "train.log"
    with pytest.raises(UserError), log_file(path):
        logger.warning("a name\x1b[31m\nand a line")
        list(track(range(3), total=3, label="stage1", unit="steps"))
        raise UserError("no space left; free some")
    logger.warning("after it")
    with pytest.raises(ZeroDivisionError), log_file(path):
        raise ZeroDivisionError
    first, progress, error, *bug = lines(path)
    assert first == r"a name\x1b[31m\nand a line" and progress.startswith("stage1 3/3 · ")
    assert error == "error: no space left; free some"
    assert bug[:2] == ["error:", "Traceback (most recent call last):"] and bug[-1] == "ZeroDivisionError"


def test_a_full_disk_neither_stops_the_run_nor_fills_the_terminal(capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # an earlier test's may write to its closed stream
    with pytest.raises(UserError, match="the run's own"), log_file(Path("/dev/full")):
        logger.warning("a line")
        raise UserError("the run's own message")
    assert "Traceback" not in capfd.readouterr().err


def test_bars_of_libraries_do_not_fill_a_log(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # set by a command that an earlier test has called
    bar = "from tqdm import tqdm; list(tqdm(range(3)))"
    assert "3/3" in run_python(bar).stderr
    assert run_python(f"from um3.core.log import quiet_bars_in_logs; quiet_bars_in_logs(); {bar}").stderr == ""
