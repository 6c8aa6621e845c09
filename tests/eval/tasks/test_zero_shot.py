"""Retrieval and zero-shot accuracy, on towers whose embeddings are known."""

import numpy as np
import torch
import torch.nn.functional as F

from eval.scores import Measurement
from eval.tasks.classification_data import ClassificationData, ClassificationTask
from eval.tasks.zero_shot import distinct_groups, retrieval_scores, zero_shot_score

T = Measurement("t", 0)
WORDS = [f"w{i}" for i in range(10)]


class PixelTower:
    """A tower by hand: image i is filled with the value i, caption i ends in "wi"; both are embedded as one-hot i."""

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
    # Images 0 and 1 are swapped: each has the other's caption as its nearest.
    values, _ = by_hand(numbers=[1, 0, *range(2, 10)], captions=WORDS, gallery=10)
    assert values == {"image_to_text": 0.8, "text_to_image": 0.8}
    values, row = by_hand(numbers=range(10), captions=WORDS, gallery=4)
    assert values["image_to_text"] == 1 and (row.n, row.skipped) == (8, 2)
    same, other = (by_hand(numbers=range(10), captions=texts, gallery=4)[1] for texts in (WORDS, WORDS[::-1]))
    assert row.protocol_hash == same.protocol_hash != other.protocol_hash


def test_repeated_and_empty_captions():
    assert distinct_groups(["a", "a", "b", "c", "b"], size=2) == [[0, 2], [1, 3]]
    assert distinct_groups(["a", "a"], size=2) == []
    values, row = by_hand(numbers=range(4), captions=["w0", "", "w2", ""], gallery=2)
    assert values == {"image_to_text": 1, "text_to_image": 1} and (row.n, row.skipped) == (2, 2)
    for captions, distinct in ((["w0", "w0", "w1"], 2), ([""] * 3, 0)):
        values, row = by_hand(numbers=[0, 0, 1], captions=captions, gallery=10)
        assert values == {"image_to_text": None, "text_to_image": None}
        assert row.note == f"{distinct} distinct captions among 3 images; a gallery needs 10"


def test_zero_shot_by_hand():
    def score(templates=("a {}", "the {}"), identity="four"):
        images = filled([3, 4, 5, 5])
        data = ClassificationData(images.__getitem__, classes=[3, 4, 5, 6], identity=identity)
        task = ClassificationTask("hand", data, None, WORDS, list(templates))
        return zero_shot_score(task, model=PixelTower(), processor=PixelTower(), of=T)

    assert score().value == 0.75 and score().n == 4
    assert score().protocol_hash == score().protocol_hash
    for changed in (score(templates=["a {}"]), score(identity="other")):
        assert changed.protocol_hash != score().protocol_hash
