"""Configs: defaults, files with bases, overrides, renamed keys, and one line for every mistake."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from train.settings.tokenizer import Stage1Config, Stage2Config
from train.settings.um3 import UM3Config
from um3.core.config import differences, load_config, save_config, to_dict
from um3.core.errors import UserError
from um3.core.ranges import Decay, NonNegativeFloat, PositiveFloat, PositiveInt, Range


@dataclass
class Source:
    name: str = ""
    path: str = ""
    weight: NonNegativeFloat = 1.0


@dataclass
class Optimizer:
    lr: PositiveFloat = 1e-3
    warmup: int = 0
    kind: Literal["adamw", "lamb"] = "adamw"
    betas: Annotated[list[Decay], Range(2, 2)] = field(default_factory=lambda: [0.9, 0.95])
    module_lr: dict[str, PositiveFloat] = field(default_factory=dict)

    def __post_init__(self):
        if self.warmup > 10:
            raise ValueError(f"warmup {self.warmup} exceeds 10")


@dataclass
class Config:
    name: str = "run"
    steps: int = 10
    limit: PositiveInt | None = None
    fast: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: list[Source] = field(default_factory=list)


def written(folder, text, *, name="config.yaml"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(schema=Config, **options):
    """The one line with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_config(schema, **options)
    return str(caught.value)


def test_defaults_then_file_then_overrides(tmp_path):
    path = written(tmp_path, "steps: 20\noptimizer: {lr: 0.1, kind: lamb}\n")
    config = load_config(Config, path=path, overrides=["optimizer.lr=1e-4", "fast=true", "name=a b"])
    assert config == Config(name="a b", steps=20, fast=True, optimizer=Optimizer(lr=1e-4, kind="lamb"))
    assert isinstance(config.optimizer, Optimizer) and load_config(Config) == Config()
    assert load_config(Config, path=written(tmp_path, "# nothing set\n")) == Config()
    aliases = written(tmp_path, "stage1: {sources: &a [{name: x}]}\nstage2: {sources: *a}")
    assert load_config(Config, path=aliases, section="stage2").sources == [Source(name="x")]
    overrides = ["sources=[{name: a, path: /some/where}]", "optimizer.module_lr={tower.layer: 2e-4}"]
    config = load_config(Config, overrides=overrides)
    assert config.sources == [Source(name="a", path="/some/where")]
    assert config.optimizer.module_lr == {"tower.layer": 2e-4}


