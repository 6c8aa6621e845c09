"""Exit codes and last lines of commands, in separate processes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from um3.core.errors import is_disk_full


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `body` as the main of a command."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    program = (
        f"import os, signal, sys\nfrom um3.core.errors import *\ndef main():\n{lines}\nrun_main(main)\nprint('end')"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
    )  # fmt: skip


def test_success_returns_to_the_caller() -> None:
    result = run("print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\nend\n", "")


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_users_mistake_is_one_line_and_exit_code_2(world_size: str) -> None:
    result = run("print('begun')\nraise UserError('no such thing; make one')", WORLD_SIZE=world_size)
    assert (result.returncode, result.stderr) == (2, "error: no such thing; make one\n")
    assert result.stdout == "begun\n"  # printed lines survive the exit without teardown


def test_one_of_several_processes_leaves_without_teardown() -> None:
    """An orderly exit would wait in its teardown for ranks that wait for this one."""
    body = "import atexit\natexit.register(print, 'teardown')\nraise UserError('x')"
    assert run(body).stdout == "teardown\n"
    assert run(body, WORLD_SIZE="2").stdout == ""


@pytest.mark.parametrize(("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_removes_partial_files_and_is_one_line(number: str, code: int, word: str, tmp_path: Path) -> None:
    body = f"""from um3.core.files import atomic_file
with atomic_file({str(tmp_path / "whole.txt")!r}) as partial:
    partial.write_text("half")
    signal.raise_signal(signal.{number})"""
    result = run(body)
    assert result.returncode == code and result.stderr.startswith(word) and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] and "end" not in result.stdout


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("raise OSError(28, 'No space left on device', 'runs/demo/x.parquet')", "runs/demo/x.parquet"),
        (f"from safetensors import SafetensorError\nraise SafetensorError({FULL!r})", ""),
        ("with open('/dev/full', 'w') as file:\n    file.write('x')", ""),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_2(body: str, name: str) -> None:
    if "/dev/full" in body and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    result = run(body)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and name in result.stderr
    assert result.stderr.startswith("error: the disk is full")


def test_other_errors_keep_their_traceback() -> None:
    result = run("raise PermissionError(13, 'Permission denied', 'x')")
    assert result.returncode == 1 and "Traceback" in result.stderr and "Permission denied" in result.stderr


def test_which_errors_mean_a_full_disk() -> None:
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_disk_full(RuntimeError(f"I/O error (os error {errno.ENOSPC})"))
    assert not is_disk_full(OSError(errno.EACCES, f"(os error {errno.ENOSPC})"))
    assert not is_disk_full(ValueError("28"))


def test_ctrl_c_from_outside_stops_a_waiting_command() -> None:
    program = (
        "import time\nfrom um3.core.errors import run_main\n"
        "def main():\n    print('ready', flush=True)\n    time.sleep(60)\nrun_main(main)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read().startswith("interrupted: ")
