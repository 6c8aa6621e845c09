"""Tiny runs of the real phases: the demo's configs with smaller numbers, in this process or in others."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ROOT
from train.phase import main
from train.run_folder import result_files
from um3.core.metrics import read_metrics

COMMON = [
    *("loop.num_threads=1", "loop.batch_size=8", "loop.log_every_steps=1", "loop.save_every_steps=2"),
    *("loop.max_steps=4", "optimizer.warmup_steps=1", "engine.precision=fp32"),
]
TOWER = ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=48")
SCENES = "data.sources=[{name: scenes, kind: scenes, length: 200}]"
TINY = {
    "stage1": [
        *COMMON,
        SCENES,
        *(f"model.{setting}" for setting in (*TOWER, "projection_dim=24")),
        *(f"text.{setting}" for setting in (*TOWER, "vocab_size=300")),
    ],
    "stage2": [*COMMON, SCENES, "loss.adversarial_start_step=1", "discriminator.channels=8"],
    "um3": [
        *COMMON,
        "text_validation.every_steps=0",  # tests/train/recipes/test_text_validation.py
        "optimizer.kind=adamw",  # the demo's Muon fits fewer engines
        *(f"model.{setting}" for setting in (*TOWER, "num_kv_heads=2", "head_dim=16")),
        *(f"vocabulary.{setting}" for setting in ("text_vocab_size=320", "subtokens=2", "bits_per_subtoken=6")),
        *("vocabulary.conversations=[]", "image_sampling.temperature=0.8"),
    ],
    "um3-instruct": [
        *COMMON,
        *("data.seq_len=250", "data.text_seq_len=28", "optimizer.kind=adamw", "optimizer.lr=1e-2"),
        *("data.chat_share=0.5", "text_validation.every_steps=0"),
        "data.conversations=[{name: scenes, kind: scenes, length: 64}]",
    ],
    "llamagen": [*COMMON, *(f"model.{setting}" for setting in TOWER)],
}


def arguments(phase: str, folder: Path, *overrides: str) -> list[str]:
    """Command line of a tiny `phase` in `folder`/PHASE, which starts from earlier phases in `folder`."""
    inputs = {
        "stage1": [],
        "stage2": [f"init_from={folder}/stage1/model"],
        "um3": [f"visual_tokenizer={folder}/stage2/model", f"data.codes={folder}/codes"],
        "um3-instruct": [f"init_from={folder}/um3/model", f"data.codes={folder}/codes"],
        "llamagen": [f"visual_tokenizer={folder}/stage2/model", f"data.codes={folder}/codes"],
    }[phase]
    config = ["--config", str(ROOT / "configs/demo.yaml")]
    return [phase, *config, f"loop.output_dir={folder}/{phase}", *TINY[phase], *inputs, *overrides]


def encode_scenes(folder: Path, *settings: str) -> None:
    """Write the codes of 64 scenes to `folder`/codes."""
    from data_mix.codes.encode import main as encode

    images = "images=[{name: scenes, kind: scenes, length: 64}]"
    encode(["--config", "demo", f"output_dir={folder}/codes", images, "num_threads=1", *settings])


def train_here(phase: str, inputs: Path, folder: Path, *overrides: str) -> list[float]:
    """Train a tiny `phase` in `folder` inside this process, from the phases in `inputs`; returns its losses."""
    main(arguments(phase, inputs, f"loop.output_dir={folder}", *overrides))
    return losses(folder)


def copy_half(finished: Path, folder: Path) -> Path:
    """A copy of a finished run of four steps, as it was after two."""
    shutil.copytree(finished, folder)
    for name in ("done.json", "metrics.jsonl", "checkpoints/step-00000004", "model"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def check_resumed(
    command: Sequence[str], finished: Path, folder: Path, *, processes: int = 1, within: float = 1e-5
) -> None:
    """`command` resumes a copy of its `finished` run of four steps to the bit; several processes have its losses."""
    half = copy_half(finished, folder / "half")
    main([*command, f"loop.output_dir={half}"])
    assert losses(half) == losses(finished)[2:] and saved_weights(half) == saved_weights(finished)
    if processes > 1:
        train_apart([*command, f"loop.output_dir={folder}/apart"], processes=processes)
        assert losses(folder / "apart") == pytest.approx(losses(finished), abs=within)


def saved_weights(folder: Path) -> dict[str, str]:
    """A digest of every file of weights of a finished run's model."""
    return {name: digest for name, digest in result_files(folder).items() if name.endswith(".safetensors")}


def environment() -> dict[str, str]:
    """This process's environment without the variables that make it a rank of a process group."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"OMP_NUM_THREADS": "1"}


def train_apart(command: Sequence[str], *, processes: int = 1, launcher: Sequence[str] = ("-m", "train")) -> None:
    """Run `python -m train COMMAND` (with torchrun if there are several processes); it must succeed."""
    if processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher)
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, *launcher, *command], **options, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def losses(folder: Path) -> list[float]:
    """The loss of every logged step."""
    return logged(folder, "train/loss")


def logged(folder: Path, key: str) -> list[float]:
    """A metric of every logged step; None where a step does not have it."""
    return [row.get(key) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tiny stage 1, stage 2, codes and UM3, made by the real commands."""
    folder = tmp_path_factory.mktemp("made")
    for phase in ("stage1", "stage2"):
        main(arguments(phase, folder))
    encode_scenes(folder, f"visual_tokenizer={folder}/stage2/model")
    main(arguments("um3", folder))
    return folder


@pytest.fixture(scope="module")
def start(base, made, tmp_path_factory):
    """A UM3 made of the module's `base` for the codes of `made`."""
    out = tmp_path_factory.mktemp("run") / "um3-init"
    models = [f"base_model={base}", f"visual_tokenizer={made}/stage2/model", f"loop.output_dir={out}"]
    sizes = ["subtokens=2", "data.num_sequences=2", "data.seq_len=32", "loop.max_steps=1", "engine.precision=fp32"]
    main(["um3-init", "--config", "demo", *models, *sizes])
    return out / "model"
