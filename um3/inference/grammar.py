"""UM3's grammar for other inference engines: which ids may come next.

    text entries (never bos and padding), or
    <boi>, then patches x subtokens visual ids, each in its sub-token's range, then <eoi>, then text again

`um3.inference.generate` does not need it: there no other id has a logit.

Shapes: B sequences, T ids so far, V entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from um3.core.errors import UserError
from um3.model.vocabulary import UnifiedVocabulary


class Grammar:
    """The grammar of one sequence, for engines that call a function of the ids so far (vLLM).

    With `images` False begin of image is forbidden, so the model writes text only.
    """

    def __init__(self, ids: UnifiedVocabulary, *, images: bool = True):
        if images and ids.depth_layers:
            raise UserError("other engines cannot sample images of a UM3 with a depth head; use um3, or images=False")
        self.ids = ids
        forbidden = {ids.bos_id, ids.pad_id, ids.end_of_image_id} - {ids.eos_id}
        self.forbidden_text = sorted(forbidden if images else forbidden | {ids.begin_of_image_id})

    def allowed(self, so_far: Sequence[int]) -> range | None:
        """The ids that may follow `so_far`, prompt included; None for the text entries."""
        for place, token in enumerate(reversed(so_far[-self.ids.image_tokens - 1 :])):
            if token == self.ids.begin_of_image_id:  # `place` visual ids follow it
                if place == self.ids.image_tokens:
                    return range(self.ids.end_of_image_id, self.ids.end_of_image_id + 1)
                return range(*self.ids.subtoken_range(place % self.ids.subtokens))
            if token < self.ids.text_vocab_size:
                break
        return None

    def apply(self, so_far: Sequence[int], logits_V: Tensor) -> Tensor:
        """The logits with -inf for ids that may not follow, including entries beyond the vocabulary (padded heads)."""
        masked_V = torch.full_like(logits_V, float("-inf"))
        allowed = self.allowed(so_far)
        entries = range(self.ids.text_vocab_size) if allowed is None else allowed
        masked_V[entries.start : entries.stop] = logits_V[entries.start : entries.stop]
        if allowed is None:
            masked_V[self.forbidden_text] = float("-inf")
        return masked_V


class GrammarProcessor(LogitsProcessor):
    """The grammar for transformers' `generate()`; sequences may be at different places, padded on the left."""

    def __init__(self, ids: UnifiedVocabulary, *, images: bool = True):
        self.grammar = Grammar(ids, images=images)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids (B, T) and scores (B, V) -> scores with -inf for ids that may not come next."""
        tail_BT = input_ids[:, -self.grammar.ids.image_tokens - 1 :].tolist()
        return torch.stack([self.grammar.apply(tail, logits) for tail, logits in zip(tail_BT, scores, strict=True)])
