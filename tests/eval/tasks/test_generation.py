"""Scores of generated images: skills, captions read from the pixels, Frechet distance and CLIPScore."""

import numpy as np
import pytest
import torch

from data_mix.demo.scene_prompts import SKILLS, evaluation_prompts
from data_mix.demo.scenes import ScenesSource
from eval.metrics.clipscore import clip_cosines, load_clip
from eval.metrics.features import random_features
from eval.scores import Measurement
from eval.tasks.generation import check_scenes, distribution_scores, judge_row, read_back_row, skill_scores
from tests.helpers import tiny_judges
from um3.core.errors import UserError
from um3.core.files import short_hash

T = Measurement("t", 0)


@pytest.fixture(scope="module")
def truth():
    """For every prompt a real scene with this caption: the images of a perfect model."""
    source = ScenesSource(size=32, length=4000, seed=0, split="val")
    by_caption = {}
    for index in range(len(source)):
        sample = source[index]
        for caption in sample.captions:
            by_caption.setdefault(caption, sample.image_HWC)
    prompts = [p for p in evaluation_prompts(per_skill=8, seed=0) if p.prompt in by_caption]
    return [by_caption[prompt.prompt] for prompt in prompts], prompts


@pytest.fixture(scope="module")
def full_captions(scenes):
    return [captions[0] for captions in scenes[1]]


def by_metric(rows):
    return {row.metric: row for row in rows}


def test_true_images_meet_every_demand(truth):
    images, prompts = truth
    rows = by_metric(skill_scores(check_scenes(images, prompts=prompts), prompts=prompts, of=T))
    assert {name: row.value for name, row in rows.items()} == dict.fromkeys((*SKILLS, "mean"), 1.0)
    assert rows["mean"].n == len(prompts) == sum(rows[skill].n for skill in SKILLS)
    assert rows["position"].paper == 0.17


def test_images_with_other_prompts_do_not(truth):
    images, prompts = truth
    shifted = images[9:] + images[:9]
    rows = by_metric(skill_scores(check_scenes(shifted, prompts=prompts), prompts=prompts, of=T))
    assert rows["mean"].value < 0.5 and rows["color_attr"].value < 0.5
    for row in rows.values():
        assert row.low is None or row.low <= row.value <= row.high
    assert rows["mean"].high - rows["mean"].low > 0.02


def test_the_mean_weights_skills_equally(truth):
    images, prompts = truth
    verdicts = check_scenes(images, prompts=prompts)
    others = [i for i, prompt in enumerate(prompts) if prompt.skill != "colors"]
    last = next(i for i, prompt in enumerate(prompts) if prompt.skill == "colors")
    verdicts[last] = verdicts[last]._replace(passed=False)
    chosen = [*others, last]
    rows = skill_scores([verdicts[i] for i in chosen], prompts=[prompts[i] for i in chosen], of=T)
    assert by_metric(rows)["mean"].value == pytest.approx(5 / 6)
    with pytest.raises(UserError, match="no prompts for the skill 'colors'"):
        skill_scores([verdicts[i] for i in others], prompts=[prompts[i] for i in others], of=T)


def test_captions_are_read_from_scenes_and_not_from_noise(scenes, full_captions):
    def share(images):
        return read_back_row(images, captions=full_captions[: len(images)], note="", of=T).value

    assert share(scenes[0]) == 1 and share(scenes[0][::-1]) < 0.3
    assert share(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)) == 0


def test_distribution_rows_and_their_names(pipeline, scenes, full_captions):
    images = scenes[0]
    options = {"captions": full_captions, "pipeline": pipeline, "features": random_features(), "clip": None, "of": T}
    same = by_metric(distribution_scores(images, originals_NHWC=images, **options))
    other = by_metric(distribution_scores(255 - images, originals_NHWC=images, **options))
    name = "frechet_distance[random-features]"
    assert same[name].value == pytest.approx(0, abs=1e-6) and other[name].value > 1e-3
    assert same[name].paper is None and "biased upwards" in same[name].note
    assert same["fid"].value is None and same["fid"].paper == 44.1 and "inception_weights=PATH" in same["fid"].note
    assert same["clipscore"].value is None and same["clipscore"].paper == 0.25
    assert same["clipscore_qlip"].value == pytest.approx(same["clipscore_qlip_real"].value)
    assert same["clipscore_qlip"].protocol["prompts_sha256"] == short_hash(full_captions)


def test_a_judge_scores_with_its_own_towers(pipeline, scenes, full_captions):
    images = scenes[0][: len(full_captions)]
    row = judge_row(images, captions=full_captions, judge=(pipeline.qlip, pipeline.processor), of=T)
    assert row.value == pytest.approx(np.mean(pipeline.similarity(images, full_captions)))
    assert (row.metric, row.protocol["towers"]) == ("clipscore_judge", "judge")
    assert row.protocol["fingerprint"] == pipeline.qlip.fingerprint()[:12]


def test_clipscore_qlip_by_hand(pipeline, scenes, full_captions):
    images, texts = scenes[0][:3], full_captions[:3]
    processor = pipeline.processor
    with torch.no_grad():
        output = pipeline.qlip(processor.pixels(images), processor.text(texts)["input_ids"])
    expected = (output.image_embeds * output.text_embeds).sum(dim=1).tolist()
    assert list(pipeline.similarity(images, texts)) == pytest.approx(expected, abs=1e-5)


def test_clip_cosines_equal_the_models_own_logits(tmp_path, scenes):
    images, texts = scenes[0][:5], ["a red dog", "the blue cat", "a photo of a cat", "red", "is there a dog ?"]
    clip = load_clip(str(tiny_judges.save_clip(tmp_path)))
    with torch.no_grad():
        pixels = clip.processor(list(images), return_tensors="pt")["pixel_values"]
        output = clip.model(**clip.text_tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
    expected = output.logits_per_image.diag() / clip.model.logit_scale.exp()
    torch.testing.assert_close(clip_cosines(images, texts=texts, clip=clip), expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="CLIP"):
        load_clip(str(tmp_path / "none"))
