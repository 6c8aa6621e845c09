"""Configs: defaults, files with bases, overrides, renamed keys, and one line for every mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from data_mix.codes.encode import EncodeConfig
from eval.config import EvalConfig
from train.recipes.configs import Stage1Config, Stage2Config, UM3Config
from train.recipes.um3_init import InitConfig
from um3.core.config import RENAMED_KEYS, differences, load_config, save_config, to_dict
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


def refusal(schema: Any = Config, **options: Any) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_config(schema, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "steps: 20\noptimizer: {lr: 0.1, kind: lamb}\n")
    config = load_config(Config, path=path, overrides=["optimizer.lr=1e-4", "fast=true", "name=a b"])
    assert config == Config(name="a b", steps=20, fast=True, optimizer=Optimizer(lr=1e-4, kind="lamb"))
    assert isinstance(config.optimizer, Optimizer) and load_config(Config) == Config()
    assert load_config(Config, path=written(tmp_path, "# nothing set\n")) == Config()
    overrides = ["sources=[{name: a, path: /some/where}]", "optimizer.module_lr={tower.layer: 2e-4}"]
    config = load_config(Config, overrides=overrides)
    assert config.sources == [Source(name="a", path="/some/where")]
    assert config.optimizer.module_lr == {"tower.layer": 2e-4}


def test_bases_are_read_first_and_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared", "steps: 1\nname: oldest\noptimizer: {lr: 0.5}", name="oldest.yaml")
    written(tmp_path / "shared", "base: oldest.yaml\nname: older\nsources: [{name: a}, {name: b}]", name="older.yaml")
    config = load_config(Config, path=written(tmp_path, "base: shared/older.yaml\nsources: [{name: c, weight: 2}]"))
    assert (config.steps, config.name, config.optimizer.lr) == (1, "older", 0.5)
    assert config.sources == [Source(name="c", weight=2.0)]  # a list replaces the base's list


def test_bases_that_include_each_other_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "base: second.yaml", name="first.yaml")
    written(tmp_path, "base: first.yaml", name="second.yaml")
    for name in ("first.yaml", "second.yaml"):
        assert "include each other" in refusal(path=tmp_path / name)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optimiser: {lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ("sources: [{name: a, pathh: b}]", "unknown key 'pathh'; did you mean 'path'"),
        ("zzzz: 1", "unknown key 'zzzz'; known keys: name, steps, fast, optimizer, sources"),
        ("optimizer: {lr: abc}", "optimizer.lr: Value 'abc'"),
        ("optimizer: {lr: -1}", "lr -1.0 must be positive"),
        ("optimizer: {kind: sgd}", "['adamw', 'lamb']"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas[1]"),
        ("optimizer: {betas: [0.9, [1]]}", "optimizer.betas: '1' holds [1]"),
        ("optimizer: {module_lr: {a: {b: 1}}}", "optimizer.module_lr: 'a' holds"),
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
        ("base: gone.yaml", "gone.yaml does not exist"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_the_file_in_it(text: str | bytes, hint: str, tmp_path: Path) -> None:
    line = refusal(path=written(tmp_path, text))
    assert hint in line and str(tmp_path) in line


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
        ("name=[a", "override 'name=[a' cannot be read: did not find expected"),
        ("name=${nobody}", "nobody"),
        ("sources.0.path=x", "set the whole list"),
        ("optimizer.module_lr.tower.layer=1", "write dotted names as optimizer.module_lr={a.b: 1}"),
    ],
)
def test_mistakes_in_an_override_are_one_line_with_the_override_in_it(override: str, hint: str) -> None:
    assert hint in refusal(overrides=[override])


OLD_KEYS = {
    Stage1Config: "loop.total_steps loop.folder loop.track optimizer.average_decay model.start model.width "
    "text.mlp_width",
    Stage2Config: "tokenizer trained discriminator_optimizer.average_decay",
    UM3Config: "model.base model.new_rows qlip vocabulary.text_entries vocabulary.slots vocabulary.bits_per_slot "
    "vocabulary.shared_bits data.row_tokens data.text_row_tokens guard",
    EvalConfig: "features",
    EncodeConfig: "qlip out rows_per_shard",
    InitConfig: "base qlip out slots bits_per_slot new_rows row_tokens",
}


@pytest.mark.parametrize("schema", OLD_KEYS)
def test_an_old_key_is_answered_with_its_new_name(schema: type[Any]) -> None:
    for old in OLD_KEYS[schema].split():
        section, _, name = old.rpartition(".")
        new = f"{section}.{RENAMED_KEYS[name]}".lstrip(".")
        assert f"{old} -> {new}" in refusal(schema, overrides=[f"{old}=1"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.texts=[{name: a, adapter: x}]", "data.texts.adapter -> data.texts.preset"),
        ("guard.rows=9", "guard.rows -> text_validation.num_sequences"),
        ("engine.precision=float32", "engine.precision=float32 -> engine.precision=fp32"),
        ("engine.precision=autocast", "engine.precision=autocast -> engine.precision=bf16-mixed"),
        ("engine.precision=bf16", "engine.precision=bf16 -> engine.precision=bf16-true"),
    ],
)
def test_old_keys_in_lists_and_old_values_are_answered_too(override: str, expected: str) -> None:
    assert expected in refusal(UM3Config, overrides=[override])


def test_every_old_key_of_an_old_run_is_named_in_one_line(tmp_path: Path) -> None:
    old = "loop: {folder: runs/a, total_steps: 9, seed: 1}\nengine: {precision: bf16}\nmodel: {base: x}\nqlip: y"
    line = refusal(UM3Config, path=written(tmp_path, old))
    for name in ("config.yaml", "loop.output_dir", "loop.max_steps", "bf16-true", "model.base_model", "visual_tok"):
        assert name in line
    assert "seed" not in line
    path = written(tmp_path, "eval: {tokenizer: {num_images: 9}, output_dir: x}")
    assert load_config(EvalConfig, path=path, section="eval").tokenizer.num_images == 9  # names that are still used


def test_a_partial_schema_skips_the_other_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "stage1: {optimizer: {lr: 0.5}, loop: {seed: 3}}")
    options: dict[str, Any] = {"path": path, "section": "stage1", "overrides": ["loop.seed=4", "steps=2"]}
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
def test_a_file_without_the_section_says_where_settings_belong(text: str, names: list[str], tmp_path: Path) -> None:
    line = refusal(Stage2Config, path=written(tmp_path, text), section="stage2")
    assert str(tmp_path) in line and all(name in line for name in names)


def test_an_old_experiment_or_a_folder_is_answered_with_a_file_that_exists(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, new in (
        ("paper", "um3_llama3_1b"),
        ("in1k", "qlip_b16_in1k"),
        ("mine", "demo"),
        ("paper/um3.yaml", "um3_llama3_1b"),
    ):
        line = refusal(path=tmp_path / name)
        assert f"configs/{new}.yaml" in line and f"CONFIG={new}" in line and str(tmp_path / name) in line
        assert (Path(__file__).parents[2] / "configs" / f"{new}.yaml").exists()


def test_saved_and_loaded_again_is_equal(tmp_path: Path) -> None:
    config = Config(
        name="1e-3: yes, \"no\" 'null' # é\n07",
        optimizer=Optimizer(lr=1e-5, betas=[0.0, 0.999], module_lr={"a.b": 1e-7, "c": 3.0}),
        sources=[Source(name="true", path="/a b/c"), Source(name="", weight=float("inf"))],
    )
    save_config(config, tmp_path / "deep/config.yaml")
    assert load_config(Config, path=tmp_path / "deep/config.yaml") == config


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
