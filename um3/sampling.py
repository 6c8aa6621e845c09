"""Drawing images and text from UM3, legal by construction.

An image position computes only the head rows of its slot's range, text positions only the text rows, so nothing
has to be masked or repaired afterwards. Prompts of a batch are padded on the left and their padding is invisible;
every sample uses random numbers of its own, so what comes out does not depend on what else is in the batch
(up to float rounding, which other matrix shapes can change).

Shapes: B samples, T prompt positions, P positions to draw, D width, V entries of one range, K cached positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from um3.core.errors import UserError
from um3.ids import IdSpace


@dataclass(frozen=True)
class Sampling:
    """How to choose the next id. Applied in this order: guidance, temperature, top-k, top-p.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those cuts off; guidance_scale 1 is the plain conditional
    distribution, 0 the unconditional one (images only).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature} is negative; use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside (0, 1]; 1 keeps everything")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative; 0 keeps everything")
        if not self.guidance_scale >= 0:
            raise UserError(f"guidance scale {self.guidance_scale} is negative; 1 means no guidance")


class DrawnImages(NamedTuple):
    """`visual_ids` (B, P) int64; `logprobs` (B,): the conditional model's own log-probability of each image in nats,
    every position normalised within its slot, before guidance, temperature and cuts."""

    visual_ids: Tensor
    logprobs: Tensor


@torch.inference_mode()
def draw_images(
    model: PreTrainedModel,
    *,
    prompts: Sequence[Tensor],
    unconditional_prompt: Tensor,
    ids: IdSpace,
    sampling: Sampling,
    uniforms_BP: Tensor,
) -> DrawnImages:
    """Draw one image after each prompt (`um3.rows.image_prompt`), one position at a time.

    `uniforms_BP` are numbers in [0, 1), one per position: all the randomness there is.
    """
    guided = sampling.guidance_scale != 1.0
    rows = [*prompts, *[unconditional_prompt] * len(prompts)] if guided else list(prompts)
    decoder = _Decoder(model, prompts=rows, pad_id=ids.pad_id, num_new=ids.image_tokens)
    ranges = [ids.slot_range(slot) for slot in range(ids.slots)]
    heads = [model.lm_head.weight[start:end] for start, end in ranges]
    uniforms_BP = uniforms_BP.to(model.device)
    drawn_BP = torch.empty(len(prompts), ids.image_tokens, dtype=torch.int64, device=model.device)
    logprobs_B = torch.zeros(len(prompts), device=model.device)
    hidden_BD = decoder.prefill()
    for position in range(ids.image_tokens):
        slot = position % ids.slots
        logits_BV = F.linear(hidden_BD, heads[slot]).float()
        own_logits_BV = logits_BV
        if guided:
            own_logits_BV, free_logits_BV = logits_BV.chunk(2)
            logits_BV = free_logits_BV + sampling.guidance_scale * (own_logits_BV - free_logits_BV)
        choice_B = choose(logits_BV, sampling=sampling, uniforms_B=uniforms_BP[:, position])
        logprobs_B += own_logits_BV.log_softmax(-1).gather(-1, choice_B.unsqueeze(-1)).squeeze(-1)
        drawn_BP[:, position] = choice_B + ranges[slot][0]
        if position + 1 < ids.image_tokens:
            next_B = drawn_BP[:, position]
            hidden_BD = decoder.step(torch.cat([next_B, next_B]) if guided else next_B)
    return DrawnImages(visual_ids=drawn_BP, logprobs=logprobs_B)


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    *,
    prompts: Sequence[Tensor],
    ids: IdSpace,
    sampling: Sampling,
    uniforms_BP: Tensor,
) -> list[list[int]]:
    """Continue each prompt with text entries until end of text or as many ids as `uniforms_BP` has columns.

    Returns the new ids without the end of text. Begin of text, padding and the image marks cannot come out.
    """
    num_new = uniforms_BP.shape[1]
    decoder = _Decoder(model, prompts=prompts, pad_id=ids.pad_id, num_new=num_new)
    head_VD = model.lm_head.weight[: ids.text_vocab_size]
    banned = {ids.bos_id, ids.pad_id, ids.begin_of_image_id, ids.end_of_image_id} - {ids.eos_id}
    bias_V = torch.zeros(ids.text_vocab_size, device=model.device)
    bias_V[sorted(banned)] = float("-inf")
    uniforms_BP = uniforms_BP.to(model.device)
    finished_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    written: list[Tensor] = []
    hidden_BD = decoder.prefill()
    for position in range(num_new):
        logits_BV = F.linear(hidden_BD, head_VD).float() + bias_V
        choice_B = choose(logits_BV, sampling=sampling, uniforms_B=uniforms_BP[:, position])
        finished_B |= choice_B == ids.eos_id
        written.append(choice_B.masked_fill(finished_B, ids.eos_id))
        if position + 1 == num_new or finished_B.all():
            break
        hidden_BD = decoder.step(written[-1])
    rows = torch.stack(written, dim=1).tolist() if written else [[] for _ in prompts]
    return [row[: row.index(ids.eos_id)] if ids.eos_id in row else row for row in rows]


