"""InfoNCE over two processes is InfoNCE on the global batch: the loss, and the gradient through the gathering.

Legend: G global batch, B batch of a rank, P projection.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.processes import run_on_ranks
from tokenizer.losses import info_nce
from um3.core.distributed import rank, world_size


def loss_and_gradients() -> dict[str, Any]:
    """This rank's loss, accuracy and gradients on its share of one fixed global batch."""
    generator = torch.Generator().manual_seed(3)
    image_BP, text_BP = (
        torch.randn(6, 5, generator=generator).chunk(world_size())[rank()].clone().requires_grad_() for _ in range(2)
    )
    log_scale = torch.tensor(1.5, requires_grad=True)
    result = info_nce(F.normalize(image_BP, dim=-1), F.normalize(text_BP, dim=-1), logit_scale=log_scale.exp())
    result.loss.backward()
    values = {"loss": result.loss.item(), "accuracy": result.accuracy.item()}
    for name, tensor in {"image": image_BP, "text": text_BP, "scale": log_scale}.items():
        assert tensor.grad is not None
        values[name] = (tensor.grad / world_size()).tolist()  # the engine averages gradients over ranks
    return values


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_computes(tmp_path: Path) -> None:
    whole = loss_and_gradients()
    first, second = run_on_ranks(loss_and_gradients, folder=tmp_path)
    assert first["loss"] != second["loss"]
    for key in ("loss", "accuracy"):
        assert (first[key] + second[key]) / 2 == pytest.approx(whole[key], rel=1e-6)
    assert first["scale"] + second["scale"] == pytest.approx(whole["scale"], rel=1e-5)
    for key in ("image", "text"):
        torch.testing.assert_close(torch.tensor(first[key] + second[key]), torch.tensor(whole[key]))
