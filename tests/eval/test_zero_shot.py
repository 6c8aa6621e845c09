from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import tokenizer
from eval.labelled import LabelledImages
from eval.scores import Measurement
from eval.zero_shot import (
    distinct_groups,
    fit_probe,
    probe_inputs,
    probe_scores,
    retrieval_scores,
    zero_shot_score,
)

T = Measurement("t", 0)
WORDS = [f"w{i}" for i in range(10)]


class PixelTower:
    """A tower by hand: picture i is filled with the value i, caption i ends in "wi"; both become one-hot i."""

    device, dtype, image_size, text_tokenizer = torch.device("cpu"), torch.float32, 4, None

    def pixels(self, images):
        return torch.as_tensor(images).float()

    def text(self, captions):
        return {"input_ids": torch.tensor([[WORDS.index(caption.split()[-1])] for caption in captions])}

    def get_image_features(self, pixels):
        return F.one_hot(pixels[:, 0, 0, 0].long(), len(WORDS)).float()

    def get_text_features(self, input_ids):
        return F.one_hot(input_ids[:, 0], len(WORDS)).float()


def filled(numbers):
    return np.stack([np.full((4, 4, 3), number, np.uint8) for number in numbers])


def by_hand(*, numbers, captions, gallery):
    tower = PixelTower()
    rows = retrieval_scores(filled(numbers), captions=captions, model=tower, processor=tower, of=T, gallery=gallery)
    return {row.metric: row.value for row in rows}, rows[0]


def test_retrieval_by_hand():
    values, row = by_hand(numbers=range(10), captions=WORDS, gallery=10)
    assert values == {"image_to_text": 1, "text_to_image": 1} and (row.n, row.skipped) == (10, 0)
    # Pictures 0 and 1 are swapped: both find the other's caption.
    values, _ = by_hand(numbers=[1, 0, *range(2, 10)], captions=WORDS, gallery=10)
    assert values == {"image_to_text": 0.8, "text_to_image": 0.8}
    values, row = by_hand(numbers=range(10), captions=WORDS, gallery=4)
    assert values["image_to_text"] == 1 and (row.n, row.skipped) == (8, 2)


def test_a_repeated_caption_waits_for_the_next_gallery():
    assert distinct_groups(["a", "a", "b", "c", "b"], size=2) == [[0, 2], [1, 3]]
    assert distinct_groups(["a", "a"], size=2) == []
    values, row = by_hand(numbers=[0, 0, 1], captions=["w0", "w0", "w1"], gallery=10)
    assert values == {"image_to_text": None, "text_to_image": None}
    assert row.note == "2 distinct captions among 3 images; a gallery needs 10"


def test_zero_shot_by_hand():
    tower = PixelTower()
    data = LabelledImages(filled([3, 4, 5, 5]), [3, 4, 5, 6])
    score = zero_shot_score(data, class_names=WORDS, templates=["a {}", "the {}"], model=tower, processor=tower, of=T)
    assert score.value == 0.75 and score.n == 4


def test_probe_agrees_with_sklearn():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    inputs = generator.normal(size=(300, 12)) * 3 + 5 + np.eye(12)[labels] * 4
    standard = (inputs[:200] - inputs[:200].mean(0)) / inputs[:200].std(0, ddof=1)
    expected = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(standard, labels[:200])
    probe = fit_probe(torch.tensor(inputs[:200]), labels=labels[:200].tolist(), num_classes=4)
    np.testing.assert_allclose(probe.weight.numpy(), expected.coef_, atol=1e-3)
    found = probe.predict(torch.tensor(inputs[200:])).numpy()
    later = (inputs[200:] - inputs[:200].mean(0)) / inputs[:200].std(0, ddof=1)
    assert (found == expected.predict(later)).all()


def test_a_constant_feature_does_no_harm():
    inputs = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.9]])
    probe = fit_probe(inputs, labels=[0, 1, 0, 1], num_classes=2)
    assert probe.predict(inputs).tolist() == [0, 1, 0, 1]


def test_a_real_tokenizer_runs_through_all_three(qlip_folder, scenes):
    model, processor = tokenizer.load(qlip_folder)
    images, captions = scenes
    parts = SimpleNamespace(model=model, processor=processor)
    inputs = probe_inputs(images, **vars(parts))
    assert inputs["cls"].shape == (40, 16) and inputs["cls_mean"].shape == (40, 32)
    hidden = model.vision_features(processor.pixels(images))
    torch.testing.assert_close(inputs["mean"], hidden[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    # Colour of the ground is the same everywhere: a random tower still tells dark pictures from light ones.
    dark = (images.mean((1, 2, 3)) < np.median(images.mean((1, 2, 3)))).astype(int).tolist()
    data = LabelledImages(images, dark)
    rows = probe_scores(data, val=data, num_classes=2, of=T, **vars(parts))
    assert [row.metric for row in rows] == ["probe_cls", "probe_mean", "probe_cls_mean"] and rows[1].value > 0.7
    full = [given[0] for given in captions]
    (first, _) = retrieval_scores(images, captions=full, of=T, gallery=10, **vars(parts))
    assert 0 <= first.value <= 1 and first.n + first.skipped == 40
