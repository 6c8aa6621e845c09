"""The benchmark of UM3's loss runs at a small size, compares like with like, and sees a wrong gradient."""

import argparse
import json
import sys

import pytest
import torch

from benchmarks import um3_loss
from train.config import UM3LossConfig
from train.recipes.um3 import UM3Objective
from um3.core.errors import UserError
from um3.model import split_softmax as loss_module

SMALL = ["--seq-len", "32", "--patches", "8", "--width", "32", "--layers", "1", "--text-vocab-size", "300"]
SMALL += ["--bits-per-subtoken", "4", "--repeats", "1"]


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, *arguments])
    return um3_loss._options()


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, "--kinds", "mix", "--optimizer", "--threads", "1"])
    um3_loss.main()
    line, numbers = capsys.readouterr().out.splitlines()
    assert line.startswith("mix: ") and "(goal 1.2x)" in line and "(goal 0.25x)" in line and "(goal 1e-05)" in line
    found = json.loads(numbers)
    assert found["kind"] == "mix" and found["batch"] == 4 and 0 < found["error"] <= 1e-5
    for side in ("ours", "stock"):
        (run,) = found[side]
        assert run["seconds"] > 0 and run["cpu_s"] > 0 and run["peak_gib"] > 0


def test_rows_are_full_and_mixed_as_the_paper_mixes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ids, batches = um3_loss._build(options(monkeypatch, "--kinds", "mix"))
    input_ids_BT, target_mask_BT = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(batches) == 4 and input_ids_BT.shape == (16, 32)
    assert not (input_ids_BT == ids.pad_id).any()
    is_visual_BT = input_ids_BT >= ids.text_vocab_size
    images = is_visual_BT.sum(1)
    assert sorted(images.tolist()) == [0] * 12 + [ids.image_tokens] * 4
    assert ((is_visual_BT & target_mask_BT).sum(1) > 0).sum() == 3
    ((input_ids_BT, target_mask_BT),) = um3_loss._build(options(monkeypatch, "--kinds", "image"))[2]
    visual_BT = input_ids_BT >= ids.text_vocab_size
    assert len(input_ids_BT) == 4 and visual_BT.sum(1).tolist() == [ids.image_tokens] * 4
    assert target_mask_BT[visual_BT].all()


def test_the_sides_learn_the_same_targets_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(monkeypatch, "--kinds", "image")
    model, ids, (batch,) = um3_loss._build(given)
    again, _, (same_batch,) = um3_loss._build(given)
    for ours, theirs in zip([*model.parameters(), *batch], [*again.parameters(), *same_batch], strict=True):
        assert torch.equal(ours, theirs)
    joint = UM3Objective(model, ids=ids, loss=UM3LossConfig(mode="joint"))(*batch)
    mean = (joint.text_sum + joint.visual_sum) / (joint.text_count + joint.visual_count)
    torch.testing.assert_close(um3_loss._stock(model)(batch), mean)
    split = um3_loss._ours(model, ids=ids, options=given)(batch)
    torch.testing.assert_close(um3_loss._plain(model, ids=ids)(batch), split)


def test_a_wrong_gradient_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(monkeypatch, "--kinds", "image")
    assert um3_loss.check(given)["error"] < 1e-5
    right = loss_module._add_product
    monkeypatch.setattr(loss_module, "_add_product", lambda total, a, b: right(total, a, 1.001 * b))
    with pytest.raises(UserError, match=r"gradient of lm_head.weight is 1\.0e-03 off"):
        um3_loss.check(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is 0"),
        (["--chunk-tokens", "-1"], "--chunk-tokens is -1"),
        (["--seq-len", "20"], "--seq-len is 20; an image of 8 patches and a caption need 21"),
        (["--bits-per-subtoken", "21"], "--bits-per-subtoken is 21; at most 20"),
        (["--text-vocab-size", "5"], "--text-vocab-size is 5; at least 8"),
    ],
)
def test_bad_numbers_are_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=message):
        options(monkeypatch, *arguments)
