"""Stage 1's gradient is that of the whole batch, for any number of micro-batches and ranks."""

import pytest
import torch

from tests.helpers.processes import run_on_ranks
from tests.train.conftest import ROOT, TINY
from train.engine import start_runtime, step_engine
from train.recipes import stage1
from train.settings.tokenizer import Stage1Config
from um3.core.config import load_config


def gradients(*, micro_batch_size):
    """The gradients of the first optimizer step, and its losses under the name ""."""
    overrides = [*TINY["stage1"], f"loop.micro_batch_size={micro_batch_size}", "engine.zero_stage=0"]
    path = ROOT / "configs/demo.yaml"
    config = load_config(Stage1Config, path=path, section="stage1", overrides=[*overrides, "optimizer.kind=adamw"])
    start_runtime(config.loop)
    task = stage1.build_task(config)
    task.build_engines()
    collected = {}

    def keep_and_step(engine):
        for name, parameter in engine.module.named_parameters():
            if parameter.grad is not None:
                collected[name] = parameter.grad.flatten().tolist()
        return step_engine(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "step_engine", keep_and_step)
        values = task.train_step(0)
    task.batches.close()
    return collected | {"": [value for name, value in values.items() if name.startswith("train/")]}


def gradients_in_micro_batches():
    """For two ranks: two micro-batches of two images on each."""
    return gradients(micro_batch_size=2)


def assert_equal(collected, expected):
    assert collected.keys() == expected.keys() and "qlip.logit_scale" in collected
    largest = max(torch.tensor(values).norm() for values in expected.values())
    for name, values in expected.items():
        whole = torch.tensor(values)
        # Some gradients are zero but for rounding (a key's bias moves all logits of a softmax alike).
        assert (torch.tensor(collected[name]) - whole).norm() <= 1e-5 * whole.norm() + 1e-8 * largest, name


@pytest.mark.parametrize("micro_batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_micro_batches_on_one_device(micro_batch_size):
    assert_equal(gradients(micro_batch_size=micro_batch_size), gradients(micro_batch_size=0))


@pytest.mark.slow
def test_micro_batches_on_two_ranks(tmp_path):
    whole = gradients(micro_batch_size=0)
    for share in run_on_ranks(gradients_in_micro_batches, folder=tmp_path):
        assert_equal(share, whole)
