"""Binary spherical quantization (BSQ): l2-normalise, take signs, pass the gradient straight through.

Legend: B batch, N patches, M = B * N, L bits, G groups of g bits (L = G * g), K = 2^g states of a group.
The implicit codebook has 2^L corners; no tensor here ever has that size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.bits import bits_to_codes, codes_to_bits
from tokenizer.configuration import check_options

MAX_GROUP_SIZE = 12
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
            is_count = name in ("embed_dim", "group_size")
            if isinstance(value, bool) or not isinstance(value, int if is_count else int | float) or value < is_count:
                raise ValueError(f"quantizer_cfg.{name} is {value!r}; it must be a {'positive ' * is_count}number")
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
        return QuantizerOutput(quantized_BNL, bits_to_codes(positive_BNL), loss, sample, codebook, commitment, mean_GK)

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
