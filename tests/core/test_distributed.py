"""Ranks and collectives: in one process that was never launched, and in two."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.processes import ROOT, run_on_ranks
from um3.core.distributed import (
    any_rank,
    barrier,
    gather_with_gradient,
    is_main,
    rank,
    sum_over_ranks,
    wait_for_main,
    world_size,
)


def collectives() -> dict[str, Any]:
    """What this rank sees of every collective."""
    values = torch.tensor([1.0, 10.0]) * (rank() + 1)
    total = sum_over_ranks(values.requires_grad_())
    barrier()
    gathered = gather_with_gradient(torch.full((1, 2), float(rank())))
    flags = [any_rank(False), any_rank(rank() == 1), any_rank(True)]
    return {
        "rank": [rank(), world_size(), is_main()],
        "total": total.tolist(),
        "values": values.tolist(),
        "has_gradient": total.requires_grad,
        "gathered": gathered.tolist(),
        "flags": flags,
    }


def test_one_process() -> None:
    assert collectives() == {
        "rank": [0, 1, True],
        "total": [1.0, 10.0],
        "values": [1.0, 10.0],
        "has_gradient": False,
        "gathered": [[0.0, 0.0]],
        "flags": [False, False, True],
    }


def test_two_processes(tmp_path: Path) -> None:
    first, second = run_on_ranks(collectives, folder=tmp_path)
    assert first.pop("rank") == [0, 2, True] and second.pop("rank") == [1, 2, False]
    assert first.pop("values") == [1.0, 10.0] and second.pop("values") == [2.0, 20.0]
    expected = {"total": [3.0, 30.0], "has_gradient": False, "gathered": [[0.0, 0.0], [1.0, 1.0]]}
    assert first == second == expected | {"flags": [False, True, True]}


def a_slow_first_rank() -> list[str]:
    """Who gives up waiting for a first rank that is busy for longer than collectives may wait."""
    rendezvous = Path(os.environ["RENDEZVOUS"])
    gave_up = []
    for wait in (wait_for_main, barrier):
        torch.distributed.destroy_process_group()
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}-{wait.__name__}", rank=int(os.environ["RANK"]),
            world_size=2, timeout=timedelta(seconds=2),
        )  # fmt: skip
        if is_main():
            time.sleep(4)
        try:
            wait()
        except RuntimeError:
            gave_up.append(wait.__name__)
    return gave_up


def test_others_wait_for_what_the_first_rank_does_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENDEZVOUS", str(tmp_path / "own"))
    _, second = run_on_ranks(a_slow_first_rank, folder=tmp_path)
    assert second == ["barrier"]


def fresh(program: str, **environment: str) -> str:
    """Output of a program in an interpreter of its own, launched with just this of the launcher's variables."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def test_the_rank_is_known_before_torch_is() -> None:
    program = (
        "import sys; from um3.core.distributed import *; print(rank(), world_size(), is_main(), 'torch' in sys.modules)"
    )
    assert fresh(program) == "0 1 True False"
    assert fresh(program, RANK="3", WORLD_SIZE="4") == "3 4 False False"


def test_a_single_process_gets_the_launchers_variables() -> None:
    program = (
        "import os; from um3.core.distributed import prepare_environment; prepare_environment();"
        "print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT')))"
    )
    first, port = fresh(program).rsplit(" ", 1)
    assert first == "0 1 0" and int(port) > 1023
    launched = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "5"}
    assert fresh(program, **launched) == "3 4 1 5"
