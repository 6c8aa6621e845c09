"""An ablation whose rows train a UM3 on the codes of another run, and from the text half of the row before."""

import os

import pytest
import torch

from eval.report.ablation import main
from tests.train.conftest import ROOT, TINY, environment, losses
from um3.core.errors import UserError
from um3.core.images import read_image
from um3.model.language_model import load_model

TABLE = """
title: Before and after
columns: {scenes_captions/exact_match: captions, um3_prose/bits_per_byte: bits per byte}
curves: {train/loss_visual: visual loss}
rows:
  - {name: split, um3: []}
  - {name: from text, after: split, um3: ["model.base_model={text}", optimizer.lr=1e-9, loop.max_steps=1]}
"""
EVAL = """
eval:
  num_threads: 1
  language: {num_items: 2, num_documents: 2, max_tokens: 28}
  captions: {num_images: 4, max_new_tokens: 4}
  generation: {num_images: 4, per_skill: 2}
"""


@pytest.mark.slow
def test_a_um3_learns_the_codes_of_the_base_run(made, tmp_path, capfd, monkeypatch):
    for name in os.environ.keys() - environment().keys():  # the phases before ran in this process, as a rank
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "small.yaml").write_text(f"base: {ROOT}/configs/demo.yaml\n{EVAL}")
    (tmp_path / "table.yaml").write_text(TABLE)
    files = ["--table", str(tmp_path / "table.yaml"), "--config", str(tmp_path / "small.yaml")]
    command = [*files, "--run", str(tmp_path / "run")]
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
