"""Embeddings that visual tokens share: one vector per bit of a code, added to each token's own embedding.

A token's own row learns only from the codes that contain it; the bit vectors, zero at first, learn from every code.
`fold` adds them to the plain rows when the model is saved, so a checkpoint keeps its stock architecture.

Shapes: B sequences, T positions, V entries, W entries of a sub-token, L bits of a code, D width.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokenizer.bits import codes_to_bits
from um3.core.errors import UserError
from um3.model.extend import EMBEDDING, HEAD
from um3.model.vocabulary import UnifiedVocabulary


class BitEmbeddings(nn.Module):
    """One vector per bit of each sub-token, for the input embedding and for the output head, which must be untied."""

    signs_VL: Tensor

    def __init__(self, ids: UnifiedVocabulary, *, model_config: PreTrainedConfig):
        super().__init__()
        if model_config.tie_word_embeddings:
            raise UserError("vocabulary.bit_embeddings needs an untied head; set model.tie_word_embeddings=false")
        self.input_LD = nn.Parameter(torch.zeros(ids.num_bits, model_config.hidden_size))
        self.output_LD = nn.Parameter(torch.zeros(ids.num_bits, model_config.hidden_size))
        signs_WL = 2.0 * codes_to_bits(torch.arange(1 << ids.bits_per_subtoken), num_bits=ids.bits_per_subtoken) - 1.0
        signs_VL = torch.zeros(ids.vocab_size, ids.num_bits)
        signs_VL[ids.text_vocab_size :] = torch.block_diag(*[signs_WL] * ids.subtokens)
        self.register_buffer("signs_VL", signs_VL, persistent=False)

    def add_to_inputs(self, embeddings_BTD: Tensor, *, ids_BT: Tensor) -> Tensor:
        """Add the bit vectors of `ids_BT` to their embeddings; text tokens have none."""
        return embeddings_BTD + self.signs_VL[ids_BT].to(self.input_LD.dtype) @ self.input_LD

    def add_to_head(self, weight_VD: Tensor) -> Tensor:
        """Add the bit vectors to the rows of the output head: all V, or only the last ones."""
        return weight_VD + self.signs_VL[-len(weight_VD) :].to(self.output_LD.dtype) @ self.output_LD

    @torch.no_grad()
    def fold(self, weights: dict[str, Tensor]) -> None:
        """Replace rows and bit vectors in `weights` (the model's tensors, and ours under "bits.") by plain rows."""
        signs_VL = self.signs_VL[-len(weights[EMBEDDING]) :].to(weights[EMBEDDING])
        for name, vectors in ((EMBEDDING, "input_LD"), (HEAD, "output_LD")):
            weights[name] = weights[name] + signs_VL @ weights.pop(f"bits.{vectors}")
