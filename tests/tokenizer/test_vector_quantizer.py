"""The VQ baseline: nearest entries, k-means, running means, revived entries; equal on all ranks, in any order."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.processes import run_on_ranks
from tests.tokenizer.conftest import tiny_config
from tokenizer.modeling import QLIPModel, load_qlip
from tokenizer.quantizer import VectorQuantizer
from um3.core.distributed import rank, world_size
from um3.core.errors import UserError


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(count, *, size, num_clusters=8):
    """`count` unit vectors of `size` dimensions around a few directions."""
    centres = torch.randn(num_clusters, size, generator=random(1))
    return F.normalize(centres.repeat(count // num_clusters, 1) + 0.1 * torch.randn(count, size, generator=random(2)))


def fitted(vectors, *, num_bits=3, iterations=5):
    quantizer = VectorQuantizer(num_bits=num_bits, embed_dim=vectors.shape[1])
    quantizer.initialise(vectors, step_vectors=len(vectors), iterations=iterations, generator=random())
    return quantizer


def test_values_codes_commitment_and_straight_through_gradient():
    quantizer = VectorQuantizer(num_bits=2, embed_dim=2)
    quantizer.codebook.copy_(torch.tensor([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -3.0]]))
    z = torch.tensor([[[3.0, 4.0], [0.1, -0.01]]], requires_grad=True)
    output = quantizer(z)
    assert output.codes_BN.tolist() == [[1, 0]] and output.quantized_BNL.tolist() == [[[0.0, 1.0], [1.0, 0.0]]]
    assert torch.equal(quantizer.codes_to_quantized(output.codes_BN), output.quantized_BNL.detach())
    unit = F.normalize(z, dim=-1)
    distance = (unit - output.quantized_BNL).square().sum(-1).mean()
    torch.testing.assert_close(output.commitment, distance)
    (through,) = torch.autograd.grad(output.quantized_BNL.sum(), z)
    (expected,) = torch.autograd.grad(unit.sum(), z)
    assert torch.equal(through, expected)
    for code in (-1, 4):
        with pytest.raises(ValueError, match="2\\^2"):
            quantizer.codes_to_quantized(torch.tensor([[code]]))


def test_kmeans_finds_the_clusters_and_the_running_means_follow():
    vectors = clusters(800, size=4)
    quantizer = fitted(vectors, iterations=20)
    assert float(quantizer(vectors[None]).commitment) < 0.1
    assert quantizer.counts.sum() == 800
    turned = F.normalize(vectors + 0.3, dim=-1)
    for _ in range(60):
        quantizer.update(turned, decay=0.8, revive_below=0.0, generator=random())
    entries = F.normalize(quantizer.codebook, dim=-1)
    codes = quantizer(turned[None]).codes_BN[0]
    for code in codes.unique():
        torch.testing.assert_close(entries[code], F.normalize(turned[codes == code].sum(0), dim=0), atol=1e-4, rtol=0)


def test_unused_entries_are_revived_with_vectors_of_the_step():
    vectors = clusters(64, size=4)
    quantizer = fitted(vectors)
    quantizer.codebook[5], quantizer.counts[5] = -quantizer.codebook.sum(0), 0.0
    metrics = quantizer.update(vectors, decay=0.99, revive_below=0.5, generator=random())
    assert metrics["codebook/revived"] >= 1 and metrics["codebook/perplexity"] > 2
    revived = F.normalize(quantizer.codebook[5], dim=0)
    assert (vectors @ revived).max() > 1 - 1e-6
    assert quantizer.update(vectors, decay=0.99, revive_below=0.0, generator=random())["codebook/revived"] == 0


def test_the_order_of_vectors_and_the_size_of_a_search_change_no_bit(monkeypatch):
    vectors = clusters(512, size=4)
    first, second = (fitted(vectors, num_bits=5) for _ in range(2))
    assert torch.equal(first.codebook, second.codebook)
    first.update(vectors, decay=0.9, revive_below=0.0, generator=random())
    monkeypatch.setattr("tokenizer.quantizer.MAX_COSINES", 64)
    second.update(vectors.flip(0), decay=0.9, revive_below=0.0, generator=random())
    assert torch.equal(first.codebook, second.codebook) and torch.equal(first.counts, second.counts)


def codebook_of_this_rank():
    """The codebook after k-means and two steps, of this rank's share of 256 vectors."""
    vectors = clusters(256, size=4).split(256 // world_size())[rank()]
    quantizer = VectorQuantizer(num_bits=5, embed_dim=4)
    quantizer.initialise(vectors, step_vectors=256, iterations=3, generator=random(rank()))
    for step in range(2):
        quantizer.update(vectors, decay=0.9, revive_below=0.3, generator=random(10 * rank() + step))
    return quantizer.codebook.tolist(), quantizer.counts.tolist()


def test_every_rank_has_the_same_codebook(tmp_path):
    first, second = run_on_ranks(codebook_of_this_rank, folder=tmp_path)
    assert first == second and sum(first[1]) == pytest.approx(256, rel=0.3)


def vq_config(**options):
    return tiny_config(quantizer="vq", quantizer_cfg={"num_bits": 6, "embed_dim": 4} | options)


def test_a_folder_keeps_the_codebook(tmp_path):
    torch.manual_seed(0)
    model = QLIPModel(vq_config()).eval()
    assert model.num_bits == 6 and model.vision_model.quantizer.is_empty
    pixels = torch.randn(32, 3, 16, 16)
    vectors = model(pixels).quantizer_input.flatten(0, 1)
    model.vision_model.quantizer.initialise(vectors, step_vectors=128, iterations=3, generator=random())
    codes = model.encode(pixels)
    assert len(codes.unique()) > 16
    model.save_pretrained(tmp_path)
    loaded = load_qlip(tmp_path)
    assert loaded.fingerprint() == model.fingerprint() and torch.equal(loaded.encode(pixels), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_bits": 28}, r"2\^28"),
        ({"num_bits": 0}, "num_bits"),
        ({"embed_dim": "4"}, "embed_dim"),
        ({"group_size": 1}, "group_size"),
    ],
)
def test_codebooks_that_cannot_be_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        QLIPModel(vq_config(**options))


def test_a_damaged_size_is_one_line(tmp_path):
    torch.manual_seed(0)
    QLIPModel(vq_config()).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_bits": 6', '"num_bits": 7'))
    with pytest.raises(UserError, match="codebook"):
        load_qlip(tmp_path)
