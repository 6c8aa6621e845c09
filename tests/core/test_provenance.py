"""Where a number comes from: the commit, with a mark for changes, and the versions."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.processes import ROOT
from um3.core.provenance import machine, versions


def commit_in(folder: Path) -> str:
    """`commit()` as a copy of the package in `folder` gives it."""
    program = "from um3.core.provenance import commit; print(commit())"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_tells_whether_the_tree_was_changed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "um3", tmp_path / "um3", ignore=shutil.ignore_patterns("__pycache__"))
    assert commit_in(tmp_path) == "unknown"
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    clean = commit_in(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "new.txt").touch()
    assert commit_in(tmp_path) == f"{clean}+changes"


def test_versions_and_machine_are_named() -> None:
    found = versions()
    assert found["torch"] == torch.__version__ and found["python"].startswith("3.")
    assert "absent" not in found.values()
    cores = machine()["cpu_cores"]
    assert isinstance(cores, int) and cores >= 1
