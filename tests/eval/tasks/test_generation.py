import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessorPil

from data_mix.demo.scene_prompts import SKILLS, evaluation_prompts
from data_mix.demo.scenes import ScenesSource
from eval.config import SamplingConfig
from eval.metrics.clipscore import clip_cosines, load_clip
from eval.metrics.features import random_features
from eval.scores import Measurement, texts_sha256
from eval.tasks.generation import (
    distribution_scores,
    draw,
    judge,
    missing_skills,
    read_back_row,
    skill_scores,
)
from um3.core.errors import UserError

T = Measurement("t", 0)


@pytest.fixture(scope="module")
def truth():
    """For every prompt a real scene one of whose captions it is: what a perfect model would draw."""
    source = ScenesSource(size=32, length=4000, seed=0, split="val")
    by_caption = {}
    for index in range(len(source)):
        sample = source[index]
        for caption in sample.captions:
            by_caption.setdefault(caption, sample.image_HWC)
    prompts = [p for p in evaluation_prompts(per_skill=8, seed=0) if p.prompt in by_caption]
    return [by_caption[prompt.prompt] for prompt in prompts], prompts


def by_metric(rows):
    return {row.metric: row for row in rows}


def test_true_images_meet_every_demand(truth):
    images, prompts = truth
    rows = by_metric(skill_scores(judge(images, prompts=prompts), prompts=prompts, of=T))
    assert {name: row.value for name, row in rows.items()} == dict.fromkeys((*SKILLS, "mean"), 1.0)
    assert rows["mean"].n == len(prompts) == sum(rows[skill].n for skill in SKILLS)
    assert rows["position"].paper == 0.17


def test_images_under_other_prompts_do_not(truth):
    images, prompts = truth
    shifted = images[9:] + images[:9]
    rows = by_metric(skill_scores(judge(shifted, prompts=prompts), prompts=prompts, of=T))
    assert rows["mean"].value < 0.5 and rows["color_attr"].value < 0.5
    for row in rows.values():
        assert row.low is None or row.low <= row.value <= row.high
    assert rows["mean"].high - rows["mean"].low > 0.02


def test_the_mean_weighs_skills_not_images(truth):
    images, prompts = truth
    verdicts = judge(images, prompts=prompts)
    kept = [i for i, prompt in enumerate(prompts) if prompt.skill != "colors"]
    last = next(i for i, prompt in enumerate(prompts) if prompt.skill == "colors")
    verdicts[last] = verdicts[last]._replace(passed=False)
    chosen = [*kept, last]
    rows = skill_scores([verdicts[i] for i in chosen], prompts=[prompts[i] for i in chosen], of=T)
    assert by_metric(rows)["mean"].value == pytest.approx(5 / 6)
    with pytest.raises(UserError, match="no prompts for the skill 'colors'"):
        skill_scores([verdicts[i] for i in kept], prompts=[prompts[i] for i in kept], of=T)


def test_reading_back_real_scenes_and_noise(scenes):
    images, captions = scenes
    full = [given[0] for given in captions]
    assert read_back_row(images, captions=full, note="", of=T).value == 1
    assert read_back_row(images[::-1], captions=full, note="", of=T).value < 0.3
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert read_back_row(noise[:4], captions=full[:4], note="", of=T).value == 0


def test_drawings_are_reproducible_and_carry_their_prompts(pipeline):
    prompts = ["a red circle", "two blue squares", "a red circle"]
    sampling = SamplingConfig(batch_size=2)
    first = draw(pipeline, prompts=prompts, seed=3, sampling=sampling)
    again = draw(pipeline, prompts=prompts, seed=3, sampling=SamplingConfig(batch_size=3))
    assert [drawing.prompt for drawing in first] == prompts
    assert all((a.image == b.image).all() for a, b in zip(first, again, strict=True))
    assert first[0].image.shape == (32, 32, 3) and first[0].to_dict() == {"prompt": prompts[0], "seed": first[0].seed}


def test_distribution_rows_and_the_names_they_may_have(pipeline, scenes):
    images, captions = scenes
    full = [given[0] for given in captions]
    options = {"captions": full, "pipeline": pipeline, "features": random_features(), "clip": None, "of": T}
    same = by_metric(distribution_scores(images, originals_NHWC=images, **options))
    other = by_metric(distribution_scores(255 - images, originals_NHWC=images, **options))
    name = "frechet_distance[random-features]"
    assert same[name].value == pytest.approx(0, abs=1e-6) and other[name].value > 1e-3
    assert same[name].paper is None and "biased upwards" in same[name].note
    assert same["fid"].value is None and same["fid"].paper == 44.1 and "inception_weights=PATH" in same["fid"].note
    assert same["clipscore"].value is None and same["clipscore"].paper == 0.25
    assert same["clipscore_qlip"].value == pytest.approx(same["clipscore_qlip_real"].value)
    assert same["clipscore_qlip"].protocol["prompts_sha256"] == texts_sha256(full)


def test_fits_by_hand(pipeline, scenes):
    images, captions = scenes
    texts = [given[0] for given in captions][:3]
    found = pipeline.fits(images[:3], texts)
    for index, text in enumerate(texts):
        with torch.no_grad():
            output = pipeline.qlip(
                pipeline.processor.pixels(images[index : index + 1]), pipeline.processor.text([text])["input_ids"]
            )
        assert float(found[index]) == pytest.approx(float((output.image_embeds * output.text_embeds).sum()), abs=1e-5)


def test_clip_cosines_equal_the_models_own_logits(tmp_path, scenes):
    images, captions = scenes
    texts = [given[0] for given in captions][:5]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    for part in (model, text_tokenizer, processor):
        part.save_pretrained(tmp_path)
    found = clip_cosines(images[:5], texts=texts, clip=load_clip(str(tmp_path)))
    with torch.no_grad():
        pixels = processor([image for image in images[:5]], return_tensors="pt")["pixel_values"]
        output = model(**text_tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
    expected = output.logits_per_image.diag() / model.logit_scale.exp()
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="no CLIP at"):
        load_clip(str(tmp_path / "none"))


def test_without_a_checker_the_rows_say_so():
    rows = missing_skills(T)
    assert [row.metric for row in rows] == [*SKILLS, "mean"]
    assert all(row.value is None and "checker" in row.note for row in rows)
