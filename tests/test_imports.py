"""The plan of the rooms, enforced: import direction, safe loading, docstrings, sizes of files and folders."""

import ast
import tomllib
from collections import Counter

import pytest

from tests.helpers.processes import ROOT, run_python

ROOMS = {
    "um3.core": (),
    "tokenizer": (),
    "um3": ("model", "inference"),
    "downstream": ("llamagen", "llava"),
    "um3.web": (),
    "um3.cli": (),
    "um3.__main__": (),
    "data_mix": ("demo", "sources", "codes", "batches"),
    "eval": ("metrics", "tasks", "vqa", "benchmarks", "report"),
    "train": ("settings", "recipes", "plan"),
}
"""Rooms and their sub-rooms, from left to right: a module imports its own sub-room and those before it.

Modules directly in a room (`data_mix.order`, `eval.run`) serve all its sub-rooms and may import any of them.
"""
PACKAGES = tuple(room for room in ROOMS if "." not in room)
FILES = sorted(path for room in PACKAGES for path in (ROOT / room).rglob("*.py"))
PRODUCT = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
MAX_FILES_PER_FOLDER, MAX_LINES_PER_FILE = 14, 400
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"read_pickle", "to_pickle", "unsafe_load", "full_load"}


def module_name(path):
    """`um3/core/files.py` -> `um3.core.files`; the name of a package has no `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    """The room of a module (the longest name that matches)."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def sub_room_of(module):
    room = room_of(module)
    name = module.removeprefix(f"{room}.").split(".")[0]
    return name if room is not None and name in ROOMS[room] else None


def points_right(importer, imported):
    """Whether an import is of a later room, or of a later sub-room of the same room."""
    here, there = room_of(importer), room_of(imported)
    order = tuple(ROOMS)
    if here is not None and here == there:
        order, here, there = ROOMS[here], sub_room_of(importer), sub_room_of(imported)
    return here is not None and there is not None and order.index(there) > order.index(here)


