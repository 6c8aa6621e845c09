"""InfoNCE, adversarial and perceptual terms."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tests.tokenizer.conftest import lpips_files
from tokenizer.discriminator import DiscriminatorKind, build_discriminator
from tokenizer.losses import AdversarialKind, discriminator_loss, generator_loss, info_nce
from tokenizer.perceptual import build_perceptual_distance, lpips_vgg, random_feature_distance
from um3.core.errors import UserError


def test_info_nce_equals_the_textbook_form() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    logits = 10 * image @ text.T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(info_nce(image, text, logit_scale=torch.tensor(10.0)).loss, expected)
    assert float(info_nce(image, image, logit_scale=torch.tensor(100.0)).accuracy) == 1.0


def test_info_nce_in_chunks_is_the_same_and_saves_no_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    results: list[tuple[torch.Tensor, ...]] = []
    largest: list[int] = []
    for chunk_rows in (7, 2):
        image, text = (torch.randn(7, 3, generator=generator.manual_seed(s)).requires_grad_() for s in (1, 2))
        scale = torch.tensor(5.0, requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            loss, accuracy = info_nce(image, text, logit_scale=scale, chunk_rows=chunk_rows)
        loss.backward()
        results.append((loss.detach(), accuracy, image.grad, text.grad, scale.grad))
        largest.append(max(sizes))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)
    assert largest == [7 * 7, 7 * 3]  # the logits; the embeddings


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_adversarial_terms_pull_apart_and_together(kind: AdversarialKind) -> None:
    good, bad = torch.full((4,), 2.0), torch.full((4,), -2.0)
    assert discriminator_loss(good, bad, kind=kind) < discriminator_loss(bad, good, kind=kind)
    assert generator_loss(good, kind=kind) < generator_loss(bad, kind=kind)


@pytest.mark.parametrize("kind", get_args(DiscriminatorKind))
def test_discriminator_learns_to_separate_two_sets(kind: DiscriminatorKind) -> None:
    torch.manual_seed(0)
    model = build_discriminator(kind, channels=8, num_layers=2, image_size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    real, fake = torch.rand(8, 3, 32, 32) * 2 - 1, torch.zeros(8, 3, 32, 32)
    losses = []
    for _ in range(12):
        loss = discriminator_loss(model(real), model(fake), kind="hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    # The logit of an image does not depend on the rest of the batch.
    torch.testing.assert_close(model(real)[:1], model(real[:1]))


@pytest.mark.parametrize(("kind", "channels", "num_layers"), [("patch", 8, 5), ("patch", 6, 2), ("residual", 8, 6)])
def test_a_discriminator_that_does_not_fit_is_refused(kind: DiscriminatorKind, channels: int, num_layers: int) -> None:
    with pytest.raises(UserError, match=f"kind {kind} with channels={channels} .* of 32 pixels"):
        build_discriminator(kind, channels=channels, num_layers=num_layers, image_size=32)


def test_random_features_are_seeded_frozen_and_never_called_lpips() -> None:
    torch.manual_seed(0)
    first = random_feature_distance()
    torch.manual_seed(1)
    second = random_feature_distance()
    image, noisy = torch.zeros(2, 3, 32, 32), 0.1 * torch.randn(2, 3, 32, 32)
    assert float(first(image, image)) == 0.0
    assert torch.equal(first(image, noisy), second(image, noisy)) and float(first(image, noisy)) > 0
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert "lpips" not in first.name


def test_lpips_loads_the_published_layout_and_refuses_others(tmp_path: Path) -> None:
    backbone, heads = lpips_files(tmp_path)
    distance = lpips_vgg(backbone=backbone, heads=heads)
    assert distance.name == "lpips_vgg"
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert float(distance(image, -image)) > float(distance(image, image)) == 0.0
    with pytest.raises(UserError, match="VGG-16"):
        lpips_vgg(backbone=heads, heads=backbone)
    with pytest.raises(UserError, match="does not exist"):
        lpips_vgg(backbone=tmp_path / "absent.pth", heads=heads)
    with pytest.raises(UserError, match="both"):
        build_perceptual_distance(backbone="x", heads="")
    (tmp_path / "noise.pth").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="cannot be read"):
        lpips_vgg(backbone=tmp_path / "noise.pth", heads=heads)
