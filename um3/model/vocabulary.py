"""The id space of UM3: text entries first, then one range of visual entries per subtoken.

A code of `subtokens * bits_per_subtoken` bits is `subtokens` consecutive visual ids, high bits first; subtoken s owns the
range [text_vocab_size + s * 2**bits_per_subtoken, text_vocab_size + (s + 1) * 2**bits_per_subtoken). Begin and end of
image are text entries: the model chooses the modality in the text half of the softmax.

Shapes: B batch, N patches of an image, P = N * subtokens visual ids of an image.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tokenizer.bits import codes_to_subtokens, subtokens_to_codes


@dataclass(frozen=True)
class UnifiedVocabulary:
    """Where every kind of id lies; stored in a model's config.json under "um3".

    Raises:
        ValueError: a special id outside the text entries, or a cut of the code that int64 cannot hold.
    """

    text_vocab_size: int
    subtokens: int
    bits_per_subtoken: int
    num_patches: int
    bos_id: int
    eos_id: int
    pad_id: int
    begin_of_image_id: int
    end_of_image_id: int

    def __post_init__(self) -> None:
        if self.subtokens < 1 or self.bits_per_subtoken < 1 or self.num_patches < 1:
            raise ValueError(f"subtokens, bits_per_subtoken and num_patches must be at least 1: {self}")
        if self.bits_per_subtoken > 20 or self.num_bits > 60:
            raise ValueError(
                f"{self.subtokens} subtokens of {self.bits_per_subtoken} bits: a subtoken has at most 20 bits (it owns 2**bits output "
                "rows) and a code at most 60; use more subtokens of fewer bits"
            )
        for name in ("bos_id", "eos_id", "pad_id", "begin_of_image_id", "end_of_image_id"):
            value = getattr(self, name)
            if not 0 <= value < self.text_vocab_size:
                raise ValueError(f"{name} = {value} is not a text entry (0 .. {self.text_vocab_size - 1})")

    @property
    def num_bits(self) -> int:
        """Bits of one code."""
        return self.subtokens * self.bits_per_subtoken

    @property
    def visual_vocab_size(self) -> int:
        """Number of visual entries, all subtokens together."""
        return self.subtokens << self.bits_per_subtoken

    @property
    def vocab_size(self) -> int:
        """Text and visual entries together."""
        return self.text_vocab_size + self.visual_vocab_size

    @property
    def image_tokens(self) -> int:
        """Visual ids of one image, begin and end of image not counted."""
        return self.num_patches * self.subtokens

    @property
    def marks(self) -> set[int]:
        """The special ids among the text entries."""
        return {self.bos_id, self.eos_id, self.pad_id, self.begin_of_image_id, self.end_of_image_id}

    def subtoken_range(self, subtoken: int) -> tuple[int, int]:
        """First id of `subtoken` and the id after its last."""
        if not 0 <= subtoken < self.subtokens:
            raise ValueError(f"subtoken {subtoken} does not exist; there are {self.subtokens}")
        start = self.text_vocab_size + (subtoken << self.bits_per_subtoken)
        return start, start + (1 << self.bits_per_subtoken)

    def codes_to_ids(self, codes_BN: Tensor) -> Tensor:
        """Codes (..., N) int64 -> visual ids (..., N * subtokens), the subtokens of a patch side by side."""
        subtokens_BNS = codes_to_subtokens(codes_BN, subtokens=self.subtokens, bits_per_subtoken=self.bits_per_subtoken)
        return (subtokens_BNS + self._subtoken_starts(codes_BN.device)).flatten(-2)

    def ids_to_codes(self, ids_BP: Tensor) -> Tensor:
        """Visual ids (..., N * subtokens) -> codes (..., N).

        Raises:
            ValueError: a number of ids that is no multiple of the subtokens, or an id outside its subtoken's range.
        """
        if ids_BP.shape[-1] % self.subtokens:
            raise ValueError(
                f"{ids_BP.shape[-1]} visual ids are no whole number of codes of {self.subtokens} subtokens"
            )
        subtokens_BNS = ids_BP.unflatten(-1, (-1, self.subtokens)) - self._subtoken_starts(ids_BP.device)
        illegal_BNS = (subtokens_BNS < 0) | (subtokens_BNS >= 1 << self.bits_per_subtoken)
        if illegal_BNS.any():
            first = int(illegal_BNS.flatten().nonzero()[0])
            position = first % ids_BP.shape[-1]
            subtoken = position % self.subtokens
            raise ValueError(
                f"id {int(ids_BP.flatten()[first])} at position {position} is outside the range "
                f"{self.subtoken_range(subtoken)} of subtoken {subtoken}"
            )
        return subtokens_to_codes(subtokens_BNS, bits_per_subtoken=self.bits_per_subtoken)

    def to_dict(self) -> dict[str, int]:
        """The fields as plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; keys of others (such as the fingerprint) are passed over."""
        return cls(**{field.name: int(values[field.name]) for field in dataclasses.fields(cls)})

    def _subtoken_starts(self, device: torch.device) -> Tensor:
        return self.text_vocab_size + (torch.arange(self.subtokens, device=device) << self.bits_per_subtoken)
