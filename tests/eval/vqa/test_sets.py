"""Each set read from its official files: prompts, scores of perfect and wrong answers, and the files for others."""

import gzip
import json
from io import BytesIO
from typing import get_args

import openpyxl
import pytest

from eval.command import SkipCounter
from eval.scores import Measurement
from eval.vqa.questions import Answer, answer_lines, question_lines, read_answers
from eval.vqa.sets import SETS, SetName
from eval.vqa.yes_no import COGNITION, PERCEPTION
from tests.eval.vqa.files import ONE_WORD, WRITERS
from tests.helpers.processes import SHARED
from um3.core.errors import UserError

SCORED = [name for name in SETS if SETS[name].score]
VQA = SHARED / "data" / "vqa"
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(params=list(SETS))
def name(request):
    return request.param


def opened(name, folder):
    perfect = WRITERS[name](folder)
    questions = SETS[name].read(folder, folder)
    return questions, [Answer(*pair) for pair in zip(questions, perfect, strict=True)]


def rows(name, answers):
    return {row.metric: row for row in SETS[name].score(answers, Measurement(name, 0))}


def values(name, answers):
    return {metric: row.value for metric, row in rows(name, answers).items()}


def test_every_set_has_a_name_for_the_command():
    assert set(get_args(SetName)) == set(SETS)


def test_the_prompts(tmp_path):
    def texts(name):
        return [question.text for question in opened(name, tmp_path / name)[0]]

    assert texts("vqav2")[0] == f"What is it?\n{ONE_WORD}" == texts("gqa")[0].replace("What?", "What is it?")
    assert texts("textvqa")[0] == f"What brand is it?\n{ONE_WORD}"
    ocr = texts("textvqa_ocr")
    assert ocr[0] == f"What brand is it?\nReference OCR token: DAKOTA, $5\n{ONE_WORD}"
    assert ocr[2] == f"Which?\nReference OCR token: \n{ONE_WORD}"
    assert texts("pope")[0] == f"Is there a dog in the imange?\n{ONE_WORD}"
    assert texts("mme")[:2] == [f"Is it?\n{ONE_WORD}", f"Not?\n{ONE_WORD}"]
    assert texts("mm_vet") == ["Why 0?", "Why 1?"]
    first, second = texts("scienceqa")
    assert first == f"Context: A map.\nWhich?\nA. a\nB. b\n{LETTER}"
    assert second == f"Who?\nA. a\nB. b\nC. c\n{LETTER}"
    assert texts("seed_bench")[0] == f"Which?\nA. a\nB. b\nC. c\nD. d\n{LETTER}"
    first, second = texts("mmbench")
    assert first == f"A hint\nWhich?\nA. x\nB. y\n{LETTER}"
    assert second == f'Why "so"?\nA. x\nB. y\nC. z\nD. w\n{LETTER}'


def test_the_ids_are_those_of_llava(tmp_path):
    def ids(name):
        return [question.question_id for question in opened(name, tmp_path / name)[0]]

    assert ids("pope") == [1, 2, 10000001, 10000002, 20000001, 20000002]
    assert ids("mme") == ["existence/01.jpg"] * 2 + ["artwork/images/7.jpg"] * 2
    assert ids("textvqa") == ["ab", "ab", "cd"] and ids("mm_vet") == [0, 1] and ids("gqa") == ["201", "202"]


@pytest.mark.parametrize("name", [name for name in SCORED if name != "mme"])
def test_perfect_answers_score_100_and_wrong_ones_0(name, tmp_path):
    _, answers = opened(name, tmp_path)
    scores = rows(name, answers)
    first = "f1" if name == "pope" else "accuracy"
    assert next(iter(scores)) == first and scores[first].n == len(answers)
    shares = {metric: row.value for metric, row in scores.items() if not metric.startswith("yes_")}
    assert set(shares.values()) == {1.0}
    wrong = [answer._replace(text="No" if name == "pope" and answer.question.truth else "yes, x") for answer in answers]
    assert {value for metric, value in values(name, wrong).items() if not metric.startswith("yes_")} == {0.0}


def test_the_rows_of_groups(tmp_path):
    def metrics(name):
        return [*rows(name, opened(name, tmp_path / name)[1])]

    kinds = [f"answer_type: {kind}" for kind in ("number", "other", "yes/no")]
    types = [f"question_type: {kind}" for kind in ("how many", "is it", "what is")]
    assert metrics("vqav2") == ["accuracy", *kinds, *types]
    assert metrics("gqa") == ["accuracy", "binary", "open"] and metrics("scenes") == ["accuracy", "colour", "count"]
    assert metrics("scienceqa") == ["accuracy", "with_image"]
    assert metrics("seed_bench") == ["accuracy", "Action Recognition", "Scene Understanding", "image", "video"]


