"""Configs: defaults, files with bases, overrides, and one line for every mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from um3.core.config import config_hash, differences, load_config, save_config, to_dict
from um3.core.errors import UserError


@dataclass
class Source:
    name: str = ""
    path: str = ""
    weight: float = 1.0


@dataclass
class Optimizer:
    lr: float = 1e-3
    kind: Literal["adamw", "lamb"] = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    module_lr: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr {self.lr} must be positive")


@dataclass
class Config:
    name: str = "run"
    steps: int = 10
    fast: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: list[Source] = field(default_factory=list)


def written(folder: Path, text: str | bytes, *, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "steps: 20\noptimizer: {lr: 0.1, kind: lamb}\n")
    config = load_config(Config, path=path, overrides=["optimizer.lr=1e-4", "fast=true", "name=a b"])
    assert config == Config(name="a b", steps=20, fast=True, optimizer=Optimizer(lr=1e-4, kind="lamb"))
    assert isinstance(config.optimizer, Optimizer) and load_config(Config) == Config()


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(Config, path=written(tmp_path, "# nothing set\n")) == Config()


def test_bases_are_read_first_and_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared", "steps: 1\nname: oldest\noptimizer: {lr: 0.5}", name="oldest.yaml")
    written(tmp_path / "shared", "base: oldest.yaml\nname: older\nsources: [{name: a}, {name: b}]", name="older.yaml")
    config = load_config(Config, path=written(tmp_path, "base: shared/older.yaml\nsources: [{name: c, weight: 2}]"))
    assert (config.steps, config.name, config.optimizer.lr) == (1, "older", 0.5)
    assert config.sources == [Source(name="c", weight=2.0)]  # a list replaces the base's, it does not mix with it


def test_bases_that_include_each_other_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "base: second.yaml", name="first.yaml")
    written(tmp_path, "base: first.yaml", name="second.yaml")
    for name in ("first.yaml", "second.yaml"):
        with pytest.raises(UserError, match="include each other"):
            load_config(Config, path=tmp_path / name)


def test_a_missing_file_and_a_missing_base_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml does not exist.*CONFIG="):
        load_config(Config, path=tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"gone\.yaml does not exist"):
        load_config(Config, path=written(tmp_path, "base: gone.yaml"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optimiser: {lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ("sources: [{name: a, pathh: b}]", "unknown key 'pathh'; did you mean 'path'"),
        ("zzzz: 1", "unknown key 'zzzz'; known keys: name, steps, fast, optimizer, sources"),
        ("optimizer: {lr: abc}", "optimizer.lr: Value 'abc'"),
        ("optimizer: {lr: -1}", "lr -1.0 must be positive"),
        ("optimizer: {kind: sgd}", r"optimizer.kind: .*'sgd'.*\['adamw', 'lamb'\]"),
        ("optimizer: {betas: [0.9, x]}", r"optimizer.betas\[1\]"),
        ("optimizer: {betas: [0.9, [1]]}", r"optimizer.betas: '1' holds \[1\]"),
        ("optimizer: {module_lr: {a: {b: 1}}}", "optimizer.module_lr: 'a' holds"),
        ("optimizer: 3", "int is not a subclass of Optimizer"),
        ("optimizer: null", "optimizer"),
        ("steps: 1.5", "steps: Value '1.5'"),
        ("steps: true", "steps: Value 'True'"),
        ("fast: perhaps", "fast: Value 'perhaps'"),
        ("name: [a]", "name: Cannot convert"),
        ("steps: 3\nfast: true\nname: [a\nsteps: 4", r"line 4 is not readable YAML: did not find expected ',' or '\]'"),
        ("steps: 3\nsteps: 4", "line 2 is not readable YAML: found duplicate key steps"),
        ("- steps", "'key: value' lines"),
        ("3", "not readable YAML"),
        (b"name: \xff\xfe", "not readable YAML: 'utf-8' codec"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_the_file_in_it(text: str | bytes, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        load_config(Config, path=written(tmp_path, text))
    assert "config.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer.lrr=3", "override 'optimizer.lrr=3': unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ("optimzer.lr=3", "did you mean 'optimizer'"),
        ("steps=many", "override 'steps=many': steps: Value 'many'"),
        ("steps=", "steps"),
        ("steps", "'steps' is not of the form section.key=value"),
        ("=3", "section.key=value"),
        ("optimizer..lr=3", "section.key=value"),
        ("name=[a", "override 'name=\\[a' cannot be read: did not find expected"),
        ("name=${nobody}", "cannot be read: .*nobody"),
        ("sources.0.path=x", "a list is given whole"),
        ("optimizer.module_lr.tower.layer=1", "write dotted names as optimizer.module_lr={a.b: 1}"),
    ],
)
def test_mistakes_in_an_override_are_one_line_with_the_override_in_it(override: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        load_config(Config, overrides=[override])
    assert "\n" not in str(caught.value)


def test_overrides_take_lists_and_dotted_names() -> None:
    overrides = ["sources=[{name: a, path: /some/where}]", "optimizer.module_lr={tower.layer: 2e-4}"]
    config = load_config(Config, overrides=overrides)
    assert config.sources == [Source(name="a", path="/some/where")]
    assert config.optimizer.module_lr == {"tower.layer": 2e-4}


def test_saved_and_loaded_again_is_equal(tmp_path: Path) -> None:
    config = Config(
        name="1e-3: yes, \"no\" 'null' # é\n07",
        optimizer=Optimizer(lr=1e-5, betas=[0.0, 0.999], module_lr={"a.b": 1e-7, "c": 3.0}),
        sources=[Source(name="true", path="/a b/c"), Source(name="", weight=float("inf"))],
    )
    save_config(config, tmp_path / "deep/config.yaml")
    assert load_config(Config, path=tmp_path / "deep/config.yaml") == config


def test_the_hash_follows_the_values() -> None:
    assert config_hash(Config()) == config_hash(load_config(Config)) != config_hash(Config(steps=11))


def test_differences_name_every_changed_leaf() -> None:
    old = to_dict(Config(sources=[Source(name="a")]))
    new = to_dict(Config(steps=11, optimizer=Optimizer(lr=2.0, betas=[0.9, 0.99])))
    assert differences(old, new) == [
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.lr: 0.001 -> 2.0",
        "sources: [{'name': 'a', 'path': '', 'weight': 1.0}] -> []",
        "steps: 10 -> 11",
    ]
    assert differences(old, old) == [] and differences({}, {"new": 1}) == ["new: None -> 1"]