def test_bases_are_read_first_and_relative_to_the_file(tmp_path):
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared", "steps: 1\nname: oldest\noptimizer: {lr: 0.5}", name="oldest.yaml")
    written(tmp_path / "shared", "base: oldest.yaml\nname: older\nsources: [{name: a}, {name: b}]", name="older.yaml")
    config = load_config(Config, path=written(tmp_path, "base: shared/older.yaml\nsources: [{name: c, weight: 2}]"))
    assert (config.steps, config.name, config.optimizer.lr) == (1, "older", 0.5)
    assert config.sources == [Source(name="c", weight=2.0)]  # a list replaces the base's list


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optimiser: {lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ("sources: [{name: a, pathh: b}]", "unknown key 'pathh'; did you mean 'path'"),
        ("zzzz: 1", "unknown key 'zzzz'; known keys: name, steps, limit, fast, optimizer, sources"),
        ("optimizer: {lr: abc}", "optimizer.lr: Value 'abc'"),
        ("optimizer: {warmup: 11}", "warmup 11 exceeds"),
        ("optimizer: {kind: sgd}", "['adamw', 'lamb']"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas[1]"),
        ("optimizer: {betas: [0.9, [1]]}", "optimizer.betas[1] holds [1]"),
        ("optimizer: {module_lr: {a: {b: 1}}}", "optimizer.module_lr[a] holds"),
        ("optimizer: 3", "int is not a subclass of Optimizer"),
        ("optimizer: null", "optimizer"),
        ("steps: 1.5", "steps: Value '1.5'"),
        ("steps: true", "steps: Value 'True'"),
        ("fast: perhaps", "fast: Value 'perhaps'"),
        ("name: [a]", "name: Cannot convert"),
        ("steps: 3\nfast: true\nname: [a\nsteps: 4", "line 4 is not readable YAML: did not find expected ',' or ']'"),
        ("steps: 3\nsteps: 4", "line 2 is not readable YAML: found duplicate key steps"),
        ("- steps", "'key: value' lines"),
        ("3", "not readable YAML"),
        (b"name: \xff\xfe", "not readable YAML: 'utf-8' codec"),
        ("null: 1", "NoneType"),
        ("steps: " + "9" * 5_000, "4300 digits"),
        ("steps: " + "9" * 4_000, "99...; it must be below 2**53"),
        ("[" * 100_000, "nested deeper"),
        ("name: " + "{a: " * 100_000, "nested deeper"),
        (LAUGHS, "100000"),
        ("a: &a [*a]", "100000"),
        ("name: ${", "no viable alternative"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan; it must be above 0 and finite"),
        ("optimizer: {lr: .inf}", "optimizer.lr is inf; it must be above 0 and finite"),
        ("optimizer: {lr: 0}", "optimizer.lr is 0.0; it must be above 0"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas[1] is 1.0; it must be at least 0 and below 1"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas has 1 values; their number must be at least 2 and at most 2"),
        ("optimizer: {module_lr: {a: -1}}", "optimizer.module_lr[a] is -1.0"),
        ("sources: [{}, {weight: -1}]", "sources[1].weight is -1.0"),
        ("limit: 0", "limit is 0; it must be at least 1"),
        ("base: gone.yaml", "gone.yaml does not exist"),
        ("base: config.yaml", "include each other"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_the_file_in_it(text, hint, tmp_path):
    line = refusal(path=written(tmp_path, text))
    assert hint in line and str(tmp_path) in line


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer.lrr=3", "override 'optimizer.lrr=3': unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ("optimzer.lr=3", "did you mean 'optimizer'"),
        ("steps=many", "override 'steps=many': steps: Value 'many'"),
        ("steps=", "steps"),
        ("steps", "'steps' is not of the form section.key=value"),
        ("=3", "section.key=value"),
        ("optimizer..lr=3", "section.key=value"),
        ("name=[a", "override 'name=[a' cannot be read: did not find expected"),
        ("name=${nobody}", "nobody"),
        ("name=a #b", "quote it"),
        ("name=a\nb", "quote it"),
        ("name=/tmp/\udce9", "cannot be read"),
        ("steps=" + "[" * 100_000, "cannot be read: nested deeper"),
        ("steps=" + "9" * 5_000, "4300 digits"),
        ("sources.0.path=x", "set the whole list"),
        ("optimizer.module_lr.tower.layer=1", "write dotted names as {a.b: 1}"),
    ],
)
def test_mistakes_in_an_override_are_one_line_with_the_override_in_it(override, hint):
    assert hint in refusal(overrides=[override])


@pytest.mark.parametrize(
    ("options", "message"),
    [("temprature: 1", "unknown option 'temprature'"), ("top_k: 0.5", "top_k"), ("top_p: 0", "outside (0, 1]")],
)
def test_stored_sampling_options_are_checked(options, message):
    assert message in refusal(UM3Config, overrides=[f"image_sampling={{{options}}}"])
    scales = load_config(UM3Config, overrides=["image_sampling={guidance_scale: [4, 1], top_k: 5}"]).image_sampling
    assert scales == {"guidance_scale": [4, 1], "top_k": 5}


def test_a_partial_schema_skips_the_other_keys(tmp_path):
    path = written(tmp_path, "stage1: {optimizer: {lr: 0.5}, loop: {seed: 3}}")
    options = {"path": path, "section": "stage1", "overrides": ["loop.seed=4", "steps=2"]}
    config = load_config(Config, partial=True, **options)
    assert (config.optimizer.lr, config.steps) == (0.5, 2)
    assert "loop" in refusal(**options)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("loop: {max_steps: 3}", ["'loop' is not a section", "stage1, stage2", "'stage2:'"]),
        ("stage1: {}\num3: {}", ["no section 'stage2'", "--config"]),
        ("stage2: 3", ["section 'stage2'", "'key: value' lines"]),
    ],
)
def test_a_file_without_the_section_says_where_settings_belong(text, names, tmp_path):
    line = refusal(Stage2Config, path=written(tmp_path, text), section="stage2")
    assert str(tmp_path) in line and all(name in line for name in names)


def test_a_folder_is_answered_with_a_file_that_exists(tmp_path):
    line = refusal(path=tmp_path)
    assert f"{tmp_path} is a folder" in line and "configs/demo.yaml" in line and "CONFIG=demo" in line


def test_saved_and_loaded_again_is_equal(tmp_path):
    config = Config(
        name="1e-3: yes, \"no\" 'null' # é\n07",
        optimizer=Optimizer(lr=1e-5, betas=[0.0, 0.999], module_lr={"a.b": 1e-7, "c": 3.0}),
        sources=[Source(name="true", path="/a b/c"), Source(name="a ${b} $c", weight=1e18)],
    )
    save_config(config, tmp_path / "deep/config.yaml")
    assert load_config(Config, path=tmp_path / "deep/config.yaml") == config


def test_differences_name_every_changed_leaf():
    old = to_dict(Config(sources=[Source(name="a")]))
    new = to_dict(Config(steps=11, optimizer=Optimizer(lr=2.0, betas=[0.9, 0.99])))
    assert differences(old, new) == [
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.lr: 0.001 -> 2.0",
        "sources: [a] -> []",
        "steps: 10 -> 11",
    ]
    assert differences(old, old) == [] and differences({}, {"new": 1}) == ["new: None -> 1"]
    other = to_dict(Config(sources=[Source(name="a", weight=2.0)]))
    assert differences(old, other) == ["sources[0].weight: 1.0 -> 2.0"]


def test_one_place_under_two_paths_is_no_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("base")
    for path in ("base", "./base/", "link"):
        assert differences({"base_model": path}, {"base_model": str(tmp_path / "base")}) == []
    assert differences({"base_model": "base"}, {"base_model": "other"}) == ["base_model: base -> other"]
    assert differences({"base_model": "base"}, {"base_model": "absent"}) == ["base_model: base -> absent"]


@pytest.mark.parametrize("key", ["data.texts", "vocabulary.conversations"])
def test_a_source_named_like_a_path_is_refused(key):
    with pytest.raises(UserError, match=r"the name of source '../a' .texts. has a '/'"):
        load_config(UM3Config, overrides=[f"{key}=[{{name: ../a, path: texts}}]"])
    with pytest.raises(UserError, match=r"source 'a/b'.*use letters, digits"):
        load_config(Stage1Config, overrides=["data.sources=[{name: a/b, path: images}]"])