def test_pope_is_the_mean_of_three_f1(tmp_path):
    questions, _ = opened("pope", tmp_path)
    all_yes = [Answer(question, "Yes") for question in questions]
    scored = rows("pope", all_yes)
    scores = {metric: row.value for metric, row in scored.items()}
    assert scores["f1"] == pytest.approx(2 / 3) and scores["accuracy_random"] == 0.5 == scores["precision_popular"]
    assert scores["recall_random"] == 1 == scores["yes_random"]
    assert scored["f1_adversarial"].low < scores["f1_adversarial"] < scored["f1_adversarial"].high
    half = [answer._replace(text="no") if answer.question.category == "random" else answer for answer in all_yes]
    scores = values("pope", half)
    assert scores["f1"] == pytest.approx(4 / 9) and scores["f1_random"] == 0
    row = rows("pope", all_yes[:4])["f1"]
    assert row.value is None and "popular" in row.note


def test_mme_adds_accuracy_and_accuracy_plus(tmp_path):
    questions, perfect = opened("mme", tmp_path)
    scores = rows("mme", perfect)
    assert scores["existence"].value == scores["artwork"].value == 200 and scores["existence"].n == 2
    assert scores["perception"].value is None and "count" in scores["perception"].note
    half = [Answer(question, "yes") for question in questions]
    assert values("mme", half)["existence"] == 50
    every = [Answer(q._replace(category=kind), text) for kind in (*PERCEPTION, *COGNITION) for q, text in perfect[:2]]
    assert values("mme", every)["perception"] == 2000 and values("mme", every)["cognition"] == 800


def test_mme_reads_its_result_templates_too(tmp_path):
    (tmp_path / "existence.txt").write_text("a.jpg\tIs it? Please answer yes or no.\tYes\na.jpg\tNot?\tNo\textra\n")
    questions = SETS["mme"].read(tmp_path, tmp_path)
    assert [(q.question_id, q.truth[1]) for q in questions] == [("existence/a.jpg", "Yes"), ("existence/a.jpg", "No")]
    templates, release = tmp_path / "templates", tmp_path / "release"
    for place in ("existence", "artwork/images"):
        category = place.partition("/")[0]
        (release / place).mkdir(parents=True)
        (release / place / "a.jpg").touch()
        templates.mkdir(exist_ok=True)
        (templates / f"{category}.txt").write_text("a.jpg\tIs it? Please answer yes or no.\tYes\n")
    images = {question.image for question in SETS["mme"].read(templates, release)}
    assert images == {release / "existence/a.jpg", release / "artwork/images/a.jpg"}


def test_the_question_file_names_images_anywhere(tmp_path):
    questions, _ = opened("mme", tmp_path)
    names = [json.loads(line)["image"] for line in question_lines(questions, images=tmp_path / "else").splitlines()]
    assert names and all((tmp_path / "else" / name).resolve().is_file() for name in names) and names[0][:3] == "../"


def test_the_files_of_the_official_formats(name, tmp_path):
    _, answers = opened(name, tmp_path)
    files = SETS[name].upload(answers, tmp_path)
    if name == "mmbench":
        sheet = openpyxl.load_workbook(BytesIO(files["mmbench.xlsx"])).active
        head, first, second = sheet.iter_rows(values_only=True)
        assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
        assert first == (3, "Which?", "x", "y", None, None, "A", "A", "dev") and second[1] == 'Why "so"?'
    elif name == "mme":
        assert files["existence.txt"].splitlines()[0] == "01.jpg\tIs it?  Please answer yes or no.\tYes\tYes"
    elif name == "pope":
        lines = [json.loads(line) for line in files["coco_pope_random_answers.json"].splitlines()]
        assert lines[1] == {"question": "Is there a random cat in the image?", "answer": "No, there is not."}
    elif name in EXPECTED:
        (content,) = files.values()
        assert json.loads(content) == EXPECTED[name]
    else:
        (content,) = files.values()
        assert [json.loads(line) for line in content.splitlines()] == EXPECTED_LINES[name]


def answered(*pairs):
    return [{"question_id": question_id, "answer": text} for question_id, text in pairs]


EXPECTED = {
    "vqav2": answered((420, "pagoda"), (421, "two"), (430, "yes")),
    "vqav2_test_dev": answered((10, "red round ball"), (11, "2"), (12, "")),
    "gqa": [{"questionId": "201", "prediction": "red"}, {"questionId": "202", "prediction": "yes"}],
    "textvqa": answered((1, "Dakota."), (2, "$5"), (3, "none")),
    "mm_vet": {"v1_0": "Because.", "v1_1": "It is."},
    "scienceqa": {"results": {"5": 1, "6": 2}, "outputs": {"5": "B", "6": "The answer is C."}},
}
EXPECTED["textvqa_ocr"] = EXPECTED["textvqa"]
EXPECTED_LINES = {
    "seed_bench": [{"question_id": "101", "prediction": "A"}, {"question_id": "v1", "prediction": "D"}],
    "scenes": answered(("s-1", "3"), ("s-2", "red."), ("s-3", "2")),
}


