"""Every rule of the published scorers, the odd ones too, on hand-made cases."""

import pytest

from eval.vqa.normalisers import (
    CONTRACTIONS,
    exact_score,
    mme_label,
    normalise_evalai,
    normalise_vqa,
    pope_says_yes,
    scienceqa_letter,
    soft_score,
    textvqa_score,
    vqa_score,
)

VQA = {
    "Red": "red",
    "  two   Dogs ": "2 dogs",
    "None": "0",
    "ten of a kind": "10 of kind",
    "The end": "end",
    "t-shirt": "t shirt",  # a mark between letters becomes a space
    "t-shirt - red": "tshirt red",  # beside a space anywhere: deleted everywhere
    "red, white": "red white",
    "red,white": "red white",
    "1,000": "1000",  # a comma between digits deletes every mark
    "1,000 black/white": "1000 blackwhite",
    "1,,000": "1000",
    "3:30": "3:30",  # a colon is not among the marks
    "3.5": "3.5",
    "mr. smith.": "mr smith",
    ".5": ".5",
    "a.b": "ab",
    "dont": "don't",
    "don't": "don't",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "somebody'd": "somebodyd",
    "Im": "im",  # I'm is in the official table with a capital
    "oclock": "o'clock",
    "what's that?": "what's that",
    "": "",
    "the": "",
    "zero.": "0",
    "." * 40 + "a": "." * 8 + "a",  # only the first 32 periods go
}


@pytest.mark.parametrize("text", VQA)
def test_the_normaliser_of_the_vqa_script(text):
    assert normalise_vqa(text) == VQA[text]


def test_every_contraction_misses_one_apostrophe():
    assert len(CONTRACTIONS) > 100 and CONTRACTIONS["twas"] == "'twas" and CONTRACTIONS["yall"] == "y'all"
    assert {key: word for key, word in CONTRACTIONS.items() if len(key) != len(word) - 1} == {"somebody'd": "somebodyd"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000", "1000"),
        ("red,white", "redwhite"),  # unlike the VQA script: the comma is gone before the marks are looked at
        ("1,000 black/white", "1000 black white"),
        ("Denny's", "denny 's"),
        ("what?", "what"),
        ("coca-cola", "coca cola"),
        ("two\nlines\tmore", "2 lines more"),
        ("the A", ""),
        ("3.14.", "3.14"),
    ],
)
def test_the_processor_of_evalai(text, expected):
    assert normalise_evalai(text) == expected


@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_soft_score_leaves_each_answer_out_once(equal, score):
    assert soft_score("a", ["a"] * equal + ["b"] * (10 - equal)) == pytest.approx(score)


def test_vqav2_compares_unanimous_answers_as_written():
    assert vqa_score("Red", ["red"] * 10) == 0, "no normaliser runs when all ten answers are one string"
    assert vqa_score(" red\n", ["red "] * 10) == 1
    assert vqa_score("Red", ["red"] * 9 + ["dark red"]) == 1
    assert vqa_score("2", ["two"] * 5 + ["2"] * 5) == 1
    assert vqa_score("the tower", ["tower"] * 2 + ["pagoda"] * 8) == pytest.approx(0.6)


def test_textvqa_normalises_always():
    assert textvqa_score("Dakota.", ["dakota"] * 10) == 1
    assert textvqa_score("dakota digital", ["dakota"] * 10) == 0
    assert textvqa_score("1,000", ["1000"] * 3 + ["x"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(("text", "score"), [("Red.", 1), ("red..", 1), ("RED", 1), ("red ", 0), ("a red", 0)])
def test_gqa_compares_strings(text, score):
    assert exact_score(text, "red") == score


@pytest.mark.parametrize(
    ("read", "result", "texts"),
    [
        (pope_says_yes, True, ["Yes", "NO", "Not really", "Yes. No dog", "none", ""]),
        (pope_says_yes, True, ["no\nthere"]),  # split at spaces only
        (pope_says_yes, False, ["No", "no", "There is not", "No, there is none"]),
        (mme_label, "yes", ["Yes", "yes, it is", " yes", "eyes"]),
        (mme_label, "no", ["No", "noon"]),
        (mme_label, "other", ["  yes", "the no", "maybe", ""]),
        (scienceqa_letter, "B", ["B", "B. red"]),
        (scienceqa_letter, "C", ["So. The answer is C."]),
        (scienceqa_letter, "", ["B.", "b", "F", "B) red", "The answer is A. The answer is B.", ""]),
        (scienceqa_letter, "", ["The answer is C"]),  # the script wants a character after the letter
    ],
)
def test_pope_reads_a_sentence_mme_four_letters_and_scienceqa_a_letter(read, result, texts):
    assert {text: read(text) for text in texts} == dict.fromkeys(texts, result)
