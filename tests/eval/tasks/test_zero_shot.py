import numpy as np
import torch
import torch.nn.functional as F

import tokenizer
from eval.scores import Measurement
from eval.tasks.classification_data import LabelledImages
from eval.tasks.zero_shot import distinct_groups, retrieval_scores, zero_shot_score

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
    data = LabelledImages(filled([3, 4, 5, 5]), [3, 4, 5, 6], "four")
    common = {"class_names": WORDS, "model": tower, "processor": tower, "of": T}
    score = zero_shot_score(data, templates=["a {}", "the {}"], **common)
    assert score.value == 0.75 and score.n == 4
    assert score.protocol_hash == zero_shot_score(data, templates=["a {}", "the {}"], **common).protocol_hash
    other = LabelledImages(data.images, data.labels, "other")
    for changed in (
        zero_shot_score(data, templates=["a {}"], **common),
        zero_shot_score(other, templates=["a {}", "the {}"], **common),
    ):
        assert changed.protocol_hash != score.protocol_hash


def test_images_without_captions_are_in_no_gallery():
    values, row = by_hand(numbers=range(4), captions=["w0", "", "w2", ""], gallery=2)
    assert values == {"image_to_text": 1, "text_to_image": 1} and (row.n, row.skipped) == (2, 2)
    values, row = by_hand(numbers=range(4), captions=[""] * 4, gallery=2)
    assert values == {"image_to_text": None, "text_to_image": None}
    assert row.note == "0 distinct captions among 4 images; a gallery needs 2"


def test_retrieval_over_other_captions_is_another_protocol():
    hashes = [by_hand(numbers=range(10), captions=given, gallery=5)[1].protocol_hash for given in (WORDS, WORDS[::-1])]
    assert hashes[0] == by_hand(numbers=range(10), captions=WORDS, gallery=5)[1].protocol_hash != hashes[1]


def test_a_real_tokenizer_runs_through_retrieval(qlip_folder, scenes):
    model, processor = tokenizer.load(qlip_folder)
    images, captions = scenes
    full = [given[0] for given in captions]
    (first, _) = retrieval_scores(images, captions=full, of=T, gallery=10, model=model, processor=processor)
    assert 0 <= first.value <= 1 and first.n + first.skipped == 40
