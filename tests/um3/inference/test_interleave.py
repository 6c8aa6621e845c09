"""Text and images in any order: the answer is legal, repeatable and the model's choice."""

import numpy as np
import pytest
import torch
from PIL import Image

from um3.inference.generate import uniforms
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.text_tokenizer import encode_captions

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_an_image_can_be_requested(pipeline):
    parts = pipeline.interleave(["a red square"], answer="image", max_new_tokens=4, seed=3, guidance_scale=2.0)
    first = parts[0]
    assert isinstance(first.content, Image.Image) and first.content.size == (16, 16)
    caption = encode_captions(["a red square"], tokenizer=pipeline.text_tokenizer)[0]
    sampled = pipeline.sampler.images(
        prompts=[sequences.image_prompt(caption, ids=pipeline.ids)],
        unconditional_prompt=sequences.image_prompt([], ids=pipeline.ids),
        sampling=Sampling(guidance_scale=2.0),
        uniforms_BP=uniforms([first.seed], count=pipeline.ids.image_tokens),
    )
    image = pipeline.decode(pipeline.ids.ids_to_codes(sampled.visual_ids))[0]
    assert np.array_equal(np.asarray(first.content), image)
    assert first.logprob == pytest.approx(float(sampled.logprobs[0]), rel=1e-4)
    assert not any(isinstance(part.content, Image.Image) for part in parts[1:])


@torch.no_grad()
def test_the_model_begins_an_image_where_it_samples_begin_of_image(pipeline):
    head_VD = pipeline.model.lm_head.weight
    begin_of_image, before = pipeline.ids.begin_of_image_id, head_VD.clone()
    options = {"temperature": 20.0, "max_images": 2}
    try:
        head_VD[begin_of_image] = 0  # as likely as an average entry
        answers = [pipeline.interleave(["a", IMAGE, "red"], seed=seed, **options) for seed in range(25)]
    finally:
        head_VD.copy_(before)
    kinds = {tuple(isinstance(part.content, str) for part in parts) for parts in answers}
    assert any(False in kind for kind in kinds) and (True,) in kinds
    assert all(kind.count(False) <= 2 for kind in kinds)


def test_text_alone_is_repeatable(pipeline):
    messages = [Image.fromarray(IMAGE).resize((40, 30)), "a red", "square"]
    first, second = (pipeline.interleave(messages, answer="text", seed=1, max_new_tokens=8) for _ in range(2))
    assert first == second and len(first) <= 1 and all(isinstance(part.content, str) for part in first)
