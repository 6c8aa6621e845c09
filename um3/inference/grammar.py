"""UM3's grammar for other software: which ids may come next.

    text entries (bos and padding never), or
    <boi>, then patches x subtokens visual ids, each in its subtoken's range, then <eoi>, then text again

`um3.inference.generate` needs none of this: there no other id has a logit.

Shapes: B rows, T ids so far, V entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from um3.model.vocabulary import UnifiedVocabulary


class Grammar:
    """The state of one sequence, for engines that call a function of the ids so far (vLLM).

    `drawing` False forbids begin of image: nothing but text comes out.
    """

    def __init__(self, ids: UnifiedVocabulary, *, drawing: bool = True):
        self.ids = ids
        never = {ids.bos_id, ids.pad_id, ids.end_of_image_id} - {ids.eos_id}
        self.forbidden_text = sorted(never if drawing else never | {ids.begin_of_image_id})

    def allowed(self, so_far: Sequence[int]) -> range | int | None:
        """What may follow these ids, prompt included: a subtoken's range, one id alone, or None for text entries."""
        place = self._place_in_image(so_far)
        if place is None:
            return None
        if place == self.ids.image_tokens:
            return self.ids.end_of_image_id
        return range(*self.ids.subtoken_range(place % self.ids.subtokens))

    def apply(self, so_far: Sequence[int], logits_V: Tensor) -> Tensor:
        """The logits with -inf where an id may not follow; entries beyond the id space (padded heads) too."""
        masked_V = torch.full_like(logits_V, float("-inf"))
        match self.allowed(so_far):
            case None:
                masked_V[: self.ids.text_vocab_size] = logits_V[: self.ids.text_vocab_size]
                masked_V[self.forbidden_text] = float("-inf")
            case int(only):
                masked_V[only] = logits_V[only]
            case subtoken:
                masked_V[subtoken.start : subtoken.stop] = logits_V[subtoken.start : subtoken.stop]
        return masked_V

    def _place_in_image(self, so_far: Sequence[int]) -> int | None:
        """How many visual ids stand after a begin of image that is still open; None in text."""
        for place, token in enumerate(reversed(so_far[-self.ids.image_tokens - 1 :])):
            if token == self.ids.begin_of_image_id:
                return place
            if token < self.ids.text_vocab_size:
                return None
        return None


class GrammarProcessor(LogitsProcessor):
    """The grammar for transformers' `generate()`; rows may be at different places, padded on the left."""

    def __init__(self, ids: UnifiedVocabulary, *, drawing: bool = True):
        self.grammar = Grammar(ids, drawing=drawing)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids (B, T) and scores (B, V) -> scores with -inf where an id may not come next."""
        tail_BT = input_ids[:, -self.grammar.ids.image_tokens - 1 :].tolist()
        return torch.stack([self.grammar.apply(tail, row) for tail, row in zip(tail_BT, scores, strict=True)])
