"""Text and images in any order, in and out: an image begins where the model samples begin of image."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from um3.core.errors import UserError
from um3.core.seeds import sample_seed
from um3.core.text import valid_text
from um3.inference.decoder import check_room
from um3.inference.generate import uniforms
from um3.inference.image_io import to_pil
from um3.inference.outputs import Part
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.text_tokenizer import decode, encode_captions

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

Answer = Literal["any", "text", "image"]
Message = str | Image.Image | np.ndarray


class Conversation:
    """The context of `UM3Pipeline.interleave`, and the parts of the answer so far."""

    def __init__(self, pipeline: "UM3Pipeline", messages: Sequence[Message], *, seed: int, sampling: Sampling):
        self.pipeline, self.ids, self.sampling, self.seed = pipeline, pipeline.ids, sampling, seed
        self.context: list[int] = [self.ids.bos_id]
        self.parts: list[Part] = []
        self.limit: int = pipeline.model.config.max_position_embeddings
        for message in messages:
            self.context += self._encode(message)
        check_room([torch.tensor(self.context)], num_new=1, limit=self.limit)

    def answer(self, kind: Answer, *, max_new_tokens: int, max_images: int) -> list[Part]:
        """See `UM3Pipeline.interleave`."""
        if kind not in ("any", "text", "image"):
            raise UserError(f"answer '{kind}' is unknown; use any, text or image")
        images_left = 0 if kind == "text" else max_images
        begins_image = kind == "image"
        while True:
            if begins_image:
                self._sample_image()
                images_left -= 1
            # While another image may come, its place in the context is reserved.
            room = self.limit - len(self.context)
            reserved = self.ids.image_tokens + 2 if images_left > 0 else 0
            may_begin_image = 0 < reserved < room
            room = min(max_new_tokens, room - (reserved if may_begin_image else 0))
            if room <= 0:
                return self.parts
            num_tokens, begins_image = self._sample_text(room, may_begin_image=may_begin_image)
            max_new_tokens -= num_tokens
            if not begins_image:
                return self.parts

    def _sample_text(self, max_new_tokens: int, *, may_begin_image: bool) -> tuple[int, bool]:
        """Text up to its end or to the begin of an image; returns the number of tokens, and whether an image begins."""
        seed = sample_seed(self.seed, "interleave", len(self.context))
        result = self.pipeline.sampler.texts(
            prompts=[torch.tensor(self.context)],
            sampling=dataclasses.replace(self.sampling, guidance_scale=1.0),
            uniforms_BP=uniforms([seed], count=max_new_tokens),
            may_begin_image=may_begin_image,
        )
        token_ids = result.token_ids[0]
        self.context += token_ids
        if token_ids:
            text = decode(token_ids, tokenizer=self.pipeline.text_tokenizer)
            self.parts.append(Part(text, seed=seed, logprob=result.logprobs[0]))
        return len(token_ids) + 1, result.ends[0] == self.ids.begin_of_image_id

    def _sample_image(self) -> None:
        seed, ids = sample_seed(self.seed, "interleave", len(self.context)), self.ids
        self.context.append(ids.begin_of_image_id)
        result = self.pipeline.sampler.images(
            prompts=[torch.tensor(self.context)],
            unconditional_prompt=sequences.image_prompt([], ids=ids),
            sampling=self.sampling,
            uniforms_BP=uniforms([seed], count=ids.image_subtokens),
        )
        self.context += [*result.visual_ids[0].tolist(), ids.end_of_image_id]
        image = self.pipeline.decode(ids.ids_to_codes(result.visual_ids).cpu())[0]
        logprob = float(result.logprobs[0])
        metadata = {"seed": seed, **self.sampling.to_dict(), "logprob": logprob}
        self.parts.append(Part(to_pil(image, metadata=metadata), seed=seed, logprob=logprob))

    def _encode(self, message: Message) -> list[int]:
        if isinstance(message, str):
            return encode_captions([valid_text(message)], tokenizer=self.pipeline.text_tokenizer)[0]
        if not isinstance(message, Image.Image | np.ndarray):
            raise UserError(f"a message of type {type(message).__name__}; it must be a text or an image")
        images = message[None] if isinstance(message, np.ndarray) else [message]
        visual_ids = self.ids.codes_to_ids(self.pipeline.encode(images))[0].tolist()
        return [self.ids.begin_of_image_id, *visual_ids, self.ids.end_of_image_id]
