"""A small Llama that was trained, so that its attention matters, with heads of very different scales."""

from functools import cache

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

PERIOD = 4
VOCABULARY = 261
"""Of a byte tokenizer with five special tokens."""
SCALES = (4.0, 1.0, 0.5, 0.25)
"""Of the heads' queries; their keys are divided by the same, which changes no attention score."""


def periodic_ids(count: int, *, seed: int) -> torch.Tensor:
    """Ids (count, 24) below 48: 0 and three random ids, repeated. Only attention finds the next one."""
    first = torch.randint(5, 48, (count, PERIOD), generator=torch.Generator().manual_seed(seed))
    first[:, 0] = 0
    return first.repeat(1, 6)


@cache
def trained_llama() -> PreTrainedModel:
    """Predicts `periodic_ids` after the first period; do not change it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.05, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(120):
        ids_BT = periodic_ids(32, seed=step)
        logits_BTV = model(ids_BT).logits[:, PERIOD - 1 : -1]
        F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, PERIOD:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    scales = torch.tensor(SCALES).repeat_interleave(16)[:, None]
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= scales
        layer.self_attn.k_proj.weight.data /= scales
    return model.eval().requires_grad_(False)
