"""InfoNCE, also over two processes, adversarial and perceptual terms."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.processes import run_on_ranks
from tests.tokenizer.conftest import lpips_files
from tokenizer import losses
from tokenizer.discriminator import DiscriminatorKind, build_discriminator
from tokenizer.losses import (
    build_perceptual_distance,
    discriminator_loss,
    generator_loss,
    info_nce,
    lpips_vgg,
    random_feature_distance,
)
from um3.core.distributed import rank, world_size
from um3.core.errors import UserError


def test_info_nce_equals_the_textbook_form():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    logits = 10 * image @ text.T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(info_nce(image, text, logit_scale=torch.tensor(10.0)).loss, expected)
    assert float(info_nce(image, image, logit_scale=torch.tensor(100.0)).accuracy) == 1.0


def loss_and_gradients():
    """This rank's loss, accuracy and gradients on its share of one fixed global batch."""
    generator = torch.Generator().manual_seed(3)
    image_BP, text_BP = (
        torch.randn(6, 5, generator=generator).chunk(world_size())[rank()].clone().requires_grad_() for _ in range(2)
    )
    log_scale = torch.tensor(1.5, requires_grad=True)
    result = info_nce(F.normalize(image_BP, dim=-1), F.normalize(text_BP, dim=-1), logit_scale=log_scale.exp())
    gradients = torch.autograd.grad(result.loss, (image_BP, text_BP, log_scale))
    means = [(gradient / world_size()).tolist() for gradient in gradients]  # the engine averages over ranks
    return {"values": [result.loss.item(), result.accuracy.item()], "gradients": means}


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_computes(tmp_path):
    whole = loss_and_gradients()
    first, second = run_on_ranks(loss_and_gradients, folder=tmp_path)
    assert first["values"] != second["values"]
    assert [sum(pair) / 2 for pair in zip(first["values"], second["values"], strict=True)] == pytest.approx(
        whole["values"], rel=1e-6
    )
    *embeds, scale = (a + b for a, b in zip(first["gradients"], second["gradients"], strict=True))
    assert scale == pytest.approx(whole["gradients"][2], rel=1e-5)
    torch.testing.assert_close(torch.tensor(embeds), torch.tensor(whole["gradients"][:2]))


def test_info_nce_in_chunks_is_the_same_and_saves_no_logits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    results = []
    largest = []
    for chunk_rows in (7, 2):
        monkeypatch.setattr(losses, "CHUNK_ROWS", chunk_rows)
        image, text = (torch.randn(7, 3, generator=generator.manual_seed(s)).requires_grad_() for s in (1, 2))
        scale = torch.tensor(5.0, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            loss, accuracy = info_nce(image, text, logit_scale=scale)
        loss.backward()
        results.append((loss.detach(), accuracy, image.grad, text.grad, scale.grad))
        largest.append(max(sizes))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)
    assert largest == [7 * 7, 7 * 3]  # the logits; the embeddings


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_adversarial_terms_pull_apart_and_together(kind):
    good, bad = torch.full((4,), 2.0), torch.full((4,), -2.0)
    assert discriminator_loss(good, bad, kind=kind) < discriminator_loss(bad, good, kind=kind)
    assert generator_loss(good, kind=kind) < generator_loss(bad, kind=kind)


@pytest.mark.parametrize("kind", get_args(DiscriminatorKind))
def test_discriminator_learns_to_separate_two_sets(kind):
    torch.manual_seed(0)
    model = build_discriminator(kind, channels=8, num_layers=2, image_size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    real, fake = torch.rand(8, 3, 32, 32) * 2 - 1, torch.zeros(8, 3, 32, 32)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        values.append(discriminator_loss(model(real), model(fake), kind="hinge"))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]
    # The logit of an image does not depend on the rest of the batch.
    torch.testing.assert_close(model(real)[:1], model(real[:1]))


@pytest.mark.parametrize(("kind", "channels", "num_layers"), [("patch", 8, 5), ("patch", 6, 2), ("residual", 8, 6)])
def test_a_discriminator_that_does_not_fit_is_refused(kind, channels, num_layers):
    with pytest.raises(UserError, match=f"kind {kind} with channels={channels} .* of 32 pixels"):
        build_discriminator(kind, channels=channels, num_layers=num_layers, image_size=32)


def test_random_features_are_seeded_frozen_and_never_called_lpips():
    first, second = (random_feature_distance() for _ in range(2))
    image, noisy = torch.zeros(2, 3, 32, 32), 0.1 * torch.randn(2, 3, 32, 32)
    assert float(first(image, image)) == 0.0
    assert torch.equal(first(image, noisy), second(image, noisy)) and float(first(image, noisy)) > 0
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert "lpips" not in first.name


def test_lpips_loads_the_published_layout_and_refuses_others(tmp_path):
    backbone, heads = lpips_files(tmp_path)
    distance = lpips_vgg(backbone=backbone, heads=heads)
    assert distance.name == "lpips_vgg"
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert float(distance(image, -image)) > float(distance(image, image)) == 0.0
    (tmp_path / "noise.pth").write_bytes(b"not a tensor file")
    wrong = {"VGG-16": heads, "does not exist": tmp_path / "absent.pth", "cannot be read": tmp_path / "noise.pth"}
    for message, file in wrong.items():
        with pytest.raises(UserError, match=message):
            lpips_vgg(backbone=file, heads=heads)
    with pytest.raises(UserError, match="both"):
        build_perceptual_distance(backbone="x", heads="")