def imported_modules(tree, *, package):
    """(line, module) of every import, also in functions and under TYPE_CHECKING.

    `from a import b` counts as `a.b`, which is in the room of `a` unless `a.b` is a room itself. Relative imports
    start from `package`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            yield node.lineno, leading_text(node.args[0])


def leading_text(node):
    """The constant start of a string or f-string."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def called(node):
    """The last name of the called function: `torch.load(...)` -> `load`."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def wrong_imports(tree, *, module, package):
    assert room_of(module) is not None, f"{module} belongs to no room of {list(ROOMS)}"
    imports = imported_modules(tree, package=package)
    return [f"{line}: {module} imports {other}" for line, other in imports if points_right(module, other)]


def unsafe_loads(tree):
    """Calls that could run code from a file: pickle and the like, torch.load of more than tensors, remote code."""
    imports = imported_modules(tree, package="")
    unsafe = [f"{n}: imports {name}" for n, name in imports if name.split(".")[0] in PICKLERS or name == "torch.load"]
    for node in ast.walk(tree):
        keywords = {}
        if isinstance(node, ast.Dict):
            keywords = {leading_text(key): value for key, value in zip(node.keys, node.values, strict=True) if key}
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg or "**": keyword.value for keyword in node.keywords}
        if not is_constant(keywords.get("trust_remote_code"), False) and "trust_remote_code" in keywords:
            unsafe.append(f"{keywords['trust_remote_code'].lineno}: trust_remote_code")
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) == "torch.load" and not is_constant(keywords.get("weights_only"), True):
            unsafe.append(f"{node.lineno}: torch.load without weights_only=True")
        if not is_constant(keywords.get("allow_pickle"), False) and "allow_pickle" in keywords:
            unsafe.append(f"{node.lineno}: allow_pickle")
        if called(node) in PICKLING_CALLS or ast.unparse(node.func) == "yaml.load":
            unsafe.append(f"{node.lineno}: {ast.unparse(node.func)}")
    return unsafe


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_every_room_is_listed_and_packaged():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"]} - {"configs", "scripts/um3_rooms.pth"} == set(PACKAGES)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(PACKAGES)
    assert len(FILES) > 50 and {room_of(module_name(path)) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_left_only_and_nothing_unsafe_is_loaded(path):
    package = module_name(path.parent / "__init__.py")
    assert not wrong_imports(parse(path), module=module_name(path), package=package)
    assert not unsafe_loads(parse(path))


def test_no_folder_and_no_file_is_too_large():
    counts = Counter(path.parent for path in PRODUCT)
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    folders = [f"{folder.relative_to(ROOT)}: {n} files" for folder, n in counts.items() if n > MAX_FILES_PER_FOLDER]
    files = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lines.items() if n > MAX_LINES_PER_FILE]
    assert folders + files == []


def test_every_module_has_a_docstring():
    assert [module_name(path) for path in FILES if not ast.get_docstring(parse(path))] == []
    assert [folder for folder in {path.parent for path in FILES} if not (folder / "__init__.py").exists()] == []


TO_THE_RIGHT = """
um3.core.files: import tokenizer
um3.core.files: import um3.model.vocabulary
um3.core.files: from um3 import ids
um3.core.files: from .. import ids
um3.core.files: from ..ids import UnifiedVocabulary
tokenizer.text_tokenizer: from um3.model.vocabulary import UnifiedVocabulary
tokenizer.text_tokenizer: def f(): from data_mix.batches.mix import open_rows
um3.cli: if TYPE_CHECKING: from eval import run
um3.cli: import importlib; importlib.import_module('train.loop')
eval.run: importlib.import_module(f'train.{name}')
um3.model.sequences: from um3.inference.pipeline import UM3Pipeline
um3.inference.pipeline: from um3 import cli
data_mix.sources.text: from data_mix.batches import mix
eval.metrics.clipscore: import eval.tasks.zero_shot
data_mix.batches.mix: import eval.scores as scores
eval.run: import numpy, train
"""
TO_THE_LEFT = """
um3.core.files: from um3.core import errors; from . import errors; from .errors import UserError
tokenizer.text_tokenizer: from um3 import core; from um3.core.files import write_json; import tokenizers
um3.model.language_model: import tokenizer; from .ids import UnifiedVocabulary; import training_tools
train.loop: import um3, data_mix.batches.mix, eval.run; from train import engine; from . import optim
"""
UNSAFE = f"""
import pickle
def f(): from pickle import loads
importlib.import_module('dill')
torch.load(path)
torch.load(path, weights_only={False})
torch.load(path, weights_only=flag)
torch.load(path, **options)
from torch import load
np.load(path, allow_pickle=True)
pandas.read_pickle(path)
yaml.load(text, Loader=yaml.Loader)
AutoModel.from_pretrained(path, trust_remote_code={True})
AutoModel.from_pretrained(path, trust_remote_code=flag)
options = {{'trust_remote_code': True}}
"""
SAFE = """
torch.load(path, weights_only=True)
json.load(file)
np.load(path)
yaml.safe_load(text)
f(trust_remote_code=False)
options = {'trust_remote_code': False, **other}
"""


@pytest.mark.parametrize(("lines", "is_wrong"), [(TO_THE_RIGHT, True), (TO_THE_LEFT, False)])
def test_the_checker_sees_imports_to_the_right(lines, is_wrong):
    for module, line in (text.split(": ", 1) for text in lines.strip().splitlines()):
        found = wrong_imports(ast.parse(line), module=module, package=module.rpartition(".")[0])
        assert bool(found) == is_wrong, line


@pytest.mark.parametrize(("lines", "is_unsafe"), [(UNSAFE, True), (SAFE, False)])
def test_the_checker_sees_unsafe_loads(lines, is_unsafe):
    for line in lines.strip().splitlines():
        assert bool(unsafe_loads(ast.parse(line))) == is_unsafe, line


def test_reading_a_config_imports_no_deep_learning():
    """A phase that is up to date must return at once."""
    program = "import sys, train.config, train.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run_python(program).stdout.split())
    assert {"train", "omegaconf"} <= loaded
    assert not loaded & {"torch", "transformers", "deepspeed", "datasets", "matplotlib"}
