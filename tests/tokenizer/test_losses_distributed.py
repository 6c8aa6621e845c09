"""InfoNCE over two processes is InfoNCE on the whole batch: the loss, and the gradient behind the gathering.

Legend: G global batch, B rows of a rank, P projection.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.processes import run_on_ranks
from tokenizer.losses import info_nce
from um3.core.distributed import rank, world_size

GLOBAL_ROWS, WIDTH = 6, 5


def loss_and_gradients() -> dict[str, Any]:
    """This rank's loss, accuracy and gradients on its share of one fixed global batch."""
    generator = torch.Generator().manual_seed(3)
    image_GP, text_GP = (torch.randn(GLOBAL_ROWS, WIDTH, generator=generator) for _ in range(2))
    share = GLOBAL_ROWS // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    image_BP, text_BP = image_GP[rows].clone().requires_grad_(), text_GP[rows].clone().requires_grad_()
    log_scale = torch.tensor(1.5, requires_grad=True)
    found = info_nce(F.normalize(image_BP, dim=-1), F.normalize(text_BP, dim=-1), logit_scale=log_scale.exp())
    found.loss.backward()
    # The mean over ranks is what the engine makes of gradients; here it is taken of what each rank computed.
    gradients = [image_BP.grad, text_BP.grad, log_scale.grad]
    assert all(gradient is not None for gradient in gradients)
    image, text, scale = [(gradient / world_size()).tolist() for gradient in gradients if gradient is not None]
    return {"loss": found.loss.item(), "accuracy": found.accuracy.item(), "image": image, "text": text, "scale": scale}


def test_two_ranks_compute_what_one_process_computes(tmp_path: Path) -> None:
    whole = loss_and_gradients()
    first, second = run_on_ranks(loss_and_gradients, folder=tmp_path)
    assert first["loss"] != second["loss"]
    for key in ("loss", "accuracy"):
        assert (first[key] + second[key]) / 2 == pytest.approx(whole[key], rel=1e-6)
    assert first["scale"] + second["scale"] == pytest.approx(whole["scale"], rel=1e-5)
    for key in ("image", "text"):
        torch.testing.assert_close(torch.tensor(first[key] + second[key]), torch.tensor(whole[key]))
