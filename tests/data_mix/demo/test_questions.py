"""Questions about scenes and digits: every answer follows from the picture, and all kinds are asked."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_mix.conversations import open_conversations
from data_mix.demo.digits import CLASS_NAMES
from data_mix.demo.questions import EXTREMES
from data_mix.demo.scenes import SceneObject, ScenesSource, captions
from data_mix.sources.config import ConversationSourceConfig
from data_mix.write_questions import main
from um3.core.errors import UserError

SCENES = ConversationSourceConfig("scenes", kind="scenes", length=600)
DIGITS = ConversationSourceConfig("digits", kind="digits")
SIDES = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
"""Axis, and the sign of the second centre minus the first."""


def stands(first, second, relation):
    """Whether `first` is, along the larger offset, on that side of `second`; from the corners of the boxes."""
    offsets = [2 * (b - a) for a, b in zip((first.left, first.top), (second.left, second.top), strict=True)]
    offsets = [offset + second.side - first.side for offset in offsets]
    axis, sign = SIDES[relation]
    return offsets[axis] * sign > 0 and abs(offsets[axis]) >= abs(offsets[1 - axis])


def singular(word):
    return {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}.get(word, word)


def answer(question, objects, *, size):
    """The answer of a reader who knows the objects and the English words; size: of the image, in pixels."""
    shapes = [o.shape for o in objects]
    if question == "How many shapes are there?":
        return str(len(objects))
    if match := re.fullmatch(r"What colour (?:is|are) the (circle|square|triangle|cross|\w+s)\?", question):
        colours = {o.colour for o in objects if o.shape == singular(match[1])}
        absent = f"there {'are' if question.startswith('What colour are') else 'is'} no {match[1]}"
        return colours.pop() if len(colours) == 1 else absent
    if match := re.fullmatch(r"What shape is (\w+)\?", question):
        (shape,) = {o.shape for o in objects if o.colour == match[1]}
        return shape
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        return "yes" if any((o.colour, o.shape) == match.groups() for o in objects) else "no"
    if match := re.fullmatch(r"Are there (more|fewer|as many) (\w+) (?:than|as) (\w+)\?", question):
        first, second = (shapes.count(singular(word)) for word in match.groups()[1:])
        holds = {"more": first > second, "fewer": first < second, "as many": first == second}[match[1]]
        return "yes" if holds else "no"
    by_shape = {o.shape: o for o in objects}
    if match := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        if stands(by_shape[match[1]], by_shape[match[3]], match[2]):
            return "yes"
        axis, sign = SIDES[match[2]]
        first, second = (by_shape[match[group]].centre[axis] for group in (1, 3))
        return "no" if (second - first) * sign <= 0 else "a little"
    if match := re.fullmatch(r"Where is the (\w+) from the (\w+)\?", question):
        (relation,) = [side for side in SIDES if stands(by_shape[match[1]], by_shape[match[2]], side)]
        return relation
    if match := re.fullmatch(r"What is the (leftmost|rightmost|topmost|lowest) shape\?", question):
        order = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}[match[1]]
        return min(objects, key=lambda o: o.centre[order[0]] * order[1]).shape
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        middle = SceneObject("circle", "black", size // 2, size // 2, 0)
        (side,) = [side for side in SIDES if stands(by_shape[match[1]], middle, side)]
        return {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[side]
    if question == "What does the image show?":
        return captions(objects)[0]
    match = re.fullmatch(r"What colour is the shape (left of|right of|above|below) the (\w+) (\w+)\?", question)
    (known,) = [o for o in objects if (o.colour, o.shape) == match.groups()[1:]]
    (other,) = [o for o in objects if o is not known and stands(o, known, match[1])]
    return other.colour


@pytest.mark.parametrize("size", [32, 64])
def test_every_answer_about_a_scene_follows_from_its_objects(size):
    kinds, answers = Counter(), Counter()
    for split in ("train", "val"):
        source = open_conversations(SCENES, split=split, image_size=size)
        scenes = ScenesSource(size=size, length=len(source), split=split)
        for index in range(len(source)):
            key, questions = source.questions(index)
            assert key == scenes[index].key and 3 <= len(questions) <= 6
            for question in questions:
                assert question.answer == answer(question.text, scenes.objects(index), size=size), question
                kinds[question.kind] += 1
                answers[question.kind, question.answer] += 1
    assert len(kinds) == 12 and min(kinds.values()) > 60, kinds
    for kind in ("exists", "compare", "relation"):
        assert 0.25 < answers[kind, "yes"] / kinds[kind] < 0.75, (kind, answers)


def digit_answer(question, value):
    """The answer of a reader who knows the digit and the English words."""
    *words, last = question.rstrip("?").split()
    if question == "Which digit is it?":
        return CLASS_NAMES[value]
    if last == "odd":
        return "yes" if value in (1, 3, 5, 7, 9) else "no"
    assert question.startswith("Is it ")
    named = CLASS_NAMES[: value if "larger" in words else None]
    return "yes" if (last in named if "larger" in words else last == named[value]) else "no"


def test_every_answer_about_a_digit_follows_from_its_value():
    source, kinds = open_conversations(DIGITS, split="val"), Counter()
    for index in range(len(source)):
        key, questions = source.questions(index)
        assert source.images[index].key == key
        for question in questions:
            assert question.answer == digit_answer(question.text, source.images.labels[index]), question
            kinds[question.kind] += 1
    assert len(kinds) == 4 and min(kinds.values()) > 200


def test_a_question_does_not_give_its_answer_away():
    answers = defaultdict(Counter)
    source = open_conversations(replace(SCENES, length=4000), split="train")
    for index in range(len(source)):
        _, questions = source.questions(index)
        for question in questions:
            answers[question.text][question.answer] += 1
        for number, question in enumerate(questions):
            before = " ".join(earlier.text for earlier in questions[:number])
            if question.kind == "colour":
                assert f"the {question.answer} " not in before
            if question.kind in ("relation", "place", "extreme"):
                assert "What colour is the shape" not in before
                assert question.kind == "extreme" or not any(f"{word} shape" in before for word in EXTREMES.values())
    common = {text: counts for text, counts in answers.items() if counts.total() > 30}
    assert len(common) > 50 and all(len(counts) > 1 for counts in common.values())


def test_the_written_files_have_the_questions_of_the_sources(tmp_path, capsys):
    sources = "[{name: scenes, kind: scenes, length: 300, val_fraction: 0.5}, {name: digits, kind: digits}]"
    main([f"output_dir={tmp_path}", f"sources={sources}"])
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    annotations = json.loads((tmp_path / "annotations.json").read_text())["annotations"]
    assert len({row["question_id"] for row in asked}) == len(asked) > 1500
    configs = (replace(SCENES, length=300, val_fraction=0.5), DIGITS)
    scenes, digits = (open_conversations(config, split="val") for config in configs)
    of_images = [source.questions(index) for source in (scenes, digits) for index in range(len(source))]
    expected = [(f"{key}.png", question) for key, questions in of_images for question in questions]
    for row, truth, (image, question) in zip(asked, annotations, expected, strict=True):
        assert (row["image"], row["text"], row["category"]) == (image, question.text, question.kind)
        assert (truth["question_id"], truth["question_type"]) == (row["question_id"], question.kind)
        answers = [truth["multiple_choice_answer"], *(given["answer"] for given in truth["answers"])]
        assert answers == [question.answer] * 11
    kinds, printed = Counter(row["category"] for row in asked), capsys.readouterr().out
    assert len(kinds) == 16 and all(f"{kind} {count:,}" in printed for kind, count in kinds.items())
    image = np.asarray(Image.open(tmp_path / "images/scenes-val-0-00000003.png"))
    assert (image == scenes.images[3].image_HWC).all()


def test_the_written_conversations_are_those_of_the_source(tmp_path):
    main([f"output_dir={tmp_path}", "sources=[{name: scenes, kind: scenes, length: 40}]", "image_size=64", "seed=3"])
    options = {"images": str(tmp_path / "images"), "val_fraction": 0.0}
    config = ConversationSourceConfig("files", path=str(tmp_path / "train.json"), **options)
    files = open_conversations(config, split="train", check_images=True)
    drawn = open_conversations(replace(SCENES, length=40), split="train", image_size=64, seed=3)
    for written, conversation in zip(files, map(drawn.__getitem__, range(40)), strict=True):
        assert written.turns == conversation.turns and written.image == f"{conversation.image}.png"
        assert (files.read_image(written) == drawn.read_image(conversation)).all()


def test_images_that_another_process_may_read_stay_as_they_are(tmp_path):
    command = [f"output_dir={tmp_path}", "sources=[{name: scenes, kind: scenes, length: 4}]", "image_size=24"]
    main(command)
    images = sorted((tmp_path / "images").iterdir())
    images[0].write_bytes(b"cut")
    before = [path.stat().st_mtime_ns for path in images]
    main(command)
    after = [path.stat().st_mtime_ns for path in images]
    assert after[1:] == before[1:] and after[0] > before[0] and Image.open(images[0]).size == (24, 24)


@pytest.mark.parametrize(("sources", "message"), [("[]", "list at least one"), ("[{kind: llava}]", "scenes or digits")])
def test_questions_need_a_generated_source(sources, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([f"output_dir={tmp_path}", f"sources={sources}"])


def test_questions_depend_on_the_image_alone():
    short, long = (open_conversations(ConversationSourceConfig(name, kind="scenes", length=length), split="train")
                   for name, length in (("a", 10), ("b", 400)))  # fmt: skip
    assert [short[index] for index in range(10)] == [long[index] for index in range(10)]
    for source in (long, open_conversations(DIGITS, split="val")):
        assert (source.read_image(source[7]) == source.images[7].image_HWC).all()
