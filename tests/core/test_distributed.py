"""Ranks and collectives: in a single process without a launcher, and in two."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import run_on_ranks, run_python
from um3.core import distributed
from um3.core.distributed import barrier, is_main, make_once, rank, set_up_cpu, wait_for_main, world_size
from um3.core.errors import UserError
from um3.core.files import write_text

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collectives():
    """The results of every collective on this rank."""
    values = torch.tensor([1.0, 10.0]) * (rank() + 1)
    total = distributed.sum_over_ranks(values.requires_grad_())
    barrier()
    own = torch.full((1, 2), float(rank()), requires_grad=True)
    gathered = distributed.gather_with_gradient(own)
    (gathered * torch.tensor([1.0 + rank(), 5.0])).sum().backward()
    flags = [distributed.any_rank(False), distributed.any_rank(rank() == 1), distributed.any_rank(True)]
    path = Path(os.environ["SHARED_FOLDER"]) / "once.txt"
    make_once(path, lambda: write_text(path, f"by {rank()}"))
    make_once(path, lambda: write_text(path, "again"))
    sums = {"total": total.tolist(), "values": values.tolist(), "has_gradient": total.requires_grad}
    sums |= {"gathered": gathered.tolist(), "gradient": own.grad.tolist() if own.grad is not None else None}
    others = {"rank": [rank(), world_size(), is_main()], "flags": flags, "once": path.read_text()}
    return sums | others | {"mean": distributed.mean_over_ranks({"a": float(rank()), "b": 1.0})}


def test_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    expected = {"total": [1.0, 10.0], "values": [1.0, 10.0], "has_gradient": False, "gathered": [[0.0, 0.0]]}
    expected |= {"gradient": [[1.0, 5.0]], "mean": {"a": 0.0, "b": 1.0}, "rank": [0, 1, True]}
    assert collectives() == expected | {"flags": [False, False, True], "once": "by 0"}
    with pytest.raises(UserError, match="cannot see"):
        make_once(tmp_path / "absent", lambda: None)


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    first, second = run_on_ranks(collectives, folder=tmp_path)
    assert first.pop("rank") == [0, 2, True] and second.pop("rank") == [1, 2, False]
    assert first.pop("values") == [1.0, 10.0] and second.pop("values") == [2.0, 20.0]
    expected = {"total": [3.0, 30.0], "has_gradient": False, "gathered": [[0.0, 0.0], [1.0, 1.0]]}
    expected |= {"gradient": [[3.0, 10.0]]}
    assert first == second == expected | {"flags": [False, True, True], "mean": {"a": 0.5, "b": 1.0}, "once": "by 0"}


def a_slow_first_rank():
    """The waits that time out while rank 0 is busy for longer than the group's timeout."""
    timed_out = []
    for wait in (wait_for_main, barrier):
        torch.distributed.destroy_process_group()
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{os.environ['SHARED_FOLDER']}/{wait.__name__}", rank=int(os.environ["RANK"]),
            world_size=2, timeout=timedelta(seconds=2),
        )  # fmt: skip
        if is_main():
            time.sleep(4)
        try:
            wait()
        except RuntimeError:
            timed_out.append(wait.__name__)
    return timed_out


@pytest.mark.slow
def test_other_ranks_wait_for_long_work_of_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    _, second = run_on_ranks(a_slow_first_rank, folder=tmp_path)
    assert second == ["barrier"]


def fresh(program, **environment):
    """Output of a program in a new interpreter."""
    return run_python(f"import os, sys; from um3.core.distributed import *; {program}", **environment).stdout.strip()


def test_the_rank_is_known_without_torch():
    program = "print(rank(), world_size(), is_main(), 'torch' in sys.modules)"
    assert fresh(program) == "0 1 True False"
    assert fresh(program, RANK="3", WORLD_SIZE="4") == "3 4 False False"


def test_a_single_process_gets_the_launchers_variables():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    program = f"prepare_environment(); print(*(os.environ[name] for name in {names}))"
    first, port = fresh(program).rsplit(" ", 1)
    assert first == "0 1 0" and int(port) > 1023
    assert fresh(program, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_PORT="5") == "3 4 1 5"


@pytest.mark.parametrize(("processes", "asked", "threads"), [("1", 1, 1), ("1", 1000, CORES), (str(CORES), 2, 1)])
def test_threads_never_outnumber_the_cores(monkeypatch, processes, asked, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    before = torch.get_num_threads()
    try:
        set_up_cpu(asked)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
