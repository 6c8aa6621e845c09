"""Sets of yes-or-no questions: POPE and MME."""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.paper_values import VQA_LLAVA_QLIP as PAPER
from eval.scores import Measurement, Score, bootstrap_groups
from eval.vqa.normalisers import mme_label, one_line, pope_says_yes
from eval.vqa.questions import (
    ONE_WORD,
    Answer,
    Question,
    VQASet,
    find_file,
    first_line,
    image_file,
    json_text,
    read_lines,
    reading,
)
from um3.core.errors import UserError
from um3.core.files import parse_json

POPE_SPLITS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What LLaVA's question file adds to the ids of each split."""
POPE_COUNTS = {"adversarial": 3000, "random": 2910, "popular": 3000}
"""Questions of COCO's files at e3e39262, which LLaVA's figures use; today's random has 3,000."""
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_SUFFIX = "Please answer yes or no."


def _read_pope(data: Path, images: Path) -> list[Question]:
    questions = []
    for split, first_id in POPE_SPLITS.items():
        path = find_file(data, f"coco_pope_{split}.json")
        with reading(path):
            for number, line in enumerate(read_lines(path), start=1):
                row = parse_json(line, where=f"{path}:{number}", keys=["question_id", "image", "text", "label"])
                if row["label"] not in ("yes", "no"):
                    raise UserError(f"{path}:{number} has the label {row['label']!r}; use the published file")
                image = image_file(images, row["image"], folders=("", "val2014", "images"))
                question_id = first_id + int(row["question_id"])
                text = f"{row['text']}\n{ONE_WORD}"
                questions.append(Question(question_id, image, text, split, row["label"] == "yes"))
    return questions


def _score_pope(answers: Sequence[Answer], of: Measurement) -> list[Score]:
    """The mean F1 of the splits, and accuracy, precision, recall, F1 and the share of yes of each (positive is yes)."""
    tables: dict[str, list[tuple[bool, bool]]] = {split: [] for split in POPE_SPLITS}
    for question, text in answers:
        tables[question.category].append((pope_says_yes(text), question.truth))
    counts = {
        split: np.array([[yes and truth, yes and not truth, truth and not yes] for yes, truth in table], dtype=float)
        for split, table in tables.items()
    }
    if missing := [split for split, table in tables.items() if not table]:
        rows = [of.missing("f1", note=f"no answers of the split {missing[0]}", unit="x100")]
    else:
        groups = list(counts.values())
        value = float(np.mean([_f1(group.mean(0)) for group in groups]))
        ends = bootstrap_groups(groups, lambda means: float(np.mean([_f1(mean) for mean in means])))
        odd = [name for name, table in tables.items() if len(answers) > 8000 and len(table) != POPE_COUNTS[name]]
        note = f"{odd[0]} has {len(tables[odd[0]])} questions, LLaVA's has {POPE_COUNTS[odd[0]]}" if odd else ""
        rows = [of.score("f1", value, n=len(answers), unit="x100", note=note, **ends._asdict())]
    for split, table in tables.items():
        if table:
            hits, false_yes, misses = counts[split].sum(0)
            ends = bootstrap_groups([counts[split]], lambda means: _f1(means[0]))
            values = {"precision": hits / max(hits + false_yes, 1), "recall": hits / max(hits + misses, 1)}
            rows += [
                of.score(f"f1_{split}", _f1(counts[split].mean(0)), n=len(table), unit="x100", **ends._asdict()),
                of.mean(f"accuracy_{split}", [float(yes == truth) for yes, truth in table], unit="x100"),
                *(of.score(f"{name}_{split}", value, n=len(table), unit="x100") for name, value in values.items()),
                of.mean(f"yes_{split}", [float(yes) for yes, _ in table], unit="x100"),
            ]
    return rows


def _f1(counts: NDArray) -> float:
    """F1 from numbers or shares of (true yes, false yes, missed yes); 0 without any."""
    hits, false_yes, misses = counts
    return float(2 * hits / (2 * hits + false_yes + misses)) if hits else 0.0


def _upload_pope(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    """POPE's own answer files, a line for each question in the order of the labels."""
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in POPE_SPLITS}
    for question, text in answers:
        rows[question.category].append({"question": question.text.removesuffix(f"\n{ONE_WORD}"), "answer": text})
    return {f"coco_pope_{split}_answers.json": json_text(of_split) for split, of_split in rows.items()}


