"""Ablations whose rows train a LlamaGen and a LLaVA, or a UM3 on the codes of another run: what they start from, their
scores, and resumed rows."""

import os
import shutil

import pytest
import torch
import yaml

from eval.report.ablation import main
from tests.train.conftest import COMMON, ROOT, TINY, copy_half, environment, losses, saved_weights
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.hub import read_weights
from um3.core.images import read_image
from um3.model.language_model import load_model

EVAL = """
eval:
  num_threads: 1
  language: {num_items: 2, num_documents: 2, max_tokens: 28}
  captions: {num_images: 4, max_new_tokens: 4}
  generation: {num_images: 4, per_skill: 2}
  tokenizer: {num_images: 4, digits: false}
"""
UM3_TABLE = """
title: Before and after
columns: {scenes_captions/exact_match: captions, um3_prose/bits_per_byte: bits per byte}
curves: {train/loss_visual: visual loss}
rows:
  - {name: split, um3: []}
  - {name: from text, after: split, um3: ["model.base_model={text}", optimizer.lr=1e-9, loop.max_steps=1]}
"""
SMALL = [
    *COMMON,
    "warmup_share=0",
    "optimizer.kind=adamw",
    "data.conversations=[{name: scenes, kind: scenes, length: 60}]",
]
TABLE = {
    "title": "A drawing row and an answering one",
    "questions": ["sources=[{name: scenes, kind: scenes, length: 40}]"],
    "columns": {
        "scenes_reconstruction_stage2/psnr": "PSNR",
        "scenes_generation/clipscore_judge": "CLIPScore",
        "skills/mean": "skills",
        "scenes/accuracy": "questions",
    },
    "curves": {"train/loss": "loss"},
    "rows": [
        {
            "name": "drawn",
            "stage1": [*TINY["stage1"], "loss.contrastive=0"],
            "stage2": TINY["stage2"],
            "codes": ["images=[{name: scenes, kind: scenes, length: 64}]"],
            "llamagen": TINY["llamagen"],
            "eval": ["generation.judge={base}/stage2/model"],
            "paper": [24.12, 0.303, 0.31, None],
        },
        {"name": "asked", "after": "drawn", "llava_align": ["language_model={text}", *SMALL], "llava_instruct": SMALL},
    ],
}
pytestmark = pytest.mark.slow


@pytest.fixture
def command(made, tmp_path, monkeypatch):
    """The options of an ablation over the rows of `tmp_path`/table.yaml, in `tmp_path`/run."""
    for name in os.environ.keys() - environment().keys():  # the phases of `made` ran in this process, as a rank
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "small.yaml").write_text(f"base: {ROOT}/configs/demo.yaml\n{EVAL}")
    options = {"table": "table.yaml", "config": "small.yaml", "run": "run"}
    return [word for name, file in options.items() for word in (f"--{name}", str(tmp_path / file))]


def test_a_um3_learns_the_codes_of_the_base_run(made, command, tmp_path, capfd):
    (tmp_path / "table.yaml").write_text(UM3_TABLE)
    main([*command, "--base", str(made), *TINY["um3"]])
    assert len(losses(tmp_path / "run/split/um3")) == 4
    before, after = (load_model(tmp_path / f"run/{name}/um3/model") for name in ("split", "from-text"))
    text_rows, rows = (loaded.model.model.embed_tokens.weight for loaded in (before, after))
    num_text = before.ids.text_vocab_size
    torch.testing.assert_close(rows[:num_text], text_rows[:num_text])
    assert after.ids == before.ids and not torch.allclose(rows[num_text:], text_rows[num_text:], atol=1e-3)
    assert (tmp_path / "run/table.md").read_text().splitlines()[4].startswith("| split | ")
    assert read_image(tmp_path / "run/curves.png").width > 1000
    with pytest.raises(UserError, match="row 'split' stopped with exit code 2 in um3"):
        main([*command, "--base", str(tmp_path / "nowhere"), *TINY["um3"], "loop.max_steps=5"])
    assert "nowhere" in capfd.readouterr().err


def test_rows_draw_and_answer_with_the_tokenizer_of_the_first_and_resume(made, command, tmp_path, capfd):
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(made, base)
    with pytest.raises(UserError, match=r"row 'drawn' names {base}.* --base"):
        main(command)
    main([*command, "--base", str(base)])
    assert (base / "um3-export/config.json").exists()
    llamagen, tower = read_weights(run / "drawn/llamagen/model/qlip"), read_weights(run / "asked/llava-align/model")
    first = read_weights(run / "drawn/stage2/model")
    assert all((tensor == first[name]).all() for name, tensor in llamagen.items())
    shared = {name for name in tower if name.removeprefix("vision_tower.") in first}
    assert shared and all((tower[name] == first[name.removeprefix("vision_tower.")]).all() for name in shared)
    values = {name: seeds[0] for name, seeds in read_json(run / "table.json").items()}
    assert values["drawn"]["scenes_generation/clipscore_judge"]["protocol"]["towers"] == "judge"
    assert values["asked"]["scenes/accuracy"]["n"] > 4 and "scenes/count" in values["asked"]
    assert "skills/mean" not in values["asked"] and "dB (paper 24.12 dB)" in (run / "table.md").read_text()
    ends = [("drawn", "llamagen"), ("asked", "llava-instruct")]
    for row, phase in ends:
        shutil.move(run / row / phase, tmp_path / phase)
        copy_half(tmp_path / phase, run / row / phase)
    capfd.readouterr()
    main([*command, "--base", str(base)])
    again = [line for line in capfd.readouterr().out.splitlines() if line.endswith("up to date")]
    assert len(again) == 6, again  # the other three phases, the codes, and two parts
    for row, phase in ends:
        assert saved_weights(run / row / phase) == saved_weights(tmp_path / phase)
    assert {name: seeds[0] for name, seeds in read_json(run / "table.json").items()}.keys() == values.keys()
