"""Runs a function in several processes with a gloo process group.

python -m tests.helpers.processes MODULE FUNCTION RENDEZVOUS    # one rank; RANK and WORLD_SIZE in the environment
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
"""Data for development beside the checkout; tests that use it skip where it is absent."""


def run_python(program: str, *, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter, which is no rank of a process group unless `environment` says so."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, env=inherited | environment, **options)


def run_on_ranks(function: Callable[[], Any], *, folder: Path, num_ranks: int = 2) -> list[Any]:
    """The results of `function` (of a test module, without arguments) on each rank; they must be JSON values."""
    module = "tests.helpers.processes"
    command = [sys.executable, "-m", module, function.__module__, function.__name__, f"{folder}/rendezvous"]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_ranks
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process holds the lock of `folder`, and is then killed."""
    code = "import sys\nfrom um3.core.files import folder_lock\n"
    code += "with folder_lock(sys.argv[1]): print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        yield
        process.kill()


def main() -> None:
    """One rank: join the group, run the function, print its result."""
    import torch

    module, function, rendezvous = sys.argv[1:]
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    result = getattr(importlib.import_module(module), function)()
    torch.distributed.destroy_process_group()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
