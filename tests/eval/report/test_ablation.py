"""Ablations: the commands of their rows, real rows at the smallest size, the rule for the weights, and bad tables."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_mix.demo.scene_prompts import SKILLS
from eval.paper_values import LLAMAGEN_TOKENIZERS, SYSTEMS, VQA_LAYERS
from eval.report import ablation, ablation_rows
from eval.report.ablation import balance, main, result_table
from eval.report.ablation_rows import Ablation
from eval.report.table import markdown
from eval.scores import Measurement, write_scores
from tokenizer import load
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.images import read_image
from um3.core.metrics import read_metrics

ROOT = Path(__file__).parents[3]
EXPERIMENT = f"""
base: {ROOT}/configs/demo.yaml
stage1:
  loop: {{max_steps: 4, batch_size: 8, num_threads: 1, log_every_steps: 1, save_every_steps: 2}}
  optimizer: {{warmup_steps: 1}}
  data: {{sources: [{{name: scenes, kind: scenes, length: 200}}]}}
  model: {{hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 48, projection_dim: 24}}
  text: {{hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 48, vocab_size: 300}}
stage2:
  loop: {{max_steps: 2, batch_size: 8, num_threads: 1}}
eval: {{num_threads: 1, tokenizer: {{num_images: 4}}}}
"""
TABLE = """
title: Two weights
columns: {scenes_reconstruction_stage1/psnr: PSNR, digits_classification/zero_shot: zero-shot, stage1/minutes: minutes}
rows:
  - {name: "1 : 0", stage1: [loss.contrastive=1, loss.mse=0], alone: contrastive, paper: [11.7, 0.757, null]}
  - {name: "0 : 1", stage1: [loss.contrastive=0, loss.mse=100], alone: mse}
"""
CHAIN = """
title: One after the other
columns: {scenes_reconstruction_stage1/psnr: PSNR, scenes_reconstruction_stage2/psnr: after stage 2}
curves: {train/mse: squared error, gradients/mse: its gradient}
rows:
  - {name: first, stage1: [gradient_norms=true]}
  - {name: second, after: first, stage1: ["model.encoder_weights={after}/stage1/model", optimizer.lr=1e-9]}
  - {name: third, after: first, stage2: ["init_from={after}/stage1/model", "data.sources=[{name: digits}]"]}
"""
DONE = {"seconds": 90.0, "peak_memory_gib": 1.5, "steps": 2, "machine": "here", "processes": 1}
SEEDED = """
title: Before and after
seeds: 2
columns: {language/a: A}
curves: {train/loss: loss}
rows:
  - {name: split, um3: [], paper: [0.5]}
  - {name: from text, after: split, um3: ["model.base_model={text}"]}
"""

SHARED = """
columns: {generation/a: A, vqa_scenes/a: B}
questions: [image_size=16]
rows:
  - {name: q, stage1: [], stage2: [], llamagen: [], eval: ["generation.judge={base}/stage1/model"]}
  - {name: r, after: q, llamagen: [model.dropout=0]}
  - {name: l, after: r, llava_align: [], llava_instruct: []}
  - {name: b, llamagen: []}
  - {name: e, stage1: [], llava_align: []}
"""


@pytest.fixture
def arguments(tmp_path):
    """The options of an ablation over a tiny experiment; `write` writes the table's file."""
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    return ["--table", str(tmp_path / "table.yaml"), "--config", str(tmp_path / "tiny.yaml"), "--run", str(tmp_path)]


