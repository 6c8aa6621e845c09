"""Caption metrics against sacrebleu and cases by hand; test_coco_captions.py has the published example."""

import random

import pytest

from eval.metrics.captions import caption_scores, corpus_scores
from eval.metrics.ptb_tokenizer import tokenize
from eval.scores import Measurement
from um3.core.errors import UserError

T = Measurement("t", 0)
CANDIDATES = ["a red circle", "two blue squares on a plain ground", "a black cross above a green circle"]
REFERENCES = [["a red circle", "a circle"], ["two blue squares", "two squares"], ["a green circle below a black cross"]]


def values(candidates, references, **options):
    return {s.metric: s.value for s in caption_scores(candidates, references=references, of=T, **options)}


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog can't run.", "a man 's dog ca n't run"),
        ('He said "hello" - and left...', "he said hello and left"),
        ("A well-lit room (with chairs)", "a well-lit room -lrb- with chairs -rrb-"),
        ("They cannot; we’ll see!", "they can not we 'll see"),
        ("On Morgan Rd. at 4:30 p.m.", "on morgan rd. at 4:30 p.m."),
        ("the '60s, 10,000 people", "the '60s 10,000 people"),
        ("a\u2028b\x0bc\r\n d", "a b c d"),
        (" ... ", ""),
    ],
)
def test_tokens_follow_the_penn_treebank(caption, tokens):
    assert tokenize(caption) == tokens


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    generator = random.Random(0)
    words = ["a", "red", "blue", "green", "circle", "square", "cross", "above", "two", "of", "the"]
    sentences = [generator.choices(words, k=generator.randint(6, 12)) for _ in range(80)]
    references = [[" ".join(sentences[i]), " ".join(sentences[40 + i])] for i in range(40)]
    candidates = [" ".join(sentences[i][: generator.randint(4, 12)] + sentences[40 + i][:3]) for i in range(40)]
    bleu = sacrebleu.corpus_bleu(
        candidates, [list(column) for column in zip(*references, strict=True)], tokenize="none", smooth_method="none"
    )
    assert corpus_scores(candidates, references=references)[0]["bleu_4"] * 100 == pytest.approx(bleu.score, rel=1e-6)


def test_perfect_captions_and_both_kinds_of_exact_match():
    same = values([texts[0] for texts in REFERENCES], REFERENCES)
    assert same["exact_match"] == same["exact_match_any"] == same["rouge_l"] == 1
    assert same["bleu_1"] == pytest.approx(1)
    other = values([texts[-1] for texts in REFERENCES], REFERENCES)
    assert other["exact_match"] == pytest.approx(1 / 3) and other["exact_match_any"] == 1
    assert values(CANDIDATES, REFERENCES)["exact_match"] == pytest.approx(1 / 3)


def test_bleu_has_no_value_for_captions_that_are_too_short():
    rows = caption_scores(["a handwritten two"], references=[["a handwritten three", "the number three in ink"]], of=T)
    by_metric = {row.metric: row for row in rows}
    assert by_metric["bleu_3"].value is not None
    assert by_metric["bleu_4"].value is None and "3 words" in by_metric["bleu_4"].note


def test_means_over_images_have_an_interval_and_corpus_scores_have_none():
    rows = {row.metric: row for row in caption_scores(CANDIDATES, references=REFERENCES, of=T)}
    for name in ("exact_match", "rouge_l", "cider"):
        assert rows[name].low < rows[name].value < rows[name].high, name
    assert rows["bleu_4"].low is rows["bleu_4"].high is None


def test_order_does_not_matter():
    order = [2, 0, 1]
    first = caption_scores(CANDIDATES, references=REFERENCES, of=T)
    second = caption_scores([CANDIDATES[i] for i in order], references=[REFERENCES[i] for i in order], of=T)
    for a, b in zip(first, second, strict=True):
        assert a.protocol_hash == b.protocol_hash
        assert a.value is b.value is None or a.value == pytest.approx(b.value, rel=1e-12)


def test_the_kind_of_white_space_changes_nothing():
    blanks = "\u2028\u2029\x0b\x0c\r\n\u00a0"
    spaced = [caption.replace(" ", f" {blanks}", 1) for caption in CANDIDATES]
    assert values(spaced, REFERENCES) == values(CANDIDATES, REFERENCES)


def test_an_empty_caption_counts_as_wrong():
    scores = values(["", *CANDIDATES[1:]], REFERENCES)
    assert scores["exact_match"] == 0 and scores["rouge_l"] < values(CANDIDATES, REFERENCES)["rouge_l"]
    assert values(["", "", ""], REFERENCES)["bleu_1"] == pytest.approx(0, abs=1e-6)


def test_without_a_request_or_java_meteor_is_a_row_with_a_note(monkeypatch, tmp_path):
    def meteor(**options):
        rows = caption_scores(CANDIDATES, references=REFERENCES, of=T, **options)
        return next(row for row in rows if row.metric == "meteor")

    assert meteor().value is None and "captions.meteor=true" in meteor().note and meteor().paper == 0.202
    monkeypatch.setenv("PATH", str(tmp_path))
    assert meteor(meteor=True).value is None and "needs Java" in meteor(meteor=True).note


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [([], [], "no captions"), (["a"], [["a"], ["b"]], "references for 2"), (["a", "b"], [["a"], []], "image 1")],
)
def test_bad_input_is_a_one_line_error(candidates, references, message):
    with pytest.raises(UserError, match=message):
        caption_scores(candidates, references=references, of=T)
