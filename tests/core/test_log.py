"""Who speaks in the log: rank 0 from INFO, the others and other people's packages from WARNING."""

import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT

PROGRAM = """
import logging
from um3.core.log import setup_logging
setup_logging(); setup_logging()
for name in ("train.loop", "um3.core.metrics", "somebody.else"):
    logging.getLogger(name).info("%s info", name)
    logging.getLogger(name).warning("%s warning", name)
"""


@pytest.mark.parametrize(
    ("rank", "lines"),
    [
        ("0", ["train.loop info", "train.loop warning", "um3.core.metrics info", "um3.core.metrics warning"]),
        ("1", ["rank 1 train.loop warning", "rank 1 um3.core.metrics warning"]),
    ],
)
def test_levels_by_rank(rank: str, lines: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, env={**os.environ, "RANK": rank}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    other = "rank 1 somebody.else warning" if rank == "1" else "somebody.else warning"
    assert [line.partition(" ")[2] for line in result.stderr.splitlines()] == [*lines, other] and not result.stdout
