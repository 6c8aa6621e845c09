"""Binary spherical quantization (BSQ): l2-normalise, take signs, pass the gradient straight through.
And vector quantization (VQ), its baseline: the entry of a learned codebook with the largest cosine.

Legend of BSQ: B batch, N patches, M = B * N, L bits, G groups of g bits (L = G * g), K = 2^g states of a group.
The implicit codebook has 2^L corners; no tensor here ever has that size.
Legend of VQ: L dimensions of a vector, K = 2^bits entries of the codebook, C candidates for unused entries.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.bits import bits_to_codes, codes_to_bits, codes_to_subtokens
from tokenizer.configuration import QLIPVisionConfig, check_options
from um3.core.distributed import gather_flat, sum_over_ranks, world_size

MAX_GROUP_SIZE = 12
MAX_CODEBOOK_BITS = 20
"""A search compares each vector with all entries."""
MAX_COSINES = 2**26
"""Cosines of vectors and codebook entries that exist at a time (256 MiB)."""
MAX_REVIVED = 1024
"""Unused entries that a step can replace."""
UNITS = 2.0**30
"""A coordinate of a unit vector is summed as an integer in units of 2^-30: 2^33 vectors fit."""
USED_OPTIONS = {
    **{name: name for name in ("embed_dim", "group_size", "inv_temperature", "gamma0", "gamma1")},
    **{"gamma_0": "gamma0", "gamma_1": "gamma1", "gamma": "gamma1"},
}
"""Options of `quantizer_cfg` that the released quantizers (QLIP's and BSQ-ViT's) and this one share -> our names."""
UNUSED_OPTIONS = {
    "beta": "weight of the commitment loss; the training's is loss.commitment",
    "zeta": "weight of the entropy penalty; the training's is loss.entropy",
    "soft_entropy": "always true here; entropies of hard codes have no gradient for the encoder",
    "persample_entropy_compute": "group and analytical give the same value; it is computed analytically",
    "cb_entropy_compute": "always by group",
    "input_format": "always (batch, patches, bits)",
    "l2_norm": "must be true, for codes of +-1/sqrt(L); vision_config.quantizer_l2_norm decides on z",
}
"""Options of the released quantizers that change a loss at most, and never codes or images -> why they are unused."""


class QuantizerOutput(NamedTuple):
    """The result for a batch of patches; entropies in nats."""

    quantized_BNL: Tensor  # +-1/sqrt(L), with the straight-through gradient
    codes_BN: Tensor  # one int64 code per patch, most significant bit first
    loss: Tensor  # entropy penalty (gamma0 * E[H] - gamma1 * H[E]) / inv_temperature; scalar
    sample_entropy: Tensor  # E[H(Q)]: mean entropy of a patch's soft code
    codebook_entropy: Tensor  # H(E[Q]), summed over groups
    commitment: Tensor  # mean over patches of ||sg(zhat) - z||^2 (SPEC stage 1, weight a_z)
    mean_GK: Tensor  # E[Q]: the mean soft code of each group; it suffices for the entropy of several batches
    vectors_BNL: Tensor  # what was quantized, without gradient; a codebook learns from it


class BinarySphericalQuantizer(nn.Module):
    """z -> sign(z / |z|) / sqrt(L) (QLIP section 3; BSQ-ViT's entropy approximation, factorised over groups)."""

    def __init__(
        self,
        *,
        embed_dim: int = 28,
        group_size: int = 1,
        inv_temperature: float = 1.0,
        l2_norm: bool = True,
        gamma0: float = 1.0,
        gamma1: float = 1.0,
    ):
        super().__init__()
        if embed_dim % group_size:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of group_size {group_size}")
        if group_size > MAX_GROUP_SIZE:
            raise ValueError(f"group_size {group_size} needs 2^{group_size} states; the limit is {MAX_GROUP_SIZE}")
        self.embed_dim, self.group_size, self.inv_temperature = embed_dim, group_size, inv_temperature
        self.num_bits = embed_dim
        self.l2_norm, self.gamma0, self.gamma1 = l2_norm, gamma0, gamma1
        self.scale = embed_dim**-0.5

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, l2_norm: bool) -> "BinarySphericalQuantizer":
        """The quantizer of a config's `quantizer_cfg`; ValueError for an option that no released quantizer has."""
        check_options(options, known={*USED_OPTIONS, *UNUSED_OPTIONS}, where="quantizer_cfg")
        if not options.get("l2_norm", True):
            raise ValueError("quantizer_cfg.l2_norm is false; only codes of +-1/sqrt(bits) are supported")
        values = {new: options[name] for name, new in USED_OPTIONS.items() if name in options}
        for name, value in values.items():
            _check_number(name, value, is_count=name in ("embed_dim", "group_size"))
        return cls(l2_norm=l2_norm, **values)

    def forward(self, z_BNL: Tensor, *, entropy: bool = True) -> QuantizerOutput:
        """Quantize, in float32 also under autocast. `entropy=False` skips the loss terms, which are zero then."""
        with torch.autocast(z_BNL.device.type, enabled=False):
            z_BNL = z_BNL.float()
            if self.l2_norm:
                z_BNL = F.normalize(z_BNL, dim=-1)
            positive_BNL = z_BNL > 0
            hard_BNL = torch.where(positive_BNL, self.scale, -self.scale)
            # The released model passes the gradient through sign() and then scales by 1/sqrt(L), so the gradient
            # has that factor too (checked against its pixel gradient). The value is hard_BNL exactly.
            quantized_BNL = hard_BNL + (z_BNL - z_BNL.detach()) * self.scale
            sample = codebook = commitment = mean_GK = z_BNL.new_zeros(())
            if entropy:
                sample, mean_GK = self.soft_code(z_BNL)
                codebook = codebook_entropy(mean_GK)
                commitment = (hard_BNL.detach() - z_BNL).square().sum(-1).mean()
            loss = self.penalty(sample, codebook)
        codes_BN = bits_to_codes(positive_BNL)
        return QuantizerOutput(quantized_BNL, codes_BN, loss, sample, codebook, commitment, mean_GK, z_BNL.detach())

    def penalty(self, sample: Tensor, codebook: Tensor) -> Tensor:
        """(gamma0 * E[H(Q)] - gamma1 * H(E[Q])) / inv_temperature, as in the released code."""
        return (self.gamma0 * sample - self.gamma1 * codebook) / self.inv_temperature

    def soft_code(self, z_BNL: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(Q)] in nats and E[Q] (G, K), of normalised z.

        The soft code of a group is a softmax over its corners of 2 * inv_temperature * <z, corner>. It factorises into
        independent bits with logit 4 * inv_temperature * z / sqrt(L). The sample entropy is therefore a sum over bits;
        only the batch average of a group needs its 2^g states.
        """
        logit_ML = z_BNL.reshape(-1, self.embed_dim) * (4.0 * self.inv_temperature * self.scale)
        probability_ML = torch.sigmoid(logit_ML)
        # H(p) = softplus(logit) - p * logit, which is exact and finite where p log p is not.
        sample = (F.softplus(logit_ML) - probability_ML * logit_ML).sum(-1).mean()
        if self.group_size == 1:
            mean_L = probability_ML.mean(0)
            return sample, torch.stack([1 - mean_L, mean_L], dim=-1)
        grouped_MGg = probability_ML.unflatten(-1, (-1, self.group_size))
        states_MGK = torch.ones_like(grouped_MGg[..., :1])
        for bit in range(self.group_size):
            p_MG1 = grouped_MGg[..., bit : bit + 1]
            states_MGK = torch.cat([states_MGK * (1 - p_MG1), states_MGK * p_MG1], dim=-1)
        return sample, states_MGK.mean(0)

    def codes_to_quantized(self, codes_BN: Tensor) -> Tensor:
        """Codes (B, N) -> float32 (B, N, L) of +-1/sqrt(L)."""
        return (2 * codes_to_bits(codes_BN, num_bits=self.embed_dim) - 1).float() * self.scale


def codebook_entropy(mean_GK: Tensor) -> Tensor:
    """H(E[Q]) in nats, summed over groups, of the mean soft code."""
    return -torch.xlogy(mean_GK, mean_GK).sum()


class VectorQuantizer(nn.Module):
    """z -> the unit vector of a codebook of 2^num_bits entries with the largest cosine (as in LlamaGen).

    No gradient trains the codebook: `initialise` finds it by k-means, and `update` moves each entry with the running
    mean of the vectors that chose it (van den Oord et al. 2017, appendix A.1). Both are collective calls that leave the
    same bits on every rank: sums over vectors are sums of integers, whose order does not matter.
    """

    trained_buffers = ("codebook", "counts")
    codebook: Tensor
    """Running sum of an entry's vectors per step (K, L); only its direction matters. Zero before `initialise`."""
    counts: Tensor
    """Running number of an entry's vectors per step (K)."""

    def __init__(self, *, num_bits: int, embed_dim: int):
        super().__init__()
        if num_bits > MAX_CODEBOOK_BITS:
            raise ValueError(
                f"a VQ codebook of 2^{num_bits} entries is too large; use {MAX_CODEBOOK_BITS} bits or fewer"
            )
        self.num_bits, self.embed_dim = num_bits, embed_dim
        self.register_buffer("codebook", torch.zeros(1 << num_bits, embed_dim))
        self.register_buffer("counts", torch.zeros(1 << num_bits))

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, l2_norm: bool) -> "VectorQuantizer":
        """The quantizer of a config's `quantizer_cfg`, which holds `num_bits` and `embed_dim` and nothing else."""
        check_options(options, known={"num_bits", "embed_dim"}, where="quantizer_cfg of a vq")
        if not l2_norm:
            raise ValueError("vision_config.quantizer_l2_norm is false; a vq compares normalised vectors")
        for name in ("num_bits", "embed_dim"):
            _check_number(name, options.get(name), is_count=True)
        return cls(**options)

    def forward(self, z_BNL: Tensor, *, entropy: bool = True) -> QuantizerOutput:
        """Quantize, in float32 also under autocast. There are no entropies: they are zero, of one soft code."""
        with torch.autocast(z_BNL.device.type, enabled=False):
            z_BNL = F.normalize(z_BNL.float(), dim=-1)
            codes_BN = self._nearest(z_BNL.detach().flatten(0, -2))[0].view(z_BNL.shape[:-1])
            hard_BNL = self._entries(codes_BN)
            quantized_BNL = hard_BNL + (z_BNL - z_BNL.detach())
            commitment = (hard_BNL - z_BNL).square().sum(-1).mean()
            nothing = z_BNL.new_zeros(())
        mean_GK = z_BNL.new_ones(1, 1)
        return QuantizerOutput(quantized_BNL, codes_BN, nothing, nothing, nothing, commitment, mean_GK, z_BNL.detach())

    def penalty(self, sample: Tensor, codebook: Tensor) -> Tensor:
        """Zero: unused entries are revived instead."""
        return 0.0 * (sample - codebook)

    def codes_to_quantized(self, codes_BN: Tensor) -> Tensor:
        """Codes (B, N) -> float32 unit vectors (B, N, L)."""
        # The one sub-token is the code itself, whose range is checked.
        return self._entries(codes_to_subtokens(codes_BN, subtokens=1, bits_per_subtoken=self.num_bits)[..., 0])

    @property
    def is_empty(self) -> bool:
        """Whether there is no codebook yet."""
        return not self.codebook.any()

    @torch.no_grad()
    def initialise(self, vectors_ML: Tensor, *, step_vectors: int, iterations: int, generator: torch.Generator) -> None:
        """k-means of the unit vectors of all ranks (as many on each). A training step has `step_vectors` in all.

        ValueError if they are fewer than the entries. The generator (CPU) decides which vectors the entries start from.
        """
        size = len(self.codebook)
        share, total = math.ceil(size / world_size()), len(vectors_ML) * world_size()
        if total < size:
            raise ValueError(f"{total:,} vectors for a codebook of {size:,} entries")
        first_K = torch.randperm(len(vectors_ML), generator=generator)[:share].to(vectors_ML.device)
        self.codebook.copy_(gather_flat(vectors_ML[first_K])[:size])
        for iteration in range(iterations):
            sums_KL, counts_K, cosine_M = self._sums(vectors_ML)
            self.codebook.copy_(torch.where(counts_K[:, None] > 0, sums_KL, self.codebook))
            self.counts.copy_(counts_K)
            if iteration + 1 < iterations:
                self._revive(self.counts == 0, vectors_ML, cosine_M=cosine_M, generator=generator)
        self.codebook.mul_(step_vectors / total)
        self.counts.mul_(step_vectors / total)

    @torch.no_grad()
    def update(
        self, vectors_ML: Tensor, *, decay: float, revive_below: float, generator: torch.Generator
    ) -> dict[str, float]:
        """Move the entries to the unit vectors of a step, and revive those with few; return metrics.

        An entry whose running count is below `revive_below` times the mean of all becomes a vector of this step, the
        rather the farther that is from its entry.
        """
        sums_KL, counts_K, cosine_M = self._sums(vectors_ML)
        self.codebook.lerp_(sums_KL, 1 - decay)
        self.counts.lerp_(counts_K, 1 - decay)
        unused_K = self.counts < revive_below * self.counts.mean()
        revived = self._revive(unused_K, vectors_ML, cosine_M=cosine_M, generator=generator)
        share_K = counts_K / counts_K.sum()
        return {
            "codebook/perplexity": float(torch.exp(-torch.xlogy(share_K, share_K).sum())),
            "codebook/unused": float(unused_K.sum()),
            "codebook/revived": float(revived),
        }

    def _entries(self, codes_BN: Tensor) -> Tensor:
        return F.normalize(self.codebook[codes_BN].float(), dim=-1)

    def _nearest(self, vectors_ML: Tensor) -> tuple[Tensor, Tensor]:
        """The entry with the largest cosine to each vector (M), and that cosine."""
        entries_LK = F.normalize(self.codebook.float(), dim=-1).T
        found = [(rows @ entries_LK).max(-1) for rows in vectors_ML.split(max(1, MAX_COSINES // entries_LK.shape[1]))]
        return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])

    def _sums(self, vectors_ML: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum (K, L) and number (K) of the vectors of each entry, of all ranks; cosine of this rank's vectors (M)."""
        codes_M, cosine_M = self._nearest(vectors_ML)
        units_ML = F.pad((vectors_ML.double() * UNITS).round().long(), (0, 1), value=1)  # the last column counts
        table = torch.zeros(len(self.codebook), self.embed_dim + 1, dtype=torch.int64, device=vectors_ML.device)
        table = sum_over_ranks(table.index_add_(0, codes_M, units_ML))
        return (table[:, :-1].double() / UNITS).float(), table[:, -1].float(), cosine_M

    def _revive(self, unused_K: Tensor, vectors_ML: Tensor, *, cosine_M: Tensor, generator: torch.Generator) -> int:
        """Replace unused entries by vectors, drawn without replacement in proportion to 1 - cosine; return how many.

        A new entry has the mean count, so that it lasts until it had the time to be chosen.
        """
        share = min(len(vectors_ML), math.ceil(MAX_REVIVED / world_size()))
        waiting_M = torch.empty(len(vectors_ML)).exponential_(generator=generator).to(vectors_ML.device)
        chosen_C = ((1 - cosine_M).clamp(min=1e-12) / waiting_M).topk(share).indices
        candidates_CL = gather_flat(vectors_ML[chosen_C])
        entries_C = unused_K.nonzero().flatten()[: len(candidates_CL)]
        mean = self.counts.mean()
        self.codebook[entries_C] = candidates_CL[: len(entries_C)] * mean
        self.counts[entries_C] = mean
        return len(entries_C)


Quantizer = BinarySphericalQuantizer | VectorQuantizer
QUANTIZERS: dict[str, type[BinarySphericalQuantizer] | type[VectorQuantizer]] = {
    "bsq": BinarySphericalQuantizer,
    "vq": VectorQuantizer,
}


def build_quantizer(config: QLIPVisionConfig) -> Quantizer:
    """The quantizer of a visual tower; ValueError for an unknown kind or option."""
    if config.quantizer not in QUANTIZERS or config.quantizer_embed_type != "mlp":
        kind = f"quantizer '{config.quantizer}' with embedding '{config.quantizer_embed_type}'"
        raise ValueError(f"vision_config: {kind} is not supported; use 'bsq' (the released QLIPs) or 'vq', with 'mlp'")
    return QUANTIZERS[config.quantizer].from_options(config.quantizer_cfg or {}, l2_norm=config.quantizer_l2_norm)


def _check_number(name: str, value: Any, *, is_count: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if is_count else int | float) or value < is_count:
        raise ValueError(f"quantizer_cfg.{name} is {value!r}; it must be a {'positive ' * is_count}number")
