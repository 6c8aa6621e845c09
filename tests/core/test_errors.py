"""Exit codes and last lines of commands, in separate processes."""

import errno

import pytest

from tests.helpers.processes import run_python
from um3.core.errors import EXIT_LOST_RANK, LAUNCHER, make_command, system_problem


def run(body, **environment):
    """Run `body` as the main of a command."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    program = (
        f"import os, signal, sys\nfrom um3.core.errors import *\ndef main():\n{lines}\nrun_main(main)\nprint('end')"
    )
    return run_python(program, PYTHONUNBUFFERED="", **environment)


def test_success_returns_to_the_caller():
    result = run("print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\nend\n", "")


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_users_mistake_is_one_line_and_exit_code_2(world_size):
    result = run("print('begun')\nraise UserError('no such thing; make one')", WORLD_SIZE=world_size)
    assert (result.returncode, result.stderr) == (2, "error: no such thing; make one\n")
    assert result.stdout == "begun\n"  # printed lines survive the exit without teardown


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({"CONFIG": "demo", "RUN": "runs/demo"}, "make um3"),
        ({"CONFIG": "/my configs/a b.yaml", "RUN": "runs/a-b"}, "make um3 CONFIG='/my configs/a b.yaml'"),
        ({"CONFIG": "qlip_b8", "RUN": "runs/x", "NPROC": "1"}, "make um3 CONFIG=qlip_b8 RUN=runs/x NPROC=1"),
        ({"RUN": "runs/x", "TEXT": "a.txt", "DATA": ""}, "make um3 RUN=runs/x TEXT=a.txt"),
    ],
)
def test_a_next_command_has_the_variables_of_this_one(variables, command, monkeypatch):
    for name in ("CONFIG", "RUN", "NPROC", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert make_command("make um3", also=["TEXT", "DATA"]) == "make um3"  # not started by make
    monkeypatch.setenv("MAKELEVEL", "1")
    assert make_command("make um3", also=["TEXT", "DATA"]) == command


def test_the_remedy_of_a_mistake_is_a_whole_command():
    body = "raise UserError('no codes; run make codes first, or `make um3-init` again to make one')"
    result = run(body, MAKELEVEL="1", CONFIG="demo", RUN="/a b", NPROC="", DATA="mine", QLIP="/a b/stage2/model")
    variables = "RUN='/a b' DATA=mine"
    expected = f"no codes; run make codes {variables} first, or `make um3-init {variables}` again to make one"
    assert result.stderr == f"error: {expected}\n"


def test_one_of_several_processes_leaves_without_teardown():
    """An orderly exit would wait in its teardown for ranks that wait for this one."""
    body = "import atexit\natexit.register(print, 'teardown')\nraise UserError('x')"
    assert run(body).stdout == "teardown\n"
    assert run(body, WORLD_SIZE="2").stdout == ""


@pytest.mark.parametrize(("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_removes_partial_files_and_is_one_line(number, code, word, tmp_path):
    body = f"""from um3.core.files import atomic_file
with atomic_file({str(tmp_path / "whole.txt")!r}) as partial:
    partial.write_text("half")
    signal.raise_signal(signal.{number})"""
    result = run(body)
    assert result.returncode == code and result.stderr.startswith(word) and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] and "end" not in result.stdout


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (OSError(errno.ENOSPC, "full", "runs/x.parquet"), ["runs/x.parquet", "No space left", "free space"]),
        (OSError(errno.EDQUOT, "full"), ["quota"]),
        (ValueError(FULL), ["No space left", "free space"]),
        (PermissionError(errno.EACCES, "", b"runs/\xff"), ["runs/", "Permission denied", "permissions"]),
        (OSError(errno.EROFS, "", "x"), ["x: Read-only", "another path"]),
        (OSError(errno.EIO, "", "x"), ["x: Input/output error", "disk"]),
        (OSError(errno.ENAMETOOLONG, "", "x"), ["shorter"]),
        (NotADirectoryError(errno.ENOTDIR, "", "x"), ["x: Not a directory", "another path"]),
        (OSError(errno.ELOOP, "", "x"), ["x: Too many levels", "check the path"]),
        (MemoryError(), ["Cannot allocate memory", "smaller batches"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["smaller batches"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ["smaller batches"]),
    ],
)
def test_a_refusal_of_the_system_names_the_path_and_a_remedy(error, names):
    assert all(name in system_problem(error) for name in names)


@pytest.mark.parametrize("error", [ValueError("28"), OSError("no number"), KeyError("x")])
def test_other_errors_are_bugs(error):
    assert system_problem(error) == ""


@pytest.mark.parametrize(
    "body", ["open('/proc/1/mem/x', 'w')", "open('/dev/null/x', 'w')", "raise MemoryError", "open('a' * 300, 'w')"]
)
def test_a_refusal_is_one_line_and_exit_code_2(body):
    result = run(body)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    result = run("raise KeyError('x')")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize(("launcher", "lines"), [({}, 1), ({LAUNCHER: "1"}, 0)])
def test_a_lost_rank_is_one_line_unless_the_launcher_reports_it(launcher, lines):
    body = "raise RuntimeError('[/third_party/gloo/transport/tcp/pair.cc:1] Connection closed by peer')"
    result = run(body, WORLD_SIZE="2", **launcher)
    assert result.returncode == EXIT_LOST_RANK and result.stderr.count("\n") == lines
    assert run(body).returncode == 1  # a single process has lost nobody


def test_a_message_cannot_forge_lines_or_move_the_cursor():
    assert run("raise UserError('no a\\nb \\x1b[31m \\udcff')").stderr == "error: no a\\nb \\x1b[31m \\udcff\n"
