"""The wheel, installed into an empty environment: commands run outside the checkout, and configs are found by name."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

TINY = ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=48")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment that holds the wheel, and sees this one's packages except UM3's checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path in a .pth file does not run the .pth files found there, such as that of the editable checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv/bin/python"


def run(python, *arguments, cwd):
    environment = {"HOME": str(cwd), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_commands_run_outside_the_checkout(python, tmp_path):
    where = run(python, "-c", "import um3, train, tokenizer; print(um3.__file__, train.__file__)", cwd=tmp_path)
    um3_file, train_file = map(Path, where.stdout.split())
    assert train_file.parents[1] == um3_file.parent / "_rooms"  # nothing of ours but um3/ lies at the top level
    for module in ("train", "data_mix", "eval", "um3"):
        result = run(python, "-m", module, "--help", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    sizes = [*(f"model.{key}" for key in TINY), *(f"text.{key}" for key in (*TINY, "vocab_size=300"))]
    scenes = "data.sources=[{name: scenes, kind: scenes, length: 64}]"
    steps = ["loop.max_steps=1", "loop.batch_size=4"]
    (tmp_path / "train.py").write_text("raise SystemExit('a file of the user')")
    stage1 = ["-m", "um3", "train", "stage1", "--config", "demo", "--run", "runs/demo", "--processes", "2"]
    result = run(python, *stage1, *sizes, scenes, *steps, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/demo/stage1/model/model.safetensors").is_file()


@pytest.mark.slow
def test_a_missing_model_is_one_line(python, tmp_path):
    result = run(python, "-m", "um3", "generate", "a red circle", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "runs/demo/um3/model" in result.stderr
