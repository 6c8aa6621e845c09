"""Text and pictures in any order, in and out: what comes next is the model's choice, one piece after the other.

A picture begins where the model draws begin of image among the text entries. UM3 is trained on single pictures with
single captions (`um3.model.sequences`); longer mixtures are beyond what it has seen.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from um3.core.errors import UserError
from um3.core.seeds import derive_seed
from um3.inference.decoder import check_room
from um3.inference.generate import draw_images, uniforms, write_text
from um3.inference.image_io import to_picture
from um3.inference.outputs import Part
from um3.inference.sampling_params import Sampling
from um3.model import sequences as rows
from um3.model.text_tokenizer import decode, encode_captions

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

Answer = Literal["any", "text", "image"]


def interleave(
    pipeline: "UM3Pipeline",
    messages: Sequence["str | Image.Image | np.ndarray"],
    *,
    answer: Answer,
    max_new_tokens: int,
    max_images: int,
    seed: int,
    sampling: Sampling,
) -> list[Part]:
    """See `UM3Pipeline.interleave`."""
    if answer not in ("any", "text", "image"):
        raise UserError(f"answer '{answer}' is unknown; use any, text or image")
    conversation = _Conversation(pipeline, messages, seed=seed, sampling=sampling)
    images_left = 0 if answer == "text" else max_images
    tokens_left = max_new_tokens
    if answer == "image":
        conversation.draw()
        images_left -= 1
    while tokens_left > 0:
        # While a picture may still come, the room that it takes is kept free.
        kept_free = pipeline.ids.image_tokens + 2 if images_left > 0 else 0
        may_begin_image = 0 < kept_free < conversation.room()
        room = conversation.room() - (kept_free if may_begin_image else 0)
        if room <= 0:
            break
        tokens_left -= conversation.write(min(tokens_left, room), may_begin_image=may_begin_image)
        if not conversation.awaits_image:
            break
        conversation.draw()
        images_left -= 1
    return conversation.parts


class _Conversation:
    def __init__(
        self,
        pipeline: "UM3Pipeline",
        messages: Sequence["str | Image.Image | np.ndarray"],
        *,
        seed: int,
        sampling: Sampling,
    ):
        self.pipeline, self.ids, self.sampling, self.seed = pipeline, pipeline.ids, sampling, seed
        self.context: list[int] = [self.ids.bos_id]
        self.parts: list[Part] = []
        self.awaits_image = False
        self._limit: int = pipeline.model.config.max_position_embeddings
        for message in messages:
            self.context += self._encode(message)
        check_room([self._prompt()], num_new=1, limit=self._limit)

    def room(self) -> int:
        """Ids that the model's context still takes."""
        return self._limit - len(self.context)

    def write(self, most: int, *, may_begin_image: bool) -> int:
        """Text up to its end or to the begin of an image; the number of ids drawn."""
        seed = self._next_seed()
        found = write_text(
            self.pipeline.model,
            prompts=[self._prompt()],
            ids=self.ids,
            sampling=dataclasses.replace(self.sampling, guidance_scale=1.0),
            uniforms_BP=uniforms([seed], count=most),
            may_begin_image=may_begin_image,
        )
        token_ids = found.token_ids[0]
        self.awaits_image = found.ends[0] == self.ids.begin_of_image_id
        self.context += token_ids
        if token_ids:
            text = decode(token_ids, tokenizer=self.pipeline.text_tokenizer)
            self.parts.append(Part(content=text, seed=seed, logprob=found.logprobs[0]))
        return len(token_ids) + 1

    def draw(self) -> None:
        """A picture here."""
        seed, ids = self._next_seed(), self.ids
        self.context.append(ids.begin_of_image_id)
        drawn = draw_images(
            self.pipeline.model,
            prompts=[self._prompt()],
            unconditional_prompt=rows.image_prompt([], ids=ids),
            ids=ids,
            sampling=self.sampling,
            uniforms_BP=uniforms([seed], count=ids.image_tokens),
        )
        self.context += [*drawn.visual_ids[0].tolist(), ids.end_of_image_id]
        image = self.pipeline.decode(ids.ids_to_codes(drawn.visual_ids).cpu())[0]
        metadata = {"seed": seed, **self.sampling.to_dict(), "logprob": float(drawn.logprobs[0])}
        self.parts.append(Part(content=to_picture(image, metadata=metadata), seed=seed, logprob=metadata["logprob"]))
        self.awaits_image = False

    def _prompt(self) -> Tensor:
        return torch.tensor(self.context)

    def _next_seed(self) -> int:
        return derive_seed(self.seed, "interleave", len(self.context))

    def _encode(self, message: "str | Image.Image | np.ndarray") -> list[int]:
        if isinstance(message, str):
            return encode_captions([message], tokenizer=self.pipeline.text_tokenizer)[0]
        if not isinstance(message, Image.Image | np.ndarray):
            raise UserError(f"a message is a text or a picture, not a {type(message).__name__}")
        images = message[None] if isinstance(message, np.ndarray) else [message]
        visual = self.ids.codes_to_ids(self.pipeline.encode(images))[0].tolist()
        return [self.ids.begin_of_image_id, *visual, self.ids.end_of_image_id]
