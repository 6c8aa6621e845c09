"""The vocabulary of UM3: text entries first, then one range of visual entries per sub-token.

A code of `subtokens * bits_per_subtoken` bits becomes `subtokens` consecutive visual ids, high bits first. Sub-token s
owns the ids from text_vocab_size + s * 2**bits_per_subtoken to text_vocab_size + (s + 1) * 2**bits_per_subtoken - 1.
Begin and end of image are text entries: the model chooses the modality in the text half of the softmax.

A model with a depth head (`um3.model.visual_parts`) reads a patch at one position. There a patch is one id of a
sequence, text_vocab_size + code, and the visual entries above are the rows of its sub-tokens.

Shapes: B batch, N patches of an image, P visual ids of an image, T ids of a sequence, S sub-tokens that an id stands
for.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.bits import codes_to_subtokens, subtokens_to_codes
from um3.core.errors import UserError
from um3.model.configuration import OLD_KEYS

SPECIAL_IDS = ("bos_id", "eos_id", "pad_id", "begin_of_image_id", "end_of_image_id")


@dataclass(frozen=True)
class UnifiedVocabulary:
    """The ranges and special ids of a model's vocabulary; stored in its config.json under "um3".

    ValueError: a special id outside the text entries, or sub-tokens that do not fit int64 codes.
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
    depth_layers: int = 0
    """Layers of the depth head; 0: there is none, and every sub-token has a position of its own."""

    def __post_init__(self) -> None:
        if self.subtokens < 1 or self.bits_per_subtoken < 1 or self.num_patches < 1:
            raise ValueError(f"subtokens, bits_per_subtoken and num_patches must be at least 1: {self}")
        if self.bits_per_subtoken > 20 or self.num_bits > 60:
            limits = "a subtoken has at most 20 bits (it owns 2**bits output rows) and a code at most 60"
            sizes = f"{self.subtokens} subtokens of {self.bits_per_subtoken} bits"
            raise ValueError(f"{sizes}: {limits}; use more subtokens of fewer bits")
        if self.depth_layers and (self.subtokens < 2 or not 0 < self.depth_layers <= 4):
            raise ValueError(f"a depth head has 1 to 4 layers and predicts 2 or more subtokens: {self}")
        for name in SPECIAL_IDS:
            value = getattr(self, name)
            if not 0 <= value < self.text_vocab_size:
                raise ValueError(f"{name} = {value} is not a text entry (0 .. {self.text_vocab_size - 1})")

    @property
    def num_bits(self) -> int:
        """Bits of one code."""
        return self.subtokens * self.bits_per_subtoken

    @property
    def visual_vocab_size(self) -> int:
        """Number of visual entries of all sub-tokens."""
        return self.subtokens << self.bits_per_subtoken

    @property
    def vocab_size(self) -> int:
        """Number of text and visual entries."""
        return self.text_vocab_size + self.visual_vocab_size

    @property
    def image_tokens(self) -> int:
        """Visual ids of one image in a sequence, without begin and end of image."""
        return self.image_subtokens // self.subtokens_per_id

    @property
    def image_subtokens(self) -> int:
        """Sub-tokens of one image, which are predicted one by one."""
        return self.num_patches * self.subtokens

    @property
    def subtokens_per_id(self) -> int:
        """Sub-tokens that a visual id stands for, S: all of its patch with a depth head, else itself."""
        return self.subtokens if self.depth_layers else 1

    @property
    def special_ids(self) -> set[int]:
        """The special ids among the text entries."""
        return {getattr(self, name) for name in SPECIAL_IDS}

    def subtoken_range(self, subtoken: int) -> tuple[int, int]:
        """First id of `subtoken`, and the id after its last one."""
        if not 0 <= subtoken < self.subtokens:
            raise ValueError(f"subtoken {subtoken} does not exist; there are {self.subtokens}")
        start = self.text_vocab_size + (subtoken << self.bits_per_subtoken)
        return start, start + (1 << self.bits_per_subtoken)

    def codes_to_ids(self, codes_BN: Tensor) -> Tensor:
        """Codes (..., N) int64 -> visual ids (..., P), the sub-tokens of a patch next to each other."""
        return codes_BN + self.text_vocab_size if self.depth_layers else self._rows(codes_BN).flatten(-2)

    def ids_to_rows(self, ids_BT: Tensor) -> Tensor:
        """Ids (..., T) -> the table's rows (..., T, S) of which each is the sum; -1 after the row of a text id."""
        if not self.depth_layers:
            return ids_BT.unsqueeze(-1)
        text_BTS = F.pad(ids_BT.unsqueeze(-1), (0, self.subtokens - 1), value=-1)
        is_text_BT = ids_BT < self.text_vocab_size
        rows_BTS = self._rows((ids_BT - self.text_vocab_size).clamp(min=0))
        return torch.where(is_text_BT.unsqueeze(-1), text_BTS, rows_BTS)

    def rows_to_ids(self, rows_BTS: Tensor) -> Tensor:
        """Inverse of `ids_to_rows` for visual ids."""
        if not self.depth_layers:
            return rows_BTS.squeeze(-1)
        subtokens_BTS = rows_BTS - self._subtoken_starts(rows_BTS.device)
        return subtokens_to_codes(subtokens_BTS, bits_per_subtoken=self.bits_per_subtoken) + self.text_vocab_size

    def ids_to_codes(self, ids_BP: Tensor) -> Tensor:
        """Visual ids (..., P) -> codes (..., N); ValueError for an id outside its sub-token's range."""
        if self.depth_layers:
            codes_BN = ids_BP - self.text_vocab_size
            if ((codes_BN < 0) | (codes_BN >= 1 << self.num_bits)).any():
                raise ValueError(f"ids outside {self.text_vocab_size} + codes of {self.num_bits} bits")
            return codes_BN
        if ids_BP.shape[-1] % self.subtokens:
            raise ValueError(f"{ids_BP.shape[-1]} visual ids are not a multiple of {self.subtokens} subtokens")
        subtokens_BNS = ids_BP.unflatten(-1, (-1, self.subtokens)) - self._subtoken_starts(ids_BP.device)
        illegal_BNS = (subtokens_BNS < 0) | (subtokens_BNS >= 1 << self.bits_per_subtoken)
        if illegal_BNS.any():
            first = int(illegal_BNS.flatten().nonzero()[0])
            position, subtoken = first % ids_BP.shape[-1], first % self.subtokens
            place = f"id {int(ids_BP.flatten()[first])} at position {position}"
            raise ValueError(f"{place} is outside the range {self.subtoken_range(subtoken)} of subtoken {subtoken}")
        return subtokens_to_codes(subtokens_BNS, bits_per_subtoken=self.bits_per_subtoken)

    def to_dict(self) -> dict[str, int]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, *, where: str | Path = "config.json") -> Self:
        """Inverse of `to_dict`, which ignores other keys and reads the names of older versions; UserError without them.

        The message names `where` and the value.
        """
        sizes = {}
        try:
            for name in (field.name for field in dataclasses.fields(cls)):
                if name == "depth_layers" and name not in values:  # versions without a depth head
                    continue
                sizes[name] = values[name if name in values else OLD_KEYS.get(name, name)]
                if type(sizes[name]) is not int:
                    raise ValueError(f"{name} is {sizes[name]!r}, not a whole number")
            return cls(**sizes)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"there is no '{name}'" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}, 'um3': {reason}; restore the file that was saved with the model") from None

    def _rows(self, codes_BN: Tensor) -> Tensor:
        """Codes (..., N) -> rows (..., N, S) of their sub-tokens."""
        subtokens_BNS = codes_to_subtokens(codes_BN, subtokens=self.subtokens, bits_per_subtoken=self.bits_per_subtoken)
        return subtokens_BNS + self._subtoken_starts(codes_BN.device)

    def _subtoken_starts(self, device: torch.device) -> Tensor:
        return self.text_vocab_size + (torch.arange(self.subtokens, device=device) << self.bits_per_subtoken)
