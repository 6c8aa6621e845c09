"""Sets whose answers are letters: ScienceQA, SEED-Bench and MMBench."""

import base64
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.vqa.normalisers import scienceqa_letter
from eval.vqa.questions import (
    LETTER,
    LETTERS,
    Answer,
    Question,
    VQASet,
    find_file,
    image_file,
    item_scores,
    json_text,
    options,
    read_bytes,
    read_data,
    reading,
)

MMBENCH_FIELDS = ("index", "question", "A", "B", "C", "D")
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns of MMBench's file that the server's does not have."""


def _read_scienceqa(data: Path, images: Path) -> list[Question]:
    """The test split, prompted as in LLaVA's CQM-A; questions without an image are about their text alone."""
    path, splits = find_file(data, "problems.json"), find_file(data, "pid_splits.json")
    problems, ids = read_data(path), read_data(splits, keys=["test"])["test"]
    questions = []
    with reading(path):
        for question_id in ids:
            row = problems[question_id]
            hint = row.get("hint", "").strip()
            lines = [f"Context: {hint}"] * bool(hint) + [row["question"], options(row["choices"]), LETTER]
            name, folders = f"{question_id}/{row['image']}", ("", "test", "images/test", "images")
            image = image_file(images, name, folders=folders) if row.get("image") else None
            groups = () if image is None else ("with_image",)
            truth = LETTERS[row["answer"]]
            questions.append(Question(question_id, image, "\n".join(lines), truth=truth, groups=groups))
    return questions


def _upload_scienceqa(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    """The result file of ScienceQA's scripts: the index of each answer (-1 for none) and its text."""
    outputs = {str(question.question_id): text for question, text in answers}
    results = {name: LETTERS.find(scienceqa_letter(text) or "-") for name, text in outputs.items()}
    return {"scienceqa_results.json": json.dumps({"results": results, "outputs": outputs}, indent=2)}


def _read_seed(data: Path, images: Path) -> list[Question]:
    """SEED-Bench. The frame of a video question is TYPE_ID.png in SEED-Bench-video-image, as LLaVA extracts it."""
    path = find_file(data, "SEED-Bench.json")
    content = read_data(path, keys=["questions", "question_type"])
    with reading(path):
        names = {number: name for name, number in content["question_type"].items()}
        questions = []
        for row in content["questions"]:
            kind, question_id = row["data_type"], row["question_id"]
            is_video = kind == "video"
            name = f"{row['question_type_id']}_{question_id}.png" if is_video else row["data_id"]
            folder = "SEED-Bench-video-image" if is_video else "SEED-Bench-image"
            lines = [row["question"], options([row[f"choice_{letter}"] for letter in "abcd"]), LETTER]
            image = image_file(images, name, folders=(folder, ""))
            groups = (kind, names[row["question_type_id"]])
            questions.append(Question(question_id, image, "\n".join(lines), truth=row["answer"], groups=groups))
    return questions


def _upload_seed(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    rows = [{"question_id": question.question_id, "prediction": text} for question, text in answers]
    return {"seed_bench.jsonl": json_text(rows)}


def _read_mmbench(data: Path, images: Path) -> list[Question]:
    """MMBench's .tsv, which holds the images; a row is the truth, for the server's file."""
    path = find_file(data, "mmbench_dev_20230712.tsv", "mmbench_dev*.tsv", "MMBench_DEV_EN*.tsv")
    questions = []
    csv.field_size_limit(sys.maxsize)  # an image is one field
    with reading(path):
        table = csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), delimiter="\t")
        if missing := {*MMBENCH_FIELDS, "hint", "image"}.difference(table.fieldnames or ()):
            raise KeyError(min(missing))
        for row in table:
            choices = [row[letter] for letter in "ABCD"]
            choices = choices[: next((place for place, text in enumerate(choices) if _is_none(text)), 4)]
            lines = [row["hint"]] * (not _is_none(row["hint"])) + [row["question"], options(choices), LETTER]
            image = base64.b64decode(row["image"], validate=True)
            kept = {name: value for name, value in row.items() if name not in LEFT_OUT}
            questions.append(Question(int(row["index"]), image, "\n".join(lines), truth=kept))
    return questions


def _is_none(text: str | None) -> bool:
    """Whether a cell is empty for LLaVA."""
    return text is None or text.strip().lower() in ("", "nan", "none")


def _upload_mmbench(answers: Sequence[Answer], data: Path) -> dict[str, bytes]:
    """The server's workbook: index, question, options, prediction, and the other columns of the set's file."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    sheet = (book := Workbook(write_only=True)).create_sheet()
    others = [name for name in answers[0].question.truth if name not in MMBENCH_FIELDS]
    sheet.append([*MMBENCH_FIELDS, "prediction", *others])
    for question, text in answers:
        row = question.truth
        cells = [*(row[name] for name in MMBENCH_FIELDS[1:]), text, *(row[name] for name in others)]
        sheet.append([question.question_id, *(ILLEGAL_CHARACTERS_RE.sub("", cell or "") for cell in cells)])
    book.save(content := io.BytesIO())
    return {"mmbench.xlsx": content.getvalue()}


MULTIPLE_CHOICE = {
    "scienceqa": VQASet(
        f"context, question, options, {LETTER}; the letter that the text is, begins with or names",
        _read_scienceqa,
        _upload_scienceqa,
        item_scores(lambda text, truth: float(scienceqa_letter(text) == truth)),
        max_new_tokens=1024,
    ),
    "seed_bench": VQASet(
        f"question, options, {LETTER}; the text is the letter",
        _read_seed,
        _upload_seed,
        item_scores(lambda text, truth: float(text == truth)),
    ),
    "mmbench": VQASet(
        f"hint, question, options, {LETTER}",
        _read_mmbench,
        _upload_mmbench,
        unscored="scored by MMBench's server",
        max_new_tokens=1024,
    ),
}
