"""Visual rows that learn from each other: a code's row is a row of its own plus one vector for each of its bits.

A free row learns only from the codes it stands for; the vectors of the bits learn from every code, so that a code seen
rarely begins where its bits put it. All zero at first, and added to the plain rows when the model is saved, so a
checkpoint stays a stock one and new rows still start as the mean of the text rows (paper, section 4).

Shapes: B rows, T positions, V entries, W entries of a subtoken, L bits of a code, D width.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokenizer.bits import codes_to_bits
from um3.core.errors import UserError
from um3.model.extend import EMBEDDING, HEAD
from um3.model.vocabulary import UnifiedVocabulary


class SharedBits(nn.Module):
    """One vector for each bit of each subtoken, for the input and for the output rows of a model.

    Raises:
        UserError: the model's output head is tied to its input rows.
    """

    signs_VL: Tensor

    def __init__(self, ids: UnifiedVocabulary, *, model_config: PreTrainedConfig):
        super().__init__()
        if model_config.tie_word_embeddings:
            raise UserError("vocabulary.bit_embeddings needs an output head of its own; set tie_word_embeddings=false")
        self.input_LD = nn.Parameter(torch.zeros(ids.num_bits, model_config.hidden_size))
        self.output_LD = nn.Parameter(torch.zeros(ids.num_bits, model_config.hidden_size))
        signs_WL = 2.0 * codes_to_bits(torch.arange(1 << ids.bits_per_subtoken), num_bits=ids.bits_per_subtoken) - 1.0
        signs_VL = torch.zeros(ids.vocab_size, ids.num_bits)
        signs_VL[ids.text_vocab_size :] = torch.block_diag(*[signs_WL] * ids.subtokens)
        self.register_buffer("signs_VL", signs_VL, persistent=False)

    def add_to_inputs(self, embeddings_BTD: Tensor, *, ids_BT: Tensor) -> Tensor:
        """Embeddings of `ids_BT` with the vectors of their bits added; text entries have none."""
        return embeddings_BTD + self.signs_VL[ids_BT].to(self.input_LD.dtype) @ self.input_LD

    def add_to_head(self, weight_VD: Tensor) -> Tensor:
        """The output head's rows with the vectors of their bits added."""
        return weight_VD + self.signs_VL.to(self.output_LD.dtype) @ self.output_LD

    @torch.no_grad()
    def fold(self, weights: dict[str, Tensor]) -> None:
        """Put plain rows in the place of rows and bits in `weights`, the model's tensors and ours under "bits."."""
        signs_VL = self.signs_VL.to(weights[EMBEDDING])
        for name, part in ((EMBEDDING, "input_LD"), (HEAD, "output_LD")):
            weights[name] = weights[name] + signs_VL @ weights.pop(f"bits.{part}")
