"""Extras, and the wheel in an empty environment: commands run outside the checkout, and configs are found by name."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, run_python
from um3.core.errors import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EVALUATION = [package for package, extra in EXTRAS.items() if extra == "eval"]
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


def module_run(name, *arguments):
    """A program that is `python -m NAME ARGUMENTS`."""
    return f"sys.argv = {['', *arguments]}; runpy.run_module('{name}', run_name='__main__')"


def names(requirements):
    """The normalised names of the distributions in a list of requirements."""
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_the_messages_name_the_extras_of_the_project():
    extras, distributions = PROJECT["optional-dependencies"], packages_distributions()
    assert set(EXTRAS.values()) == extras.keys() - {"dev", "docs"}
    for package, extra in EXTRAS.items():
        if package in distributions:  # wandb is in no set-up
            assert names(distributions[package]) & names(extras[extra])
    assert not names(PROJECT["dependencies"]) & set().union(*(names(extras[extra]) for extra in EXTRAS.values()))


@pytest.mark.parametrize(
    ("package", "program"),
    [
        ("starlette", module_run("um3", "serve", "--port", "0", "--no-open")),
        ("uvicorn", "import um3.web.server"),
        ("lm_eval", module_run("eval", "lm", "--help")),
        *((package, module_run("train", "settings", "--config", "demo")) for package in EVALUATION),
        ("tensorboard", "from um3.core.metrics import *; MetricsWriter(folder, views=['tensorboard'])"),
        ("wandb", "from um3.core.metrics import *; MetricsWriter(folder, views=['wandb'])"),
        ("ftfy", "from downstream.llamagen.captions import *; clean_caption('a cat')"),
        ("bs4", "from downstream.llamagen.captions import *; clean_caption('a cat')"),
    ],
)
def test_a_missing_extra_is_one_line(package, program, tmp_path):
    program = (
        f"import pathlib, runpy, sys; sys.modules['{package}'] = None; folder = pathlib.Path('{tmp_path}'); {program}"
    )
    result = run_python(f"from um3.core.errors import run_main\nrun_main(lambda: exec({program!r}, {{}}))")
    assert result.returncode == 2, result.stderr
    assert result.stderr == f'error: {package} is not installed; run pip install "um3[{EXTRAS[package]}]"\n'


def test_a_missing_package_of_another_kind_is_a_bug():
    result = run_python("from um3.core.errors import run_main\nrun_main(lambda: __import__('absent'))")
    assert result.returncode == 1 and "No module named 'absent'" in result.stderr


@pytest.mark.slow
def test_models_and_training_need_no_extra():
    """Every module imports without the extras, except the web page, lm-eval's model and what only a checkout has."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in ("um3", "tokenizer", "downstream", "data_mix", "eval", "train")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__main__.py"
    ]
    program = f"import importlib, sys\nsys.modules.update(dict.fromkeys({[*EXTRAS]}))\n"
    program += (
        f"for name in {modules}:\n  try: importlib.import_module(name)\n  except ModuleNotFoundError: print(name)"
    )
    result = run_python(program)
    assert result.returncode == 0, result.stderr
    failed = set(result.stdout.split())
    assert {name for name in failed if not name.startswith("um3.web.")} == {"eval.lm"}


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
