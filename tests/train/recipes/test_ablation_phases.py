"""An ablation whose rows train a LlamaGen and a LLaVA: what they start from, their scores, and a resumed row."""

import os
import shutil

import pytest
import yaml

from eval.report.ablation import main
from tests.train.conftest import COMMON, ROOT, TINY, copy_half, environment
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.hub import read_weights

EVAL = """
eval:
  num_threads: 1
  generation: {num_images: 4, per_skill: 2}
  tokenizer: {num_images: 4, digits: false}
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


@pytest.mark.slow
def test_rows_draw_and_answer_with_the_tokenizer_of_the_first_and_resume(made, tmp_path, capfd, monkeypatch):
    for name in os.environ.keys() - environment().keys():  # the phases before ran in this process, as a rank
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "small.yaml").write_text(f"base: {ROOT}/configs/demo.yaml\n{EVAL}")
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(made, base)
    command = ["--table", str(tmp_path / "table.yaml"), "--config", str(tmp_path / "small.yaml"), "--run", str(run)]
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
    kept = {phase: read_weights(path / phase / "model") for path, phase in _ends(run)}
    for path, phase in _ends(run):
        shutil.move(path / phase, tmp_path / phase)
        copy_half(tmp_path / phase, path / phase)
    capfd.readouterr()
    main([*command, "--base", str(base)])
    again = [line for line in capfd.readouterr().out.splitlines() if line.endswith("up to date")]
    assert len(again) == 6, again  # the other three phases, the codes, and two parts
    for path, phase in _ends(run):
        weights = read_weights(path / phase / "model")
        assert all((weights[name] == tensor).all() for name, tensor in kept[phase].items())
    assert {name: seeds[0] for name, seeds in read_json(run / "table.json").items()}.keys() == values.keys()


def _ends(run):
    return [(run / "drawn", "llamagen"), (run / "asked", "llava-instruct")]
