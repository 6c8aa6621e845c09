"""Models that answer: batches, bos beside a chat template, questions without an image, and a UM3."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from eval.vqa.models import UM3Model, VisionLanguageModel, open_model, starts_with_yes
from tests.helpers import tiny_judges
from um3.core.errors import UserError

TURNS = (
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
)
BOS, IMAGE, PAD = 1, 3, 0
ASKED = ["is there a dog ?", "is the cat there or is there a red dog ?"]


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(np.uint8))


def save_chat(folder, *, template_has_bos=False, adds_bos=True):
    """A LLaVA whose tokenizer adds bos (and eos, which its template does not use), or does not."""
    return tiny_judges.save_llava(folder, chat_template="<bos> " * template_has_bos + TURNS, adds_bos=adds_bos)


def talkative(folder):
    """A model whose answers are words that depend on all of its input."""
    model, generator = VisionLanguageModel(str(folder)), torch.Generator().manual_seed(0)
    for weight in model.model.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=generator)
    for part in (model.model, getattr(model.model, "text_decoder", model.model)):
        part.generation_config.suppress_tokens = list(range(len(tiny_judges.SPECIAL)))
    return model


@pytest.mark.parametrize("template_has_bos", [False, True])
def test_a_prompt_begins_with_one_bos(template_has_bos, tmp_path):
    model = VisionLanguageModel(str(save_chat(tmp_path, template_has_bos=template_has_bos)))
    for images in ([noise(), noise(1)], [None, None]):
        ids = model.inputs(images, ASKED)["input_ids"]
        for row in ids.tolist():
            start = next(place for place, token in enumerate(row) if token != PAD)
            assert row[start] == BOS and row.count(BOS) == 1 and row.count(IMAGE) == (0 if images[0] is None else 4)
        assert ids[0, 0] == PAD and ids[1, 0] == BOS, "padded on the left"


def test_a_tokenizer_without_bos_gets_none(tmp_path):
    model = VisionLanguageModel(str(save_chat(tmp_path, adds_bos=False)))
    assert BOS not in model.inputs([noise()], ASKED[:1])["input_ids"]


def test_a_model_without_a_template_gets_its_image_token(tmp_path):
    model = VisionLanguageModel(str(tiny_judges.save_llava(tmp_path)))
    ids = model.inputs([noise()], ["is there a dog ?"])["input_ids"]
    expected = AutoProcessor.from_pretrained(tmp_path)(images=[noise()], text=["<image> is there a dog ?"])["input_ids"]
    assert ids.tolist() == [list(row) for row in expected]


@pytest.mark.parametrize("save", [save_chat, tiny_judges.save_llava, tiny_judges.save_blip])
def test_an_answer_does_not_depend_on_the_other_questions(save, tmp_path):
    model = talkative(save(tmp_path))
    images = [noise(), noise(1)]
    together = model.answer(images, ASKED, max_new_tokens=4)
    alone = [model.answer([image], [text], max_new_tokens=4)[0] for image, text in zip(images, ASKED, strict=True)]
    assert together == alone and together[0] != together[1]


def test_questions_without_an_image_keep_their_places(tmp_path):
    model = talkative(save_chat(tmp_path / "chat"))
    images, texts = [noise(), None, noise(1)], ["is there a dog ?", "is there a cat ?", "a red dog ?"]
    alone = [model.answer([image], [text], max_new_tokens=4)[0] for image, text in zip(images, texts, strict=True)]
    assert model.answer(images, texts, max_new_tokens=4) == alone and len(set(alone)) == 3
    blip = VisionLanguageModel(str(tiny_judges.save_blip(tmp_path / "blip")))
    with pytest.raises(UserError, match="about images only"):
        blip.answer([None], ["is it ?"], max_new_tokens=2)


def test_an_image_token_in_a_question_is_removed(tmp_path):
    model = VisionLanguageModel(str(save_chat(tmp_path)))
    plain, typed = (model.inputs([noise()], [text]) for text in ("is a dog ?", "is a <image> dog ?"))
    assert plain["input_ids"].tolist() == typed["input_ids"].tolist()


def test_yes_or_no(tmp_path):
    model = VisionLanguageModel(str(save_chat(tmp_path)))
    prompts = []
    model.answer = lambda images, texts, **options: prompts.extend(texts) or ["Yes, it is.", "no"]
    assert model.ask(noise(), ASKED) == [True, False]
    assert prompts[0] == "is there a dog ? Answer yes or no."
    model.answers_only = True
    model.ask(noise(), ASKED)
    assert prompts[2] == "is there a dog ?"


@pytest.mark.parametrize("answer", ["yes", "Yes, it is.", " YES", "no", "", "yesterday", "not yes"])
def test_the_first_word_decides(answer):
    assert starts_with_yes(answer) is (answer in ("yes", "Yes, it is.", " YES"))


def test_a_um3_answers_by_the_same_call(um3_folder):
    model = open_model(str(um3_folder))
    assert isinstance(model, UM3Model)
    images = [noise(), None, noise(1)]
    texts = ["what is it?\nshortly", "what is a circle?", "what is it?"]
    alone = [model.answer([image], [text], max_new_tokens=4)[0] for image, text in zip(images, texts, strict=True)]
    assert model.answer(images, texts, max_new_tokens=4) == alone