def write(folder, text):
    (folder / "table.yaml").write_text(text)
    return str(folder / "table.yaml")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Every command that a table starts, by its output; the commands do not run, but leave small results."""
    commands: dict[str, str] = {}

    def start(command: list[str], *, output: Path, what: str) -> None:
        commands[str(output.relative_to(tmp_path))] = " ".join(command).replace(str(tmp_path), "RUN")
        output.parent.mkdir(parents=True, exist_ok=True)
        if "train" in command:
            (output.parent / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2}\n')
            output.write_text(json.dumps(DONE))
        elif "eval" in command:
            value = 0.2 if "seed-0" in str(output) else 0.4
            for part in ("tokenizer", "language", "captions", "generation", "vqa_scenes"):
                write_scores(output.with_name(f"{part}.json"), [Measurement(part, 0).score("a", value, n=9, unit="%")])

    for module in (ablation, ablation_rows):
        monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(ablation_rows, "trained_on", lambda *_, **__: [])
    return commands


def test_every_row_runs_its_phases_with_its_settings_and_seed(tmp_path, arguments, started):
    write(tmp_path, SEEDED)
    main([*arguments, "--base", "BASE", "loop.max_steps=5"])
    train = "train um3 --processes 1 --config RUN/tiny.yaml loop.output_dir=RUN/{}/um3"
    train += " visual_tokenizer=BASE/stage2/model data.codes=BASE/codes loop.max_steps=5"
    commands = [*started.values()]
    assert commands[0] == f"{train.format('split/seed-0')} loop.seed=0"
    assert commands[1].startswith("eval run --config RUN/tiny.yaml run=RUN/split/seed-0 images=[] parts=[language,")
    assert commands[-3] == "um3 export RUN/split/seed-1/um3/model --out RUN/split/seed-1/um3-export"
    text = "model.base_model=RUN/split/seed-1/um3-export"
    assert commands[-2] == f"{train.format('from-text/seed-1')} {text} loop.seed=1"
    assert (tmp_path / "table.md").read_text().splitlines()[4] == "| split | 30.0 % ± 14.1 % (paper 50.0 %) |"
    values = json.loads((tmp_path / "table.json").read_text())["from text"][1]
    assert (values["language/a"]["value"], values["um3/minutes"]["value"]) == (0.4, 1.5)
    assert read_image(tmp_path / "curves.png").width > 1000


def test_one_seed_can_be_run_apart_from_the_others(tmp_path, arguments, started):
    write(tmp_path, SEEDED)
    stopped = tmp_path / "split/seed-1/um3-export/.lock"  # of an export that did not end
    stopped.parent.mkdir(parents=True)
    stopped.touch()
    main([*arguments, "--base", "BASE", "--seed", "1"])
    ours = ["split/seed-1/um3", "split/seed-1/eval", "split/seed-1/um3-export"]
    assert [str(Path(output).parent) for output in started] == [*ours, "from-text/seed-1/um3", "from-text/seed-1/eval"]
    assert not (tmp_path / "table.md").exists()
    with pytest.raises(UserError, match="the seeds 0 to 1; set --seed"):
        main([*arguments, "--base", "BASE", "--seed", "2"])


def test_a_phase_starts_from_the_row_then_from_the_one_before_it_then_from_the_base(tmp_path, arguments, started):
    write(tmp_path, SHARED)
    main([*arguments, "--base", "BASE", "loop.max_steps=5"])
    found = [
        re.sub(r" --processes 1 --config RUN/tiny.yaml loop.output_dir=\S+", "", line) for line in started.values()
    ]
    tokens = "visual_tokenizer=RUN/q/stage2/model"
    assert found == [
        "data_mix questions output_dir=RUN/questions image_size=16",
        "train stage1 loop.max_steps=5",
        "train stage2 init_from=RUN/q/stage1/model",
        f"data_mix encode --config RUN/tiny.yaml output_dir=RUN/q/codes {tokens}",
        f"train llamagen {tokens} data.codes=RUN/q/codes",
        "eval run --config RUN/tiny.yaml run=RUN/q images=[] parts=[tokenizer,generation] model=RUN/q/llamagen/model "
        "generation.judge=BASE/stage1/model",
        f"train llamagen {tokens} data.codes=RUN/q/codes loop.max_steps=5 model.dropout=0",
        "eval run --config RUN/tiny.yaml run=RUN/r images=[] parts=[generation] model=RUN/r/llamagen/model",
        f"train llava-align {tokens} loop.max_steps=5",
        "train llava-instruct init_from=RUN/l/llava-align/model",
        "eval vqa set=scenes data=RUN/questions max_new_tokens=16 batch_size=32 model=RUN/l/llava-instruct/model "
        "output=RUN/l/eval/vqa_scenes.json",
        "train llamagen visual_tokenizer=BASE/stage2/model data.codes=BASE/codes loop.max_steps=5",
        "eval run --config RUN/tiny.yaml run=RUN/b images=[] parts=[generation] model=RUN/b/llamagen/model",
        "train stage1 loop.max_steps=5",
        "train llava-align visual_tokenizer=RUN/e/stage1/model",
        "eval run --config RUN/tiny.yaml run=RUN/e images=[] parts=[tokenizer]",
        "eval vqa set=scenes data=RUN/questions max_new_tokens=16 batch_size=32 model=RUN/e/llava-align/model "
        "output=RUN/e/eval/vqa_scenes.json",
    ]
    with pytest.raises(UserError, match=r"row 'q' names {base}"):
        main(arguments)
    write(tmp_path, SHARED.replace("{base}", "{after}"))
    with pytest.raises(UserError, match=r"row 'q' names {after}; set `after`"):
        main(arguments)
    write(tmp_path, SHARED.replace("{base}", "x"))
    with pytest.raises(UserError, match=r"row 'b' starts from stage1, .* --base"):
        main(arguments)


@pytest.mark.slow
def test_rows_are_trained_measured_and_weighed(tmp_path, arguments, capfd):
    write(tmp_path, TABLE)
    main([*arguments, "--alone"])
    lines = (tmp_path / "balance.md").read_text().splitlines()
    assert lines[0] == "# Two weights" and lines[2] == "|  | PSNR | zero-shot | minutes |"
    psnr = json.loads((tmp_path / "balance.json").read_text())["1 : 0"][0]["scenes_reconstruction_stage1/psnr"]["value"]
    assert lines[4].startswith(f"| 1 : 0 | {psnr:.2f} dB (paper 11.70 dB) | ") and "(paper 75.7 %) |" in lines[4]
    losses = {"1-0": "train/contrastive", "0-1": "train/mse"}
    last = {name: read_metrics(tmp_path / name / "stage1/metrics.jsonl")[-1][key] for name, key in losses.items()}
    assert lines[-1].startswith(f"a_r / a_a = {last['1-0'] / last['0-1']:.3g}: ")
    capfd.readouterr()
    main([*arguments, "--alone"])
    assert capfd.readouterr().out.count("is up to date") == 4


@pytest.mark.slow
def test_a_row_starts_from_the_row_that_it_comes_after(tmp_path, arguments):
    write(tmp_path, CHAIN)
    main(arguments)
    first, second = (load(tmp_path / name / "stage1/model")[0] for name in ("first", "second"))
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(second.vision_features(pixels), first.vision_features(pixels))
    values = json.loads((tmp_path / "table.json").read_text())
    # Trained on digits, but measured on the validation scenes of the first row, like the other rows.
    assert values["third"][0]["scenes_reconstruction_stage2/psnr"]["value"] > 0
    assert (tmp_path / "table.md").read_text().splitlines()[4].endswith(" dB | – |")
    assert read_image(tmp_path / "curves.png").width > 1000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_table_saves_its_row(number, tmp_path, arguments):
    write(tmp_path, TABLE)
    command = [sys.executable, "-m", "eval", "ablation", *arguments, "--alone", "loop.max_steps=100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "1-0/stage1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "run the same command" in errors
    checkpoints = sorted((tmp_path / "1-0/stage1/checkpoints").glob("step-*/meta.json"))
    assert int(checkpoints[-1].parent.name.removeprefix("step-")) >= len(metrics.read_text().splitlines()) - 1 > 2


def test_a_row_that_fails_ends_the_table_in_one_line(tmp_path, arguments, capfd):
    write(tmp_path, TABLE.replace("loss.mse=0", "loss.nothing=0"))
    with pytest.raises(UserError, match="row '1 : 0' stopped with exit code 2 in stage1"):
        main(arguments)
    assert "loss.nothing" in capfd.readouterr().err


def test_the_rule_needs_both_losses(tmp_path):
    assert balance({"mse": tmp_path}) == ""
    with pytest.raises(UserError, match=r"stage1/metrics\.jsonl has no train/contrastive"):
        balance({"mse": tmp_path, "contrastive": tmp_path})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: []", "a table needs rows"),
        ("rows: [{name: a, stage1: []}, {name: a, stage1: []}]", "letters and digits"),
        ("rows: [{name: 1.0, stage1: []}, {name: '1 0', stage1: []}]", "letters and digits"),
        ("rows: [{name: '---', stage1: []}]", "letters and digits"),
        ("seeds: 0\nrows: [{name: a, stage1: []}]", "seeds is 0"),
        ("rows: [{name: a, codes: []}]", "row 'a' needs a phase to train"),
        ("rows: [{name: a, stage1: []}, {name: b}]", "row 'b' needs a phase to train"),
        ("rows: [{name: a, um3: [], llamagen: []}]", "row 'a' has um3 and llamagen"),
        ("rows: [{name: a, stage1: [], after: b}, {name: b, stage1: []}]", "'a' comes after 'b'"),
        ("columns: {a/b: B}\nrows: [{name: a, stage1: [], paper: [1, 2]}]", "2 values of the paper for 1 columns"),
    ],
)
def test_a_bad_table_is_a_one_line_error(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(Ablation, path=write(tmp_path, text))


def test_a_column_needs_a_score(tmp_path):
    text = "columns: {x/psnr: PSNR, x/none: none}\nrows: [{name: a, stage1: []}]"
    table = load_config(Ablation, path=write(tmp_path, text))
    scores = {"x/psnr": Measurement("x", 0).score("psnr", 20.0, n=1)}
    with pytest.raises(UserError, match=r"no run has a score 'x/none'.* x/psnr"):
        result_table(table, scores={"a": [scores]})
    table.columns = {"x/psnr": "PSNR"}
    assert markdown(result_table(table, scores={"a": [scores]}))[-1] == "| a | 20.00 |"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").iterdir()), ids=lambda path: path.stem)
def test_every_table_of_the_project_loads(path):
    assert load_config(Ablation, path=path).title


DRAWN = {"scenes_generation/frechet_distance[random-features]": "fid"}
LLAMAGEN = DRAWN | {"scenes_generation/clipscore_judge": "clipscore", "skills/mean": "mean"}
LLAMAGEN |= {f"skills/{skill}": skill for skill in SKILLS}
UM3 = DRAWN | {"scenes_generation/clipscore_qlip": "clipscore"}
GQA = {"scenes/accuracy": "gqa"}


@pytest.mark.parametrize(
    ("table", "row", "keys", "system"),
    [
        ("llamagen_tokens", "QLIP", LLAMAGEN, LLAMAGEN_TOKENIZERS["QLIP-B/16"]),
        ("llamagen_tokens", "BSQViT (no text)", LLAMAGEN, LLAMAGEN_TOKENIZERS["BSQViT-B/16"]),
        ("llamagen_tokens", "VQ (no text)", LLAMAGEN, LLAMAGEN_TOKENIZERS["VQGAN (LlamaGen's own)"]),
        ("um3_llamagen", "UM3", UM3, SYSTEMS["UM3 1.5B"]),
        ("um3_llamagen", "LlamaGen", UM3, SYSTEMS["LlamaGen 0.8B"]),
        ("llava_layers", "layer -2", GQA, VQA_LAYERS["QLIP-B, layer -2"]),
        ("llava_layers", "layer -1", GQA, VQA_LAYERS["QLIP-B, layer -1"]),
        ("llava_layers", "layer -1 after the quantizer", GQA, VQA_LAYERS["QLIP-B, layer -1, quantized"]),
        ("llava_encoders", "QLIP", GQA, VQA_LAYERS["QLIP-B, layer -2"]),
        ("llava_encoders", "CLIP (no pixels)", GQA, VQA_LAYERS["contrastive alone, layer -2"]),
        ("llava_encoders", "BSQViT (no text)", GQA, VQA_LAYERS["reconstruction alone, layer -2"]),
    ],
)
def test_the_papers_values_are_those_of_its_tables(table, row, keys, system):
    loaded = load_config(Ablation, path=ROOT / f"configs/ablations/{table}.yaml")
    (paper,) = (dict(zip(loaded.columns, found.paper, strict=True)) for found in loaded.rows if found.name == row)
    assert {column: paper[column] for column in keys} == {column: system[key] for column, key in keys.items()}