def choose(logits_BV: Tensor, *, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """Index (B,) drawn from each row of float32 logits by inverting its distribution at `uniforms_B`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        weakest_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < weakest_B1, float("-inf"))
    probabilities_BV = logits_BV.double().softmax(-1)
    if sampling.top_p < 1:
        # Sorting only finds the threshold; the draw stays in id order, where a near-tie cannot swap two entries.
        sorted_BV = probabilities_BV.sort(dim=-1, descending=True).values
        kept_BV = sorted_BV.cumsum(-1) - sorted_BV < sampling.top_p
        weakest_B1 = sorted_BV.masked_fill(~kept_BV, 2.0).amin(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < weakest_B1, 0.0)
    cumulative_BV = probabilities_BV.cumsum(-1)
    level_B1 = uniforms_B.double().unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, level_B1, right=True).squeeze(-1).clamp_(max=logits_BV.shape[-1] - 1)


class _Decoder:
    """The decoder's body, stepped with a key-value cache over left-padded prompts."""

    def __init__(self, model: PreTrainedModel, *, prompts: Sequence[Tensor], pad_id: int, num_new: int):
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        limit = model.config.max_position_embeddings
        if longest + num_new > limit:
            raise UserError(
                f"a prompt of {longest} tokens leaves no room for {num_new} more in the model's context of {limit}; "
                "shorten the prompt"
            )
        self.body, device = model.model, model.device
        self.input_ids_BT = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.input_ids_BT[row, longest - len(prompt) :] = prompt
        self.input_ids_BT = self.input_ids_BT.to(device)
        self.lengths_B1 = torch.tensor(lengths, device=device).unsqueeze(1)
        self.longest = longest
        self.visible_BK: Tensor | None = None
        if min(lengths) < longest:
            keys_K = torch.arange(longest + num_new, device=device)
            self.visible_BK = keys_K >= longest - self.lengths_B1
        num_layers, capacity = model.config.num_hidden_layers, longest + num_new
        self.cache = Cache(layers=[_PreallocatedLayer(capacity=capacity) for _ in range(num_layers)])

    def prefill(self) -> Tensor:
        """Read the prompts; hidden states (B, D) at their last position."""
        mask_B1TK, positions_BT = None, torch.arange(self.longest, device=self.lengths_B1.device).unsqueeze(0)
        if self.visible_BK is not None:
            visible_BK = self.visible_BK[:, : self.longest]
            causal_TK = torch.ones(self.longest, self.longest, dtype=torch.bool, device=visible_BK.device).tril()
            # A padding position sees itself: a softmax over nothing would be NaN and spread.
            own_TK = torch.eye(self.longest, dtype=torch.bool, device=visible_BK.device)
            mask_B1TK = ((visible_BK[:, None, :] & causal_TK) | own_TK).unsqueeze(1)
            positions_BT = (positions_BT - (self.longest - self.lengths_B1)).clamp(min=0)
        return self._forward(self.input_ids_BT, positions_BT=positions_BT, mask_B1TK=mask_B1TK)

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one id per row; hidden states (B, D) after it."""
        done = self.cache.get_seq_length()
        mask_B11K = None if self.visible_BK is None else self.visible_BK[:, None, None, : done + 1]
        positions_B1 = self.lengths_B1 + (done - self.longest)
        return self._forward(ids_B.unsqueeze(1), positions_BT=positions_B1, mask_B1TK=mask_B11K)

    def _forward(self, ids_BT: Tensor, *, positions_BT: Tensor, mask_B1TK: Tensor | None) -> Tensor:
        output = self.body(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask_B1TK,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]


class _PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into room reserved once; the stock one copies everything at every step."""

    def __init__(self, *, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            batch, heads, _, width = key_states.shape
            self.buffers = key_states.new_empty(2, batch, heads, self.capacity, width)
            self.is_initialized, self.length = True, 0
        start, self.length = self.length, self.length + key_states.shape[2]
        self.buffers[0, :, :, start : self.length] = key_states
        self.buffers[1, :, :, start : self.length] = value_states
        self.keys, self.values = self.buffers[0, :, :, : self.length], self.buffers[1, :, :, : self.length]
        return self.keys, self.values
