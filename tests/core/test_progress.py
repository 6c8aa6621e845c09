"""The progress line: its figures, its times, and who prints it."""

import io
import sys

import pytest

from tests.helpers.processes import run_python
from um3.core import progress
from um3.core.progress import Progress, format_seconds, peak_memory_gib, quiet_progress, track


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.9, "0:09"), (75.2, "1:15"), (3599, "59:59"), (3675, "1:01:15")]
)
def test_seconds_read_as_a_clock(seconds, text):
    assert format_seconds(seconds) == text


def test_a_log_gets_sparse_lines_and_always_the_last(capsys, monkeypatch):
    shown = Progress(50, label="codes", unit="images")
    for index in range(50):
        shown.advance(note=f"loss {index}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("codes 50/50 · ") and "images/s · took 0:0" in line and line.endswith("GiB · loss 49")
    monkeypatch.setattr(progress, "LOG_EVERY_S", -1.0)
    shown = Progress(3, label="x")
    shown.advance(2, note="kept")
    shown.advance()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("x 2/3 · ") and " left · " in first
    assert second.startswith("x 3/3 · ") and second.endswith("kept")


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "LIVE_EVERY_S", -1.0)
    assert list(track("abc", total=3, label="x")) == ["a", "b", "c"]
    text = terminal.getvalue()
    assert text.count("\r") == 3 and text.count("\n") == 1 and text.endswith("\n")


def test_items_of_an_earlier_run_count_to_the_share_not_to_the_rate(monkeypatch):
    shown = Progress(1000, label="x", start=900)
    monkeypatch.setattr(progress.time, "monotonic", lambda: shown.began + 2.0)
    shown.advance(10)
    assert shown.done == 910 and shown.rate() == 5.0


def test_steps_of_a_longer_loop_are_silent(capsys):
    outer = Progress(1, label="outer")
    with quiet_progress():
        list(track(range(3), total=3, label="inner"))
    outer.advance()
    assert "inner" not in (shown := capsys.readouterr().err) and "outer 1/1" in shown


def test_only_rank_0_prints_and_memory_is_that_of_its_process():
    held = bytearray(300 * 2**20)  # memory of the parent process
    program = "from um3.core.progress import *; print(sum(track(range(4), total=4, label='x')), peak_memory_gib())"
    for rank, lines in (("0", 1), ("1", 0)):
        result = run_python(program, RANK=rank)
        total, memory_gib = result.stdout.split()
        assert total == "6" and len(result.stderr.splitlines()) == lines
        assert 0.005 < float(memory_gib) < 0.2 < peak_memory_gib() and len(held) > 0
