"""What training adds to the stock model for images: bit embeddings and the depth head.

Bit embeddings are one vector per bit of a code, added to each visual entry's own embedding. An entry's own row learns
only from the codes that contain it; the bit vectors, zero at first, learn from every code. `BitEmbeddings.fold` adds
them to the plain rows when the model is saved, so a checkpoint keeps its stock architecture.

The depth head (RQ-Transformer, arXiv:2203.01941) lets a patch have one position. The stock model reads the sum of its
sub-tokens' embeddings; the head reads the hidden state that predicts the patch and the embeddings of the sub-tokens so
far, and its states meet the stock output rows. It is saved in a folder of its own beside the stock checkpoint.

Shapes: B sequences, T positions, V entries, W entries of a sub-token, L bits of a code, D width, S sub-tokens of a
patch, M patches, K head dimension.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from tokenizer.bits import codes_to_bits
from um3.core.errors import UserError
from um3.core.hub import WEIGHTS, check_weights, read_weights, write_checksums
from um3.model.extend import EMBEDDING, HEAD
from um3.model.vocabulary import UnifiedVocabulary

DEPTH_FOLDER = "depth"
"""Not a file in the model's folder: some programs read every safetensors file there."""


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


class DepthHead(nn.Module):
    """Predicts the sub-tokens of a patch one by one, with layers of the stock model's kind and sizes, unrotated."""

    is_checkpointed = False
    """Whether a backward pass computes the layers again instead of keeping their activations."""

    def __init__(self, ids: UnifiedVocabulary, *, model: PreTrainedModel):
        super().__init__()
        config, body = copy.deepcopy(model.config), cast(Any, model).model
        config._attn_implementation = "sdpa"
        self.ids, self.head_dim = ids, body.layers[0].self_attn.head_dim
        self.layers = nn.ModuleList(type(body.layers[0])(config, 0) for _ in range(ids.depth_layers))
        self.norm = type(body.norm)(config.hidden_size, eps=config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, ids_BT: Tensor, *, table: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings (B, T, S, D) whose sum over S is that of each id; 0 after the one of a text id."""
        rows_BTS = self.ids.ids_to_rows(ids_BT)
        return table(rows_BTS.clamp(min=0)) * (rows_BTS >= 0).unsqueeze(-1)

    def forward(self, states_MD: Tensor, embeddings_MSD: Tensor) -> Tensor:
        """States (M, S, D) that predict the sub-tokens, from each patch's state and its sub-tokens' embeddings."""
        x_MSD = torch.cat([states_MD.unsqueeze(1), embeddings_MSD[:, :-1].to(states_MD.dtype)], dim=1)
        cos_1SK = x_MSD.new_ones(1, x_MSD.shape[1], self.head_dim)
        options: dict[str, Any] = {"attention_mask": None, "position_embeddings": (cos_1SK, torch.zeros_like(cos_1SK))}
        for layer in self.layers:
            if self.is_checkpointed and torch.is_grad_enabled():
                x_MSD = checkpoint(layer, x_MSD, use_reentrant=False, **options)
            else:
                x_MSD = layer(x_MSD, **options)
        return cast(Tensor, self.norm(x_MSD))


def save_depth_head(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a depth head to `folder`/depth."""
    (folder / DEPTH_FOLDER).mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / DEPTH_FOLDER / WEIGHTS, metadata={"format": "pt"})
    write_checksums(folder / DEPTH_FOLDER)


def load_depth_head(folder: Path, *, ids: UnifiedVocabulary, model: PreTrainedModel) -> DepthHead:
    """The depth head of a UM3 folder, with the model's type and device; UserError if it is missing or another's."""
    check_weights(folder / DEPTH_FOLDER)
    head, tensors = DepthHead(ids, model=model), read_weights(folder / DEPTH_FOLDER)
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        problem = f"are not those of a depth head of {ids.depth_layers} layers for this model"
        raise UserError(f"the tensors in {folder / DEPTH_FOLDER} {problem}; restore the folder that was saved with it")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"the weights in {folder / DEPTH_FOLDER} hold NaN or infinity; restore them")
    head.load_state_dict(tensors)
    return head.to(model.device, model.dtype).eval()
