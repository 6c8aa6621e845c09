"""The Makefile in a bare copy of the repository: its help, and what each target starts with which variables.

The copy's `.venv` counts as set up and holds one command, `python`, which is the Python of these tests.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE)
PHASES = ["stage1", "stage2", "codes", "um3", "eval", "report"]
"""What `make demo` runs, in this order."""
VARIABLES = ("CONFIG", "RUN", "NPROC", "DATA", "TEXT", "BASE", "QLIP", "ARGS", "PYTHON", "MAKEFLAGS", "MAKELEVEL")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The files that make itself reads, and nothing that a setup would have made."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.fixture
def ready(bare: Path) -> Path:
    """The same, set up."""
    python = bare / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (bare / ".venv/.ready").touch()
    return bare


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=120
    )


def commands(folder: Path, *arguments: str, **environment: str) -> list[list[str]]:
    """What `make -n` would run, as the shell would split it; without the shell's own bookkeeping."""
    result = make(folder, "-n", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.replace("\\\n", " ").splitlines()
    split = [shlex.split(line) for line in lines]
    return [words for words in split if words and words[0] not in (":", "make", "gmake")]


def command(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The one command of a target."""
    (found,) = commands(folder, *arguments, **environment)
    return found


def test_help_lists_every_target_once_and_needs_no_setup(bare: Path) -> None:
    result = make(bare, "help")
    assert result.returncode == 0 and not result.stderr
    listed = re.findall(r"^  make (\S+) +\S.*$", result.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS) and len(TARGETS) > 10
    assert max(map(len, result.stdout.splitlines())) <= 120
    for variable in ("CONFIG=", "RUN=", "NPROC=", "DATA=", "TEXT=", "ARGS="):
        assert variable in result.stdout
    assert make(bare).stdout == result.stdout  # help is what a bare `make` does
    assert not (bare / ".venv").exists()


def test_every_target_is_phony_and_documented() -> None:
    rules = re.findall(r"^([a-z0-9-]+):(?!=)(.*)$", MAKEFILE, re.MULTILINE)
    assert sorted(name for name, _ in rules) == sorted(TARGETS)
    assert [name for name, rest in rules if not re.search(r"## \S", rest)] == []


def test_the_demo_runs_every_phase_in_order_in_one_folder(ready: Path) -> None:
    found = [" ".join(words) for words in commands(ready, "demo", "RUN=runs/mine")]
    patterns = [
        "-m train stage1",
        "-m train stage2",
        "-m data_mix encode",
        "-m train um3",
        "-m eval run",
        "-m eval report",
    ]
    assert len(found) == len(patterns) == len(PHASES)
    for line, pattern in zip(found, patterns, strict=True):
        assert re.search(pattern, line) and "runs/mine" in line and "runs/demo" not in line, line


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("stage1", ["loop.output_dir=R/stage1"]),
        ("stage2", ["loop.output_dir=R/stage2", "init_from=R/stage1/model"]),
        ("codes", ["visual_tokenizer=R/stage2/model", "output_dir=R/codes"]),
        ("um3", ["loop.output_dir=R/um3", "visual_tokenizer=R/stage2/model", "data.codes=R/codes"]),
        ("um3-init", ["output_dir=R/um3-init", "visual_tokenizer=R/stage2/model"]),
        ("um3-export", ["export", "R/um3/model", "--out", "R/um3-export"]),
        ("eval", ["run=R"]),
        ("report", ["--run", "R"]),
        ("coco-captions", ["model=R/um3/model", "output=R/eval/coco_captions.json"]),
        ("coco-generation", ["images=R/generated/coco-generation", "output=R/eval/coco_generation.json"]),
        ("geneval", ["images=R/generated/geneval", "output=R/eval/geneval.json"]),
        ("dpg", ["images=R/generated/dpg", "output=R/eval/dpg.json"]),
        ("sample", ["--model", "R/um3/model", "--out", "R/samples"]),
        ("serve", ["--model", "R/um3/model"]),
        ("mix-preview", ["--out", "R/mix.png"]),
    ],
)
def test_run_is_where_everything_goes_and_args_come_last(target: str, expected: list[str], ready: Path) -> None:
    words = command(ready, target, "RUN=R", "ARGS=loop.seed=3 name='a b'")
    assert words[-2:] == ["loop.seed=3", "name=a b"]
    start = words.index(expected[0])
    assert words[start : start + len(expected)] == expected or set(expected) <= set(words)
    assert command(ready, target, RUN="R", ARGS="loop.seed=3 name='a b'") == words  # from the environment too


@pytest.mark.parametrize("target", ["stage1", "stage2", "codes", "um3", "eval", "mix-preview"])
def test_config_names_the_experiment_and_its_run(target: str, ready: Path) -> None:
    def config_and_run(*arguments: str) -> tuple[str, str]:
        words = command(ready, target, *arguments)
        (run,) = {word for text in words for word in re.findall(r"runs/\w+", text)}
        return words[words.index("--config") + 1], run

    assert config_and_run() == ("demo", "runs/demo")
    assert config_and_run("CONFIG=qlip_b8") == ("qlip_b8", "runs/qlip_b8")
    assert config_and_run("CONFIG=/some/where.yaml") == ("/some/where.yaml", "runs/where")


@pytest.mark.parametrize(
    ("target", "data", "text"),
    [
        ("stage1", "data.sources=", ""),
        ("stage2", "data.sources=", ""),
        ("codes", "images=", ""),
        ("um3", "", "data.texts="),
        ("eval", "images=", "texts="),
    ],
)
def test_data_and_text_replace_the_configs_sources(target: str, data: str, text: str, ready: Path) -> None:
    plain = command(ready, target)
    given = command(ready, target, "DATA=/my photos", "TEXT=/my texts")
    expected = [f'{data}[{{name: data, path: "/my photos"}}]'] if data else []
    expected += [f'{text}[{{name: text, path: "/my texts"}}]'] if text else []
    assert [word for word in given if word not in plain] == expected
    assert [word for word in given if word in plain] == plain


def test_a_base_and_a_tokenizer_are_named_for_the_start(ready: Path) -> None:
    words = command(ready, "um3-init", "BASE=/my llama", "QLIP=/my qlip", "TEXT=/my text", "RUN=R", "ARGS=subtokens=4")
    assert words[1:5] == ["-m", "train", "um3-init", "output_dir=R/um3-init"]
    assert words[5:] == ["base_model=/my llama", "visual_tokenizer=/my qlip", "text=/my text", "subtokens=4"]


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("coco-generation", ["layout=flat"]),
        ("geneval", ["layout=geneval", "num_images=4"]),
        ("dpg", ["layout=grid", "num_images=4"]),
    ],
)
def test_images_are_generated_before_they_are_scored(target: str, settings: list[str], ready: Path) -> None:
    generated, scored = commands(
        ready, target, "RUN=R", "PROMPTS=/my list.txt", "GENERATE=seed=3", "MODEL=/a model", "ARGS=x=1"
    )
    folder = f"R/generated/{target}"
    assert generated[1:4] == ["-m", "eval", "generate-images"]
    assert generated[4:] == ["model=/a model", "prompts=/my list.txt", f"output_dir={folder}", *settings, "seed=3"]
    assert f"images={folder}" in scored and scored[-1] == "x=1"


def test_captions_of_another_model_need_none_of_ours(ready: Path) -> None:
    words = command(ready, "coco-captions", "RUN=R", "MODEL=", "REFERENCES=/my refs.json", "ARGS=captions=c.json")
    assert words[4:] == ["references=/my refs.json", "output=R/eval/coco_captions.json", "captions=c.json"]


def test_any_models_language_and_any_runs_are_compared(ready: Path) -> None:
    for model, place in (
        ("runs/demo/um3/model", "demo-um3-model"),
        ("org/Llama-1B", "org-Llama-1B"),
        ("/my/llama/", "my-llama"),
    ):
        words = command(ready, "eval-language", f"MODEL={model}", "TEXT=/my text", "ARGS=language.limit=5")
        assert words[1:5] == ["-m", "eval", "run", f"model={model}"]
        assert words[5:7] == [f"output_dir=runs/language/{place}/eval", "parts=[language]"]
        assert words[7:] == ['texts=[{name: text, path: "/my text"}]', "language.limit=5"]
    words = command(ready, "eval-language", "RUN=R")
    assert words[4:6] == ["model=R/um3/model", "output_dir=runs/language/R-um3-model/eval"]
    assert command(ready, "report", "RUNS=a b", "ARGS=")[4:] == ["--run", "a", "b"]


@pytest.mark.parametrize("target", ["stage1", "stage2", "um3"])
def test_nproc_is_the_number_of_training_processes(target: str, ready: Path) -> None:
    words = command(ready, target, "NPROC=3")
    assert words[:6] == [".venv/bin/python", "-m", "train", target, "--processes", "3"]
    default = command(ready, target)
    assert default[5] in ("1", "2") and default[:5] + default[6:] == words[:5] + words[6:]


def test_targets_that_train_nothing_take_no_processes(ready: Path) -> None:
    for target in ("codes", "eval", "report", "sample", "serve", "mix-preview"):
        assert command(ready, target, "NPROC=3") == command(ready, target)


def test_without_a_setup_a_target_sets_up_first(bare: Path) -> None:
    found = commands(bare, "stage1")
    assert any(words[1:] == ["-m", "venv", ".venv"] for words in found[:-1])
    assert "train" in found[-1] and "train" not in found[0]


def test_a_python_that_is_too_old_is_one_line(bare: Path) -> None:
    old = bare / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(bare, "setup", f"PYTHON={old}")
    assert result.returncode != 0 and "older than 3.11" in result.stdout + result.stderr
    assert not (bare / ".venv").exists()


@pytest.mark.parametrize("target", ["stage1", "stage2", "codes", "um3", "eval", "mix-preview", "demo"])
def test_an_unknown_config_is_one_clear_line(target: str, ready: Path) -> None:
    result = make(ready, target, "CONFIG=nowhere")
    assert result.returncode != 0 and not result.stdout
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("error: ") and "nowhere does not exist" in line and "CONFIG=" in line
    assert not (ready / "runs").exists()
