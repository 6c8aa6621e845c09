"""The commands and code of README.md and docs/ are true: Python runs, targets, commands and settings exist.

The notebook docs/own_images.ipynb runs from top to bottom, and is stored without outputs.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from fnmatch import fnmatch

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__
import data_mix.__main__
import eval.__main__
import train.__main__
from tests.downstream.llava.conftest import build, save
from tests.helpers.processes import ROOT
from tests.helpers.schemas import SCHEMAS, SECTIONS
from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import save_language_model, save_um3
from tests.test_configs import config_classes
from tests.test_messages import MAKE_VARIABLES, TARGETS
from um3.core.commands import find_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs/own_images.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
ROOMS = {"train": train, "data_mix": data_mix, "eval": eval, "benchmarks": benchmarks}
ENVIRONMENT = re.compile(r"^[A-Z_]+=\S+ ")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A folder with runs/demo/um3, a tiny UM3 with random weights whose visual tokenizer has a text tokenizer, and
    with runs/demo/llava-instruct."""
    root = tmp_path_factory.mktemp("docs")
    qlip = make_qlip(root / "qlip", image_size=16, patch_size=8, bits=28, captions=["a dog", "a boat"] * 9)
    save_um3(root / "runs/demo/um3", qlip_folder=qlip, scale=10.0, max_position_embeddings=256)
    llava = root / "runs/demo/llava-instruct/model"
    llava.mkdir(parents=True)
    save(llava, build((save_language_model(root / "language"), qlip)))
    return root


def blocks(page, language):
    """The fenced blocks of a language ("" for the shell) of a page."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def commands(page):
    """The words of every shell line, comments and continuation lines resolved."""
    lines = []
    for block in blocks(page, ""):
        block = re.sub(r"cat > .*?\nEND\n", "", block.replace("\\\n", " "), flags=re.DOTALL)
        for line in block.splitlines():
            lines += [part.strip() for part in re.split(r" && | \| ", line) if part.strip()]
    return [shlex.split(ENVIRONMENT.sub("", line), comments=True) for line in lines if not line.startswith("#")]


def ids(page):
    return str(page.relative_to(ROOT))


def keys_of(schema, *, prefix=""):
    """Every dotted key of a config dataclass."""
    keys = set()
    for name, hint in typing.get_type_hints(schema).items():
        keys.add(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys |= keys_of(hint, prefix=f"{prefix}{name}.")
    return keys


def settings(words):
    """The keys of the settings among words, and of those in ARGS= and GENERATE=."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("ARGS", "GENERATE"):
            found += settings(shlex.split(value))
        elif equals and re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", name):
            found.append(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_targets_commands_and_settings_exist(page):
    keys = set().union(*map(keys_of, SCHEMAS))
    for words in commands(page):
        if words[:1] == ["make"]:
            names = [word for word in words[1:] if "=" not in word]
            variables = {word.split("=")[0] for word in words[1:] if "=" in word}
            assert set(names) <= TARGETS and variables <= MAKE_VARIABLES, words
        module = next((n for n, word in enumerate(words, 1) if word in ("-m", "--module")), len(words) - 1)
        if words[module] in ROOMS:
            room, command = words[module : module + 2]
            assert command in ROOMS[room].__main__.COMMANDS, words
            if command == "lm":
                continue
        elif words[:1] != ["make"] and words[:1] != ["sbatch"]:
            continue
        assert [key for key in settings(words) if key not in keys] == [], words
        for word in words:
            if word.startswith("CONFIG=") and not word.endswith(".yaml"):
                assert find_config(word.removeprefix("CONFIG=")).is_file(), words


def test_the_dockerfile_names_what_exists():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if not line.startswith("#")]
    arguments = {text.partition("=")[0] for name, text in instructions if name == "ARG"}
    runs = [shlex.split(part) for name, text in instructions if name == "RUN" for part in text.split("&&")]
    runs += [json.loads(text) for name, text in instructions if name == "CMD"]
    targets = {words[1] for words in runs if words[0] == "make"}
    pinned = [words[words.index("-c") + 1] for words in runs if words[0].endswith("/pip")]
    assert targets == {"setup", "demo"} <= TARGETS and pinned == ["constraints.txt"]
    assert {word[1:] for words in runs for word in words if word.startswith("$")} == arguments
    for words in commands(ROOT / "docs/install.md"):
        if words[0] == "docker" and "--build-arg" in words:
            assert words[words.index("--build-arg") + 1].partition("=")[0] in arguments


def test_the_docker_image_has_every_file_of_the_repository():
    ignored = (ROOT / ".dockerignore").read_text().split()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if not any(listed):
        pytest.skip("not a checkout")
    assert [path for path in listed if any(fnmatch(part, rule) for part in path.split("/") for rule in ignored)] == []


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)|(?:src|srcset)=\"([^\":]+)\"", page.read_text()):
        path = next(filter(None, target))
        assert (page.parent / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=ids)
def test_python_runs(page, demo_run, tmp_path, monkeypatch):
    """Blocks of a page run one after the other; the tiny model stands for every model that a page names."""
    (tmp_path / "runs").symlink_to(demo_run / "runs")
    monkeypatch.chdir(tmp_path)
    names = {"images": np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)}
    for block in blocks(page, "python"):
        for hub_id in ("nvidia/QLIP-B-16-256", "path/or/hub-id"):
            block = block.replace(f'"{hub_id}"', repr(str(demo_run / "runs/demo/um3/model/qlip")))
        exec(compile(block, str(page), "exec"), names)


def test_the_settings_page_has_every_section_and_class():
    page = (ROOT / "docs/api/configuration.md").read_text()
    shown = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    classes = {part for schema in SECTIONS.values() for part in config_classes(schema)}
    names = {f"{part.__module__}.{part.__qualname__}" for part in classes}
    assert {name for name in names if not {name, name.rpartition(".")[0]} & shown} == set()
    for section, schema in SECTIONS.items():
        assert f"| `{section}` | [{schema.__qualname__}][{schema.__module__}.{schema.__qualname__}] |" in page


def test_the_notebook_is_stored_without_outputs():
    assert CELLS and [cell for cell in CELLS if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "notebook"}
    for number, cell in enumerate(CELLS):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert len(names["captions"]) == len(names["drawn"]) == 4 and all(names["captions"])


@pytest.mark.slow
def test_um3_lines_of_the_readme_run(demo_run, tmp_path):
    for folder in (tmp_path / "runs", tmp_path / "path/to/images"):
        folder.mkdir(parents=True)
    for run in ("demo", "mine"):
        (tmp_path / "runs" / run).symlink_to(demo_run / "runs/demo")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "path/to/images/1.png")
    lines = [words for words in commands(ROOT / "README.md") if words[:1] == [".venv/bin/um3"]]
    assert {words[1] for words in lines} == {"generate", "caption", "serve"}
    for words in lines:
        if words[1] != "serve":
            quoted = [word if "*" in word else shlex.quote(word) for word in [sys.executable, "-m", "um3", *words[1:]]]
            result = subprocess.run(" ".join(quoted), shell=True, cwd=tmp_path, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 4


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "api/pipeline/index.html").read_text().count("UM3Pipeline") > 5
