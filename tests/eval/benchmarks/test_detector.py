import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.benchmarks.detector import CLASSES, Mask2Former, colours_of, cut_out, objects_of
from eval.benchmarks.geneval_rules import COLOURS, THRESHOLD, DetectedObject, read_requirement
from eval.metrics.clipscore import load_clip
from tests.helpers import tiny_judges
from um3.core.errors import UserError


def noise_image(*, width=50, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_judges.save_mask2former(tmp_path_factory.mktemp("detector"), sharpness=40)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(str(tiny_judges.save_clip(tmp_path_factory.mktemp("clip"))))


def test_detections_follow_from_the_networks_own_outputs(folder):
    """Class probability times mean mask probability, the box around the mask: recomputed one query at a time."""
    detector, image = Mask2Former(str(folder)), noise_image()
    inputs = detector.processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        output = detector.model(**inputs)
    height, width = (int(inputs["pixel_mask"][0].any(dim=dim).sum()) for dim in (1, 0))
    expected = []
    for logits, mask in zip(output.class_queries_logits[0], output.masks_queries_logits[0], strict=True):
        whole = F.interpolate(mask[None, None], size=inputs["pixel_values"].shape[-2:], mode="bilinear")
        mask_HW = F.interpolate(whole[..., :height, :width], size=(image.height, image.width), mode="bilinear")[0, 0]
        inside = mask_HW > 0
        if inside.any():
            sure = mask_HW[inside].sigmoid().mean()
            rows, columns = inside.nonzero().T
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            shares = logits.softmax(-1)[:-1] * sure
            expected += [(CLASSES[i], float(s), tuple(map(float, box))) for i, s in enumerate(shares) if s > THRESHOLD]
    instances = detector.detect(image)
    assert expected and len(instances) == len(expected)
    for (mine, mask), theirs in zip(instances, sorted(expected, key=lambda values: -values[1]), strict=True):
        assert (mine.name, mine.box) == (theirs[0], theirs[2]) and mine.score == pytest.approx(theirs[1], rel=1e-4)
        assert mask.shape == (30, 50) and mask.dtype == bool


def test_unsure_models_find_nothing(tmp_path):
    assert Mask2Former(str(tiny_judges.save_mask2former(tmp_path))).detect(noise_image()) == []


def test_other_models_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="Mask2Former"):
        Mask2Former(str(tmp_path))
    few = tiny_judges.save_mask2former(tmp_path / "few", num_labels=3)
    with pytest.raises(UserError, match="has 3 classes"):
        Mask2Former(str(few))


def test_an_object_is_cut_out_on_grey():
    image = Image.new("RGB", (8, 6), "red")
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:3, 2:5] = mask[4, 6] = True
    crop = np.asarray(cut_out(image, (DetectedObject("dog", 0.9, (2.0, 1.0, 7.0, 5.0)), mask)))
    assert crop.shape == (4, 5, 3)
    assert (crop[0, 0] == (255, 0, 0)).all() and (crop[3, 4] == (255, 0, 0)).all() and (crop[2, 0] == 0x99).all()
    assert np.asarray(cut_out(image, (DetectedObject("dog", 0.9, (3.2, 2.4, 3.4, 2.4)), mask))).shape == (1, 1, 3)


def test_the_colour_is_the_nearest_of_ten_averaged_texts(clip):
    crops = [noise_image(seed=seed, width=40, height=40) for seed in range(3)]
    classes = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
        with torch.no_grad():
            output = clip.model(
                **clip.text_tokenizer(texts, padding=True, return_tensors="pt"),
                pixel_values=clip.processor(crops, return_tensors="pt")["pixel_values"],
            )
        mean = (output.text_embeds / output.text_embeds.norm(dim=1, keepdim=True)).mean(dim=0)
        classes.append(mean / mean.norm())
    expected = [COLOURS[index] for index in (output.image_embeds @ torch.stack(classes).T).argmax(dim=1).tolist()]
    assert colours_of(crops, name="dog", clip=clip) == expected
    assert colours_of([], name="dog", clip=clip) == []


def test_only_objects_with_a_required_colour_get_one(clip):
    class TwoDogs:
        def detect(self, image):
            mask = np.ones((image.height, image.width), dtype=bool)
            sure = [("dog", 0.5), ("dog", 0.9), ("cat", 0.8), ("dog", 0.9)]
            return [(DetectedObject(name, score, (0.0, 0.0, 20.0, 20.0)), mask) for name, score in sure]

    record = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "p"}
    objects = objects_of(noise_image(), requirement=read_requirement(record), detector=TwoDogs(), clip=clip)
    assert [bool(detected.color) for detected in objects] == [False, True, False, False] and objects[1].color in COLOURS
    record["include"][0]["count"] = 2  # two of equal score and place are two
    objects = objects_of(noise_image(), requirement=read_requirement(record), detector=TwoDogs(), clip=clip)
    assert [bool(detected.color) for detected in objects] == [False, True, False, True]
    objects = objects_of(noise_image(), requirement=read_requirement(record), detector=TwoDogs(), clip=None)
    assert not any(detected.color for detected in objects)
