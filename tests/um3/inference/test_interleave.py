"""Texts and pictures in any order: the answer is legal, repeatable and what the model would choose."""

import numpy as np
import pytest
from PIL import Image

from um3.core.errors import UserError
from um3.inference.generate import draw_images, uniforms
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import Sampling
from um3.model import sequences as rows
from um3.model.text_tokenizer import encode_captions

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_an_image_can_be_asked_for(pipeline: UM3Pipeline) -> None:
    parts = pipeline.interleave(["a red square"], answer="image", max_new_tokens=4, seed=3, guidance_scale=2.0)
    first = parts[0]
    assert isinstance(first.content, Image.Image) and first.content.size == (16, 16)
    caption = encode_captions(["a red square"], tokenizer=pipeline.text_tokenizer)[0]
    drawn = draw_images(
        pipeline.model, prompts=[rows.image_prompt(caption, ids=pipeline.ids)], ids=pipeline.ids,
        unconditional_prompt=rows.image_prompt([], ids=pipeline.ids), sampling=Sampling(guidance_scale=2.0),
        uniforms_BP=uniforms([first.seed], count=pipeline.ids.image_tokens),
    )  # fmt: skip
    image = pipeline.decode(pipeline.ids.ids_to_codes(drawn.visual_ids))[0]
    assert np.array_equal(np.asarray(first.content), image)
    assert first.logprob == pytest.approx(float(drawn.logprobs[0]), rel=1e-4)
    assert not any(isinstance(part.content, Image.Image) for part in parts[1:])


def test_the_model_begins_a_picture_where_it_draws_the_mark(pipeline: UM3Pipeline) -> None:
    head = pipeline.model.lm_head.weight
    mark, before = pipeline.ids.begin_of_image_id, head.data.clone()
    try:
        head.data[mark] = 0  # as likely as an average entry
        options = {"temperature": 20.0, "max_images": 2}
        found = [pipeline.interleave(["a", PICTURE, "red"], seed=seed, **options) for seed in range(40)]
    finally:
        head.data.copy_(before)
    kinds = {tuple(isinstance(part.content, str) for part in parts) for parts in found}
    assert any(False in each for each in kinds) and any(each == (True,) for each in kinds)
    assert all(sum(not is_text for is_text in each) <= 2 for each in kinds)


def test_text_alone_and_repeatable(pipeline: UM3Pipeline) -> None:
    messages = [Image.fromarray(PICTURE).resize((40, 30)), "a red", "square"]
    parts = pipeline.interleave(messages, answer="text", seed=1, max_new_tokens=8)
    assert [part.content for part in parts] == [
        part.content for part in pipeline.interleave(messages, answer="text", seed=1, max_new_tokens=8)
    ]
    assert len(parts) <= 1 and all(isinstance(part.content, str) for part in parts)


def test_a_full_context_and_other_mistakes(pipeline: UM3Pipeline) -> None:
    with pytest.raises(UserError, match="leaves no room"):
        pipeline.interleave([PICTURE, PICTURE, PICTURE], answer="image")
    with pytest.raises(UserError, match="leaves no room"):
        pipeline.interleave(["word " * 1000])
    with pytest.raises(UserError, match="not a int"):
        pipeline.interleave([3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="answer 'video'"):
        pipeline.interleave(["a"], answer="video")  # type: ignore[arg-type]
