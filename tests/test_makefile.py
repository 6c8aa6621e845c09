"""The Makefile in a bare copy of the repository: its help, and what each target starts with which variables."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from eval.config import EvalConfig
from tests.helpers.image_files import write_folder
from tests.helpers.processes import ROOT
from tests.helpers.tiny_um3 import save_language_model
from train.settings.tokenizer import Stage1Config
from um3.cli import doors
from um3.core.config import load_config, save_config

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE)
VARIABLES = {*re.findall(r"^([A-Z]+) [?:]=", MAKEFILE, re.MULTILINE), "MAKEFLAGS", "MAKELEVEL"}
RECORDER = """import json, os, sys
with open("record.jsonl", "a") as file:
    file.write(json.dumps([sys.argv, dict(os.environ)]) + chr(10))
"""
ODD = (
    *("'", " ", "\\\\", '"', "[1]", "$HOME", "$(b)", "#", ": ", "{a}", "*", "é", "`a`", ";", "!", "%", "~", "&a"),
    "$${b}",
)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def bare(tmp_path):
    """The files that make itself reads, and nothing that a setup would have made."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.fixture
def ready(bare):
    """The same, set up, with commands that only record their arguments and environment."""
    (bare / ".venv/bin").mkdir(parents=True)
    (bare / ".venv/.ready").touch()
    for name in ("python", "um3"):
        (bare / ".venv/bin" / name).write_text(f"#!{sys.executable} -ES\n{RECORDER}")
        (bare / ".venv/bin" / name).chmod(0o755)
    return bare


