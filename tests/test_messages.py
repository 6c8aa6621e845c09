"""Every remedy that a message names exists: make targets and variables, commands, flags, config keys.

The product is read as source code: a message is any string with a space, except docstrings and HTML. In an
f-string `{...}` stands for a value. Config keys are the fields of the classes named `...Config`, alone or nested.
"""

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from tests.helpers.processes import ROOT
from um3.cli import app
from um3.core.config import SECTIONS

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
MAKE_VARIABLES = set(re.findall(r"^([A-Z0-9_]+) *\?=", MAKEFILE, re.MULTILINE)) | {"PYTHON", "CONFIG"}
ROOMS = [path.parent.name for path in sorted(ROOT.glob("*/__init__.py")) if path.parent.name != "tests"]
FILE_SUFFIXES = re.compile(r"\.(bin|csv|html|jsonl?|md|npz|parquet|pt|py|safetensors|tsv|txt|yaml)$")
ENGLISH_AFTER_MAKE = {"a", "an", "another", "it", "one", "sure", "the", "them", "up"}
ALLOWED = {
    "--model": "also an option of lm-eval's command line, to which `python -m eval lm` passes it",
    "--model_args": "option of lm-eval's command line",
    "--tasks": "option of lm-eval's command line",
    "--nproc-per-node": "option of torchrun",
    "n": "the number of samples in a printed score",
    "system": "a variable of LLaVA's chat template",
    "attribute": "an argument of a filter in LLaVA's chat template",
    "vision_feature_select_strategy": "option of a LLaVA's config.json",
    "use_sliding_window": "option of a language model's config.json",
    "--output_format": "option of img2dataset, which writes WebDataset shards",
    "HF_HUB_OFFLINE": "environment variable of huggingface_hub",
    "LM_EVAL_DATA": "environment variable that eval.config reads",
}
PYTHON_APIS = ("um3", "tokenizer")  # their messages also name parameters of functions
LENIENT_CONFIGS = {"PreviewConfig"}  # reads a UM3Config's section, mostly as dictionaries


class Message(NamedTuple):
    """A string of the product; `names` are the parameters and fields that its file defines."""

    file: Path
    line: int
    text: str
    names: frozenset[str]


def text_of(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values)


@cache
def sources():
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def docstrings(tree):
    """The strings that stand alone: docstrings of modules, classes, functions and fields."""
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))