def test_an_answer_file_is_read_as_it_was_written(name, tmp_path):
    questions, answers = opened(name, tmp_path)
    (tmp_path / "answers.jsonl").write_text(answer_lines(answers[::-1], model_id="m"))
    skipped = SkipCounter()
    again = read_answers(tmp_path / "answers.jsonl", questions, of=SETS[name], skipped=skipped)
    assert again == answers and not skipped.count
    lines = question_lines(questions, images=tmp_path).splitlines()
    fields = json.loads(lines[0])
    assert list(fields) in (["question_id", "image", "text", "category"], ["question_id", "text", "category"])


def test_result_files_are_read_too(tmp_path):
    for name in ("vqav2", "gqa", "seed_bench", "mme"):
        questions, answers = opened(name, folder := tmp_path / name)
        for file, content in SETS[name].upload(answers, folder).items():
            (folder / "results").mkdir(exist_ok=True)
            (folder / "results" / file).write_text(content)
        path = folder / "results" if name == "mme" else next((folder / "results").iterdir())
        again = read_answers(path, questions, of=SETS[name], skipped=SkipCounter())
        assert values(name, again) == values(name, answers)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question_id": 1, "prompt": "other", "text": "yes"}\n', "answers no question.*first id is '1'"),
        ('{"question_id": 9, "text": "yes"}\nnot json\n', "answers no question"),
        ("", "answers no question"),
    ],
)
def test_answers_to_another_set_are_one_line(lines, message, tmp_path):
    questions, _ = opened("pope", tmp_path)
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "a.jsonl", questions, of=SETS["pope"], skipped=SkipCounter())


def test_odd_lines_are_counted_and_second_answers_refused(tmp_path):
    questions, answers = opened("pope", tmp_path)
    text = answer_lines(answers, model_id="m")
    other = '{"question_id": 1, "prompt": "Is there a cow?", "text": "yes"}\n[]\n{"question_id": 2, "text": 3}\n'
    (tmp_path / "a.jsonl").write_text(text + other)
    skipped = SkipCounter()
    assert read_answers(tmp_path / "a.jsonl", questions, of=SETS["pope"], skipped=skipped) == answers
    counts = {reason: entry["count"] for reason, entry in skipped.to_dict().items()}
    assert counts == {"answer to another question": 1, "line without question_id and text": 2}
    (tmp_path / "a.jsonl").write_text(text + text)
    with pytest.raises(UserError, match="second answer to question 1"):
        read_answers(tmp_path / "a.jsonl", questions, of=SETS["pope"], skipped=SkipCounter())


def test_files_of_another_form_are_one_line(name, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        SETS[name].read(tmp_path, tmp_path)
    WRITERS[name](tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    for content in (b'{"questions": 3, "data": 3, "annotations": 3}', b"\xff\x00", b'[{"question_id": 1}]', b"{"):
        for file in files:
            file.write_bytes(content)
        with pytest.raises(UserError, match=str(tmp_path)):
            SETS[name].read(tmp_path, tmp_path)


def test_a_file_may_be_gzipped_and_two_are_refused(tmp_path):
    _, answers = opened("pope", tmp_path)
    file = tmp_path / "coco_pope_random.json"
    packed = file.with_name(f"{file.name}.gz")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(UserError, match=r"coco_pope_random\.json\.gz"):
        SETS["pope"].read(tmp_path, tmp_path)
    file.unlink()
    assert SETS["pope"].read(tmp_path, tmp_path) == [answer.question for answer in answers]


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd"])
def test_an_image_outside_of_the_folder_is_refused(image, tmp_path):
    WRITERS["scenes"](tmp_path)
    row = {"question_id": "s-1", "image": image, "text": "What?", "category": "c"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="lies outside"):
        SETS["scenes"].read(tmp_path, tmp_path)


@pytest.mark.skipif(not VQA.is_dir(), reason="the shared data is not here")
def test_perfect_answers_to_the_shared_questions(tmp_path):
    scenes = VQA / "scenes"
    for name, count, truth in (
        ("vqav2", 201, lambda q: q.truth[0]),
        ("gqa", 201, lambda q: q.truth),
        ("pope", None, lambda q: "Yes" if q.truth else "No"),
        ("mme", None, lambda q: q.truth[1]),
    ):
        questions = SETS[name].read(scenes, scenes)
        assert count in (None, len(questions)) and all(question.image.is_file() for question in questions)
        scores = values(name, [Answer(question, truth(question)) for question in questions])
        assert scores.get("existence", 200) == 200 and scores.get("accuracy", scores.get("f1", 1)) == 1
    questions = SETS["pope"].read(VQA / "pope", tmp_path)
    assert [sum(q.category == split for q in questions) for split in ("random", "popular")] == [2910, 3000]
    assert rows("pope", [Answer(q, "Yes" if q.truth else "No") for q in questions])["f1"].value == 1
    assert len(SETS["vqav2"].read(VQA / "photos", VQA / "photos")) == 10