def make(folder, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    options = {"capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(["make", *arguments], cwd=folder, env=inherited | environment, **options)


def records(folder, *arguments, **environment):
    """(arguments, environment) of the commands that make runs."""
    (folder / "record.jsonl").write_text("")
    result = make(folder, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


def commands(folder, *arguments, **environment):
    """Their arguments, with the values of the environment's variables."""
    return [
        [re.sub(r"\$\{oc\.env:(\w+)\}", lambda name, values=values: values[name[1]], word) for word in words]
        for words, values in records(folder, *arguments, **environment)
    ]


def command(folder, *arguments):
    """The one command of a target."""
    (found,) = commands(folder, *arguments)
    return found


def test_help_lists_every_target_once_and_needs_no_setup(bare):
    result = make(bare, "help")
    assert result.returncode == 0 and not result.stderr
    listed = re.findall(r"^  make (\S+) +\S.*$", result.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS) and len(TARGETS) > 10
    assert max(map(len, result.stdout.splitlines())) <= 120
    for variable in ("CONFIG=", "RUN=", "NPROC=", "DATA=", "TEXT=", "ARGS="):
        assert variable in result.stdout
    assert make(bare).stdout == result.stdout  # help is what a bare `make` does
    assert not (bare / ".venv").exists()


IMAGES, TEXTS = '[{name: data, path: "@"}]', '[{name: text, path: "@"}]'
SETTINGS = {  # target: variable, the words of its commands that hold it; those of RUN are in IN_RUN for most targets
    "stage1": {"DATA": f"data.sources={IMAGES}", "CONFIG": "@"},
    "stage2": {"DATA": f"data.sources={IMAGES}"},
    "codes": {"DATA": f"images={IMAGES}", "QLIP": "visual_tokenizer=@"},
    "um3": {"TEXT": f"data.texts={TEXTS}", "QLIP": "visual_tokenizer=@"},
    "um3-instruct": {"TEXT": f"data.texts={TEXTS}", "CONFIG": "@"},
    "llamagen": {"CONFIG": "@"},
    "llava-align": {"CONFIG": "@", "BASE": "language_model=@", "QLIP": "visual_tokenizer=@"},
    "llava-instruct": {"CONFIG": "@"},
    "um3-init": {
        "TEXT": f"data.texts={TEXTS}",
        "CONFIG": "@",
        "BASE": "base_model=@",
        "QLIP": "visual_tokenizer=@",
    },
    "um3-export": {"RUN": "@/um3/model|--out|@/um3-export"},
    "um3-gguf": {"RUN": "@/um3/model|--out|@/um3.gguf"},
    "eval": {
        "DATA": f"images={IMAGES}",
        "TEXT": f"texts={TEXTS}",
        "CONFIG": "@",
        "QLIP": 'tokenizer.stages={stage2: "@"}',
    },
    "eval-language": {"MODEL": "model=@", "OUT": "output_dir=@/eval", "TEXT": f"texts={TEXTS}"},
    "coco-captions": {"MODEL": "model=@", "REFERENCES": "references=@", "RUN": "output=@/eval/coco_captions.json"},
    "coco-generation": {"MODEL": "model=@", "PROMPTS": "prompts=@", "RUN": "images=@/generated/coco-generation"},
    "geneval": {"PROMPTS": "prompts=@", "RUN": "images=@/generated/geneval|output=@/eval/geneval.json"},
    "dpg": {"PROMPTS": "prompts=@", "RUN": "images=@/generated/dpg|output=@/eval/dpg.json"},
    "eval-vqa": {"DATA": "data=@", "MODEL": "model=@", "SET": "set=@"},
    "report": {"RUN": "@"},
    "ablation": {"NAME": "configs/ablations/@.yaml", "CONFIG": "@"},
    "balance": {"RUN": "@-weights", "CONFIG": "@"},
    "sample": {"RUN": "@/um3/model|--out|@/samples"},
    "serve": {"RUN": "@/um3/model"},
    "mix-preview": {"CONFIG": "@"},
    "questions": {"RUN": "output_dir=@/questions"},
    "plan": {"CONFIG": "@", "GPU": "@", "PHASE": "@", "BASE": "model.base_model=@"},
    "bench-training": {"CONFIG": "@"},
    "bench-memory": {"CONFIG": "@", "RUN": "@/benchmarks"},
    "bench-growth": {"CONFIG": "@", "RUN": "@/benchmarks"},
    "bench-um3": {"CONFIG": "@"},
}
TARGETS_OF = {"data_mix encode": "codes", "eval run": "eval"}
IN_RUN = {TARGETS_OF.get(line, line.split()[1]): words.split() for line, words in doors.IN_RUN.items()}
"""Target -> the words that `um3 COMMAND --run @` stands for."""


@pytest.mark.parametrize("target", SETTINGS)
def test_odd_names_pass_through_unchanged_and_args_come_last(target, ready):
    settings = {name: text.split("|") for name, text in SETTINGS[target].items()}
    if target in IN_RUN:
        settings["RUN"] = [word for word in IN_RUN[target] if "QLIP" not in settings or "visual_tokenizer" not in word]
    for shift in (0, 5, 11):
        names = {name: f"x{ODD[(shift + i) % len(ODD)]}{i}" for i, name in enumerate(settings)}
        given = [f"{name}={value}" for name, value in names.items()]
        arguments = "ARGS=loop.seed=3 name='a b'"
        for found in (commands(ready, target, *given, arguments), commands(ready, target, arguments, **names)):
            words = [word for command in found for word in command]
            expected = [word.replace("@", names[name]) for name, held in settings.items() for word in held]
            assert [word for word in expected if word not in words] == [] and words[-2:] == ["loop.seed=3", "name=a b"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_text_half_is_written_beside_the_phase_of_its_model(slash, ready):
    ((*_, model, _, out),) = commands(ready, "um3-export", f"MODEL=runs/a/um3-instruct/model{slash}")
    assert (model, out) == ("runs/a/um3-instruct/model", "runs/a/um3-instruct-export")


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_path_reaches_the_config(odd, ready, monkeypatch):
    def config_of(schema, target, *variables):
        ((words, values),) = records(ready, target, *variables)
        for name in ("DATA", "RUN", "QLIP"):
            monkeypatch.setenv(name, values[name])
        return load_config(schema, overrides=[word for word in words if "=" in word])

    config = config_of(Stage1Config, "stage1", f"DATA=d{odd}", f"RUN=r{odd}")
    assert config.data.sources[0].path == f"d{odd}" and config.loop.output_dir == f"r{odd}/stage1"
    save_config(config, ready / "config.yaml")
    assert load_config(Stage1Config, path=ready / "config.yaml") == config
    evaluation = config_of(EvalConfig, "eval", f"QLIP=q{odd}", "RUN=r")
    assert evaluation.tokenizer.stages == {"stage2": f"q{odd}"} and evaluation.run == "r"


@pytest.mark.slow
def test_the_recipe_of_one_gpu_runs_at_tiny_size(ready):
    """um3-init, codes, um3 and eval of configs/one_gpu.yaml, with LoRA, on a QLIP in the released layout."""
    (ready / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    save_language_model(ready / "base")
    write_folder(ready / "images")
    (ready / "prose.txt").write_text("\n\n".join(f"Paragraph {number} of the text. " * 40 for number in range(60)))
    variables = ["CONFIG=one_gpu", "RUN=r", "BASE=base", "DATA=images", "TEXT=prose.txt", "VAL_FRACTION=0.3", "NPROC=1"]
    settings = ["--shared", "loop.max_steps=2", "loop.batch_size=8", "loop.micro_batch_size=4", "data.seq_len=64"]
    settings += ["loop.log_every_steps=1", "data.num_sequences=2", "um3.lora.rank=2", "optimizer.warmup_steps=1"]
    settings += ["text_validation.every_steps=2", "text_validation.num_sequences=2", "loop.num_threads=1"]
    settings += ["evaluate_every_steps=1", "parts=[tokenizer,captions,generation]", "captions.num_images=2"]
    settings += ["captions.max_new_tokens=4", "generation.num_images=2", "tokenizer.num_images=12"]
    qlip = f"QLIP={ROOT}/tests/tokenizer/golden"
    targets = ("um3-init", "codes", "um3", "eval")
    result = make(ready, *targets, *variables, qlip, f"ARGS={shlex.join(settings)}", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-2000:]
    assert (ready / "r/um3/adapter/adapter_config.json").is_file()
    scores = json.loads((ready / "r/eval/tokenizer.json").read_text())["scores"]
    assert "data_reconstruction_stage2" in {score["task"] for score in scores}
    assert (ready / "r/eval/captions.json").is_file() and (ready / "r/eval/generation.json").is_file()


@pytest.mark.parametrize("run", ["runs/mine", "r'\"$HOME[1] #\\"])
def test_the_demo_runs_every_phase_in_order_in_one_folder(run, ready):
    """The phases of `um3 demo`."""
    for checked, *found in (commands(ready, "demo", f"RUN={run}"), commands(ready, "demo", RUN=run)):
        assert checked[1:] == ["-m", "train", "settings", "--config", "demo"]
        for words, pattern in zip(found, [*doors.DEMO, "eval report"], strict=True):
            line = " ".join(words)
            assert f"-m {pattern}" in line and run in line and "runs/demo" not in line, line


@pytest.mark.parametrize(("line", "target"), zip(doors.IN_RUN, IN_RUN, strict=True))
def test_the_um3_command_starts_what_the_target_starts(line, target, ready):
    words = command(ready, target, "RUN=R", "NPROC=1")
    expected = [word.replace("@", "R") for word in IN_RUN[target]]
    assert words[1:4] == ["-m", *line.split()] and [word for word in expected if word not in words] == []
    assert {word for word in words if "=R" in word} == {word for word in expected if "=R" in word}
    assert not any("tokenizer.stages" in word for word in words)  # without QLIP=, `eval` finds them in the run


def test_the_demo_gives_its_settings_to_every_phase_that_has_them(ready):
    given = ["CONFIG=demo", "DATA=d $x", "TEXT=t", "ARGS=loop.seed=3 'um3.loss.mode=a $$b'"]
    for found in (commands(ready, "demo", *given), commands(ready, "demo", *given[:3], ARGS=given[3][5:])):
        checked, *phases, report = found
        sources = ['[{name: data, path: "d $x"}]', '[{name: text, path: "t"}]']
        texts = [f"data.texts={sources[1]}", f"texts={sources[1]}"]
        images = [f"data.sources={sources[0]}", f"images={sources[0]}"]
        assert checked[6:-2] == [*images, *texts]
        assert [words[-3:] for words in phases] == [["loop.seed=3", "um3.loss.mode=a $b", "--shared"]] * 5
        assert checked[-2:] == phases[0][-3:-1] and "loop.seed=3" not in report
        assert [word for word in phases[0] if word.startswith("data.sources")] == images[:1]


@pytest.mark.parametrize("odd", ODD)
def test_the_demo_chooses_the_settings_for_own_images(odd, ready):
    given = [f"DATA=d{odd}", f"RUN=r{odd}", "MINUTES=15", "NPROC=2", "ARGS=loop.seed=3"]
    checked, chosen, *phases, report = commands(ready, "demo", *given)
    images = f'[{{name: data, path: "d{odd}"}}]'
    assert checked[5:] == ["own_images", f"data.sources={images}", f"images={images}", "loop.seed=3"]
    options = ["--config", "own_images", "--out", f"r{odd}/own_images.yaml", "--minutes", "15", "--processes", "2"]
    assert chosen[3:] == ["own-images", *options, "--sources", images, "loop.seed=3"]
    for words in phases:
        assert words[words.index("--config") + 1] == f"r{odd}/own_images.yaml"
        assert not any("sources=" in word or "images=" in word for word in words) and f"r{odd}" in report


@pytest.mark.parametrize("target", ["stage1", "stage2", "codes", "um3", "eval", "mix-preview"])
def test_config_names_the_experiment_and_its_run(target, ready):
    def config_and_run(*arguments):
        words = command(ready, target, *arguments)
        (run,) = {word for text in words for word in re.findall(r"runs/[\w-]+", text)}
        return words[words.index("--config") + 1], run

    assert config_and_run() == ("demo", "runs/demo")
    assert config_and_run("DATA=x") == ("own_images", "runs/own_images")
    assert config_and_run("CONFIG=qlip_b8") == ("qlip_b8", "runs/qlip_b8")
    assert config_and_run("CONFIG=/some/where.yaml") == ("/some/where.yaml", "runs/where")
    assert config_and_run("CONFIG=/my configs/a b.yaml") == ("/my configs/a b.yaml", "runs/a-b")


LAYOUTS = {"coco-generation": "flat", "geneval": "geneval num_images=4", "dpg": "grid num_images=4"}


@pytest.mark.parametrize("target", LAYOUTS)
def test_images_are_generated_before_they_are_scored(target, ready):
    settings = ("RUN=R", "PROMPTS=/my list.txt", "GENERATE=seed=3", "MODEL=/a model", "ARGS=x=1")
    generated, scored = commands(ready, target, *settings)
    words = ["model=/a model", "prompts=/my list.txt", f"output_dir=R/generated/{target}"]
    words += f"layout={LAYOUTS[target]} seed=3".split()
    assert generated[1:] == ["-m", "eval", "generate-images", *words]
    assert f"images=R/generated/{target}" in scored and scored[-1] == "x=1"


def test_captions_of_another_model_need_none_of_ours(ready):
    words = command(ready, "coco-captions", "RUN=R", "MODEL=", "REFERENCES=/my refs.json", "ARGS=captions=c.json")
    assert words[4:] == ["references=/my refs.json", "output=R/eval/coco_captions.json", "captions=c.json"]


def test_any_models_language_and_any_runs_are_compared(ready):
    places = {"runs/demo/um3/model": "demo-um3-model", "org/Llama-1B": "org-Llama-1B", "/my llama/": "my-llama"}
    for model, place in (places | {"R/um3/model": "R-um3-model"}).items():
        words = command(ready, "eval-language", "RUN=R" if model.startswith("R/") else f"MODEL={model}")
        expected = [f"model={model}", f"output_dir=runs/language/{place}/eval", "parts=[language]"]
        assert words[1:] == ["-m", "eval", "run", *expected]
    assert command(ready, "report", "RUNS=a b", "ARGS=")[4:] == ["--run", "a", "b"]


@pytest.mark.parametrize("target", ["stage1", "stage2", "um3", "um3-instruct", "llava-align", "llava-instruct"])
def test_nproc_is_the_number_of_training_processes(target, ready):
    words = command(ready, target, "NPROC=3")
    assert words[:6] == [".venv/bin/python", "-m", "train", target, "--processes", "3"]
    default = command(ready, target)
    assert default[5] in ("1", "2") and default[:5] + default[6:] == words[:5] + words[6:]


def test_targets_that_train_nothing_take_no_processes(ready):
    for target in ("codes", "eval", "report", "sample", "serve", "mix-preview"):
        assert command(ready, target, "NPROC=3") == command(ready, target)


def test_without_a_setup_a_target_sets_up_first(bare):
    lines = make(bare, "-n", "stage1").stdout.replace("\\\n", " ").splitlines()
    assert any(line.endswith("-m venv .venv") for line in lines[:-1])
    assert "train" in lines[-1] and "train" not in lines[0]


def test_a_python_that_is_too_old_is_one_line(bare):
    old = bare / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(bare, "setup", f"PYTHON={old}")
    assert result.returncode != 0 and "older than 3.11" in result.stdout + result.stderr
    assert not (bare / ".venv").exists()


UNKNOWN = ("CONFIG=nowhere", "called 'nowhere'.*CONFIG=")
OLD_KEY = ("ARGS=loop.total_steps=60", "unknown key 'loop.total_steps'; its new name is 'max_steps'")


@pytest.mark.parametrize(
    ("target", "variable", "message"),
    [
        ("demo", *OLD_KEY),
        *((target, *UNKNOWN) for target in ("stage1", "stage2", "codes", "um3", "eval", "mix-preview", "demo")),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_trains(target, variable, message, ready):
    (ready / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    result = make(ready, target, variable, PYTHONPATH=str(ROOT))
    assert result.returncode != 0 and not result.stdout and not (ready / "runs").exists()
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("error: ") and re.search(message, line)