def messages_of(file, tree):
    nodes = list(ast.walk(tree))
    skipped = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    skipped |= set(docstrings(tree))
    names = {node.arg for node in nodes if isinstance(node, ast.arg | ast.keyword) and node.arg}
    names |= {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    for node in nodes:
        is_text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        if is_text and node not in skipped and " " in (text := text_of(node)) and not re.search(r"</?[a-z]", text):
            yield Message(file.relative_to(ROOT), node.lineno, text, frozenset(names))


@cache
def messages():
    return [message for file, tree in sources().items() for message in messages_of(file, tree)]


@cache
def schemas():
    """Fields of the config dataclasses: class -> field -> annotation; equal class names are united."""
    fields = {}
    for node in (node for tree in sources().values() for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name not in LENIENT_CONFIGS:
            annotated = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            names = {ast.unparse(item.target): ast.unparse(item.annotation) for item in annotated}
            fields[node.name] = fields.get(node.name, {}) | names
    return fields


def resolves(path, schema):
    """Whether `path` leads from `schema` to one of its fields; keys of a dictionary are free."""
    annotation = schemas()[schema].get(path[0])
    if annotation is None or len(path) == 1 or "dict[" in annotation:
        return annotation is not None
    return any(resolves(path[1:], name) for name in re.findall(r"\w+", annotation) if name in schemas())


def is_key(dotted):
    path = dotted.split(".")
    path = path[1:] if path[0] in SECTIONS and len(path) > 1 else path
    return any(resolves(path, schema) for schema in schemas())


@cache
def key_names():
    return {name for fields in schemas().values() for name in fields}


@cache
def flags(room):
    """The options of the room's parsers, and of the helper that builds them."""
    options = {"--help"}
    for file, tree in sources().items():
        if file.relative_to(ROOT).parts[0] == room or file.name == "commands.py":
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            arguments = [call.args for call in calls if ast.unparse(call.func).endswith(".add_argument")]
            options |= {option.value for args in arguments for option in args if isinstance(option, ast.Constant)}
            if any(isinstance(option, ast.JoinedStr) for args in arguments for option in args):  # f"--{name}"
                options |= {f"--{node.value}" for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    if room == "um3":
        command = typer.main.get_command(app)
        parameters = [parameter for sub_command in command.commands.values() for parameter in sub_command.params]
        options |= {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    return options


def is_module(dotted):
    path = ROOT.joinpath(*dotted.split(".")[:2])
    return path.is_dir() or path.with_suffix(".py").exists()


def unknown(message):
    """What the message names and the product lacks."""
    text, room = message.text, message.file.parts[0]
    targets = re.findall(r"\bmake ([a-z][\w-]*)", text)
    named = [(f"make {name}", name in TARGETS | ENGLISH_AFTER_MAKE) for name in targets]
    named += [(name, name in MAKE_VARIABLES) for name in re.findall(r"(?<![\w.$-])([A-Z][A-Z0-9_]+)=", text)]
    named += [(name, name in flags(room)) for name in re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]*)", text)]
    for module, command in re.findall(r"python -m ([a-z_]+) ([a-z0-9-]+)", text):
        exists = module not in ROOMS or command in importlib.import_module(f"{module}.__main__").COMMANDS
        named.append((f"python -m {module} {command}", exists))
    for dotted in re.findall(r"(?<![\w./{}-])([a-z_]\w*(?:\.[a-z_]\w*)+)(?![\w./({])", text):
        is_setting = dotted.split(".")[0] in key_names() and not FILE_SUFFIXES.search(dotted)
        named.append((dotted, is_key(dotted) or is_module(dotted) or not is_setting))
    settings = re.findall(r"(?<![\w.&?{}-])([a-z]\w*)=(?![=<>])", text)
    settings += re.findall(r"\b(?:set|change|lower|raise) ([a-z]+_\w+|qlip|(?!it )[a-z]+(?= to ))\b", text)
    known = key_names() | (message.names if room in PYTHON_APIS else set())
    named += [(name, name in known) for name in settings]
    return [name for name, exists in named if not exists and name not in ALLOWED]


def test_messages_are_found():
    assert len(messages()) > 400 and len(TARGETS) > 20
    assert is_key("data.mix.start") and is_key("stage1.loop.max_steps") and is_key("optimizer.module_lr.a")
    assert not is_key("model.slots") and not is_key("loop.total_steps")


@pytest.mark.parametrize("room", ROOMS)
def test_every_remedy_exists(room):
    in_room = [message for message in messages() if message.file.parts[0] == room]
    wrong = {f"{message.file}:{message.line}": unknown(message) for message in in_room}
    assert [(place, names) for place, names in wrong.items() if names] == []


def test_the_faq_quotes_messages_and_names_remedies_that_exist():
    page = (ROOT / "docs/faq.md").read_text()
    texts = [message.text for message in messages()]
    quoted = re.findall(r"^\*\*`(.+?)`\*\*", page, re.MULTILINE)
    patterns = {text: ".*".join(map(re.escape, text.split("..."))) for text in quoted}
    assert len(patterns) >= 20
    assert [text for text, pattern in patterns.items() if not any(re.search(pattern, said) for said in texts)] == []
    assert unknown(Message(Path("train/faq.md"), 1, page, frozenset())) == []


def empty_remedies(tree):
    """Lines of errors that end in a computed remedy, which may be empty, instead of words."""
    errors = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError"]
    texts = [part for error in errors for part in error.args[:1] if isinstance(part, ast.JoinedStr)]
    computed = [
        text for text in texts if text_of(text).endswith("; {...}") and isinstance(text.values[-1].value, ast.Call)
    ]
    return [text.lineno for text in computed]


def test_no_remedy_can_be_empty():
    found = {str(file.relative_to(ROOT)): lines for file, tree in sources().items() if (lines := empty_remedies(tree))}
    assert found == {}
    assert empty_remedies(ast.parse("raise UserError(f'only {n} images; {skipped.note()}')")) == [1]
    assert empty_remedies(ast.parse("raise UserError(f'only {n} images; {skipped.note() or 1}')")) == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_make_target_in_a_docstring_exists(room):
    trees = [tree for file, tree in sources().items() if file.relative_to(ROOT).parts[0] == room]
    texts = [str(node.value) for tree in trees for node in docstrings(tree) if isinstance(node, ast.Constant)]
    words = " ".join(re.findall(r"`make ([^`]*)`", "\n".join(texts))).split()
    assert {word for word in words if "=" not in word} <= TARGETS


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run make stage9 first", ["make stage9"]),
        ("make it smaller, or use RUNN=folder", ["RUNN"]),
        ("change model.slots or data.seq_len", ["model.slots"]),
        ("set slots=2 or subtokens=2", ["slots"]),
        ("set qlip to a folder, or lower row_tokens", ["qlip", "row_tokens"]),
        ("give --confg FILE", ["--confg"]),
        ("run python -m train stage3", ["python -m train stage3"]),
        ("run make stage1 with RUN=x, see train.config and config.json, set loop.max_steps=3 --config FILE", []),
    ],
)
def test_the_checker_finds_what_does_not_exist(text, names):
    assert unknown(Message(Path("train/loop.py"), 1, text, frozenset())) == names
