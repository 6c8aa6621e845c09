"""Tiny runs of the real phases: the demo's configs with smaller numbers, in this process or in others."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from train.__main__ import main
from um3.core.metrics import read_metrics

ROOT = Path(__file__).parents[2]
COMMON = ["loop.num_threads=1", "loop.batch_size=8", "loop.log_every_steps=1", "loop.save_every_steps=2"]
TINY = {
    "stage1": [
        *COMMON,
        "loop.max_steps=4",
        "optimizer.warmup_steps=1",
        *(
            f"model.{key}"
            for key in ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=48", "projection_dim=24")
        ),
        *(
            f"text.{key}"
            for key in ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=48", "vocab_size=300")
        ),
        "data.sources=[{name: scenes, kind: scenes, length: 200}]",
    ],
    "stage2": [
        *COMMON,
        "loop.max_steps=4",
        "optimizer.warmup_steps=1",
        "loss.adversarial_start_step=1",
        "discriminator.channels=8",
        "data.sources=[{name: scenes, kind: scenes, length: 200}]",
    ],
    "um3": [
        *COMMON,
        "loop.max_steps=4",
        "optimizer.warmup_steps=1",
        "text_validation.every_steps=0",  # has tests of its own
        "optimizer.kind=adamw",  # the demo's Muon fits fewer engines; its own tests ask for it
        *(f"model.{key}" for key in ("hidden_size=32", "num_layers=1", "num_heads=2", "num_kv_heads=2", "head_dim=16")),
        "model.intermediate_size=48",
        *(f"vocabulary.{key}" for key in ("text_vocab_size=320", "subtokens=2", "bits_per_subtoken=6")),
    ],
}
PhaseArguments = Callable[..., list[str]]


def arguments(phase: str, folder: Path, *overrides: str) -> list[str]:
    """Command line of a tiny `phase` in `folder`/PHASE, taking earlier phases from `folder`."""
    made_from = {
        "stage1": [],
        "stage2": [f"init_from={folder}/stage1/model"],
        "um3": [f"visual_tokenizer={folder}/stage2/model", f"data.codes={folder}/codes"],
    }[phase]
    config = ["--config", str(ROOT / f"configs/demo/{phase}.yaml")]
    return [phase, *config, f"loop.output_dir={folder}/{phase}", *TINY[phase], *made_from, *overrides]


def run_here(monkeypatch: pytest.MonkeyPatch, command: Sequence[str]) -> None:
    """Run `python -m train` with this command line inside the test's process."""
    monkeypatch.setattr(sys, "argv", ["train", *command])
    main()


def environment() -> dict[str, str]:
    """This process's environment without what makes it a rank of a process group."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"OMP_NUM_THREADS": "1"}


def run_apart(command: Sequence[str], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `python -m train` (or torchrun) as a user would, in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "train", *command],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    """The loss of every logged step."""
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tiny stage 1, stage 2 and codes, made by the real commands."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, arguments("stage1", folder))
        run_here(patch, arguments("stage2", folder))
    from data_mix.codes.encode import main as encode

    encode([
        "--config", str(ROOT / "configs/demo.yaml"), f"visual_tokenizer={folder}/stage2/model", f"output_dir={folder}/codes",
        "images=[{name: scenes, kind: scenes, length: 64}]", "num_threads=1",
    ])  # fmt: skip
    return folder