def _read_mme(data: Path, images: Path) -> list[Question]:
    """MME's release (CATEGORY folders with images and a .txt for each), or its result templates (CATEGORY.txt)."""
    questions = []
    for category in (*PERCEPTION, *COGNITION):
        folders = [folder for place in ("", "*/") for folder in data.glob(f"{place}{category}") if folder.is_dir()]
        if folders:
            questions += _mme_folder(folders[0], category)
        elif any(file for place in ("", "*/") for file in data.glob(f"{place}{category}.txt")):
            path = find_file(data, f"{category}.txt")
            for line in read_lines(path):
                with reading(path):
                    name, text, truth, *_ = line.strip().split("\t")
                image = image_file(
                    images, f"{category}/images/{name}", f"{category}/{name}", name, folders=("", "images")
                )
                questions.append(_mme_question(f"{category}/{name}", image, text, truth, where=path))
    if not questions:
        raise UserError(f"{data} has no folder or file of MME's categories, such as existence or existence.txt")
    return questions


def _mme_folder(folder: Path, category: str) -> list[Question]:
    questions = []
    texts = folder / "questions_answers_YN"
    for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
        stems = [folder / place / f"{path.stem}{end}" for place in ("images", "") for end in (".jpg", ".png")]
        image = next((file for file in stems if file.is_file()), stems[0])
        for line in read_lines(path):
            with reading(path):
                text, truth = line.strip().split("\t")
            question_id = f"{category}/{image.relative_to(folder).as_posix()}"
            questions.append(_mme_question(question_id, image, text, truth, where=path))
    return questions


def _mme_question(question_id: str, image: Path, text: str, truth: str, *, where: Path) -> Question:
    if truth.lower() not in ("yes", "no"):
        raise UserError(f"{where} has the answer {truth!r}, neither Yes nor No; use the published file")
    prompt = f"{text.replace(MME_SUFFIX, '').strip()}\n{ONE_WORD}"
    return Question(question_id, image, prompt, question_id.partition("/")[0], truth=(text, truth))


def _mme_key(question_id: Any, text: str) -> Hashable:
    """Category, image and question, whatever the image's folder and ending and the spaces of the question."""
    category, _, image = str(question_id).partition("/")
    question = re.sub(f"{re.escape(ONE_WORD)}|{re.escape(MME_SUFFIX)}", "", text)
    return category, Path(image).stem, " ".join(question.split())


def _score_mme(answers: Sequence[Answer], of: Measurement) -> list[Score]:
    """Perception, cognition and each category: 100 x (accuracy + the share of images with all answers right)."""
    by_image: dict[str, dict[Hashable, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, text in answers:
        is_right = mme_label(text) == question.truth[1].lower()
        by_image[question.category][question.question_id].append(is_right)
    rows, categories = list[Score](), list[Score]()
    for total, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        groups = {name: _mme_counts(by_image[name].values()) for name in names if name in by_image}
        if missing := [name for name in names if name not in groups]:
            rows.append(of.missing(total, note=f"no answers of {', '.join(missing)}"))
        else:
            ends = bootstrap_groups([*groups.values()], lambda means: sum(map(_mme_score, means)))
            value = sum(_mme_score(group.mean(0)) for group in groups.values())
            n = sum(int(group[:, 1].sum()) for group in groups.values())
            rows.append(of.score(total, value, n=n, **ends._asdict()))
        for name, group in groups.items():
            ends = bootstrap_groups([group], lambda means: _mme_score(means[0]))
            n = int(group[:, 1].sum())
            categories.append(of.score(name.lower(), _mme_score(group.mean(0)), n=n, **ends._asdict()))
    return rows + categories


def _mme_counts(images: Any) -> NDArray:
    """(right answers, questions, all right) of each image."""
    return np.array([[sum(rights), len(rights), all(rights)] for rights in images], dtype=float)


def _mme_score(means: NDArray) -> float:
    right, asked, all_right = means
    return float(100 * (right / asked + all_right))


def _upload_mme(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    """The files that MME's calculation.py reads: image, question, truth, answer; the two lines of an image together."""
    files: dict[str, list[str]] = defaultdict(list)
    for question, text in answers:
        name = str(question.question_id).rpartition("/")[2]
        files[f"{question.category}.txt"].append("\t".join([name, *question.truth, one_line(text)]) + "\n")
    return {name: "".join(lines) for name, lines in files.items()}


YES_NO = {
    "pope": VQASet(
        f"question, {ONE_WORD}; no if No, no or not is a word of the first sentence; mean F1 of three splits",
        _read_pope,
        _upload_pope,
        _score_pope,
        key=first_line,
        paper={"f1": PAPER["pope"]},
    ),
    "mme": VQASet(
        f"question without '{MME_SUFFIX}', {ONE_WORD}; yes or no in the first four letters; accuracy and accuracy+",
        _read_mme,
        _upload_mme,
        _score_mme,
        key=_mme_key,
        paper={"perception": PAPER["mme"]},
    ),
}
