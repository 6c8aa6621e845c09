"""Sets with free answers: VQAv2, GQA, TextVQA, MM-Vet, and conversations about scenes."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from eval.paper_values import VQA_LLAVA_QLIP as PAPER
from eval.vqa.normalisers import exact_score, gqa_prediction, normalise_evalai, textvqa_score, vqa_score
from eval.vqa.questions import (
    ONE_WORD,
    Answer,
    Question,
    VQASet,
    find_file,
    image_file,
    item_scores,
    json_text,
    read_data,
    read_lines,
    reading,
)

COCO = ("", "val2014", "test2015", "images")
GQA_IMAGES = ("", "images")
TEXTVQA_IMAGES = ("", "train_images", "images")
OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_val.json"


def _vqav2_questions(path: Path, images: Path, *, split: str) -> list[Question]:
    """VQAv2's question file; a field `image` replaces COCO's file name."""
    with reading(path):
        return [
            Question(
                row["question_id"],
                image_file(images, row.get("image") or f"COCO_{split}_{row['image_id']:012d}.jpg", folders=COCO),
                f"{row['question']}\n{ONE_WORD}",
            )
            for row in read_data(path, keys=["questions"])["questions"]
        ]


def _read_vqav2(data: Path, images: Path) -> list[Question]:
    path = find_file(data, "v2_OpenEnded_mscoco_val2014_questions.json", "vqav2_questions.json", "questions.json")
    truth = find_file(data, "v2_mscoco_val2014_annotations.json", "vqav2_annotations.json", "annotations.json")
    annotations = _annotations(truth)
    with reading(truth):
        return [
            question._replace(
                truth=[answer["answer"] for answer in annotation["answers"]],
                groups=tuple(f"{kind}: {annotation[kind]}" for kind in ("answer_type", "question_type")),
            )
            for question in _vqav2_questions(path, images, split="val2014")
            for annotation in [annotations[question.question_id]]
        ]


def _annotations(path: Path) -> dict[Any, dict[str, Any]]:
    with reading(path):
        return {row["question_id"]: row for row in read_data(path, keys=["annotations"])["annotations"]}


def _read_test_dev(data: Path, images: Path) -> list[Question]:
    path = find_file(data, "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    return _vqav2_questions(path, images, split="test2015")


def _upload_vqav2(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    """The result file of the official script, with the answers as they are scored."""
    rows = [{"question_id": question.question_id, "answer": text} for question, text in answers]
    return {"vqav2_results.json": json.dumps(rows, ensure_ascii=False)}


def _upload_test_dev(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    """The server's file: an answer to every question of the whole test split, empty where none was asked."""
    path = find_file(data, "v2_OpenEnded_mscoco_test2015_questions.json")
    texts = {question.question_id: normalise_evalai(text) for question, text in answers}
    with reading(path):
        ids = [row["question_id"] for row in read_data(path, keys=["questions"])["questions"]]
    return {"vqav2_test_dev.json": json.dumps([{"question_id": id_, "answer": texts.get(id_, "")} for id_ in ids])}


def _read_gqa(data: Path, images: Path) -> list[Question]:
    path = find_file(data, "testdev_balanced_questions.json", "gqa_questions.json")
    with reading(path):
        return [
            Question(
                question_id,
                image_file(images, f"{row['imageId']}.jpg", f"{row['imageId']}.png", folders=GQA_IMAGES),
                f"{row['question']}\n{ONE_WORD}",
                truth=row["answer"],
                groups=("open" if row["types"]["structural"] == "query" else "binary",),
            )
            for question_id, row in read_data(path).items()
            if row["isBalanced"]
        ]


def _upload_gqa(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    rows = [{"questionId": str(question.question_id), "prediction": gqa_prediction(text)} for question, text in answers]
    return {"testdev_balanced_predictions.json": json.dumps(rows, ensure_ascii=False)}


def _read_textvqa(data: Path, images: Path, *, with_ocr: bool) -> list[Question]:
    """TextVQA's validation split. As in LLaVA, the image is the id; of two equal questions the last has the answers."""
    path, tokens = find_file(data, "TextVQA_0.5.1_val.json"), dict[str, list[str]]()
    if with_ocr and any(file for place in ("", "*/") for file in data.glob(f"{place}{OCR_FILE}*")):
        ocr = find_file(data, OCR_FILE)
        with reading(ocr):
            tokens = {row["image_id"]: row["ocr_tokens"] for row in read_data(ocr, keys=["data"])["data"]}
    with reading(path):
        rows = read_data(path, keys=["data"])["data"]
        truth = {(row["image_id"], row["question"].lower()): row for row in rows}
        return [
            Question(
                row["image_id"],
                image_file(images, f"{row['image_id']}.jpg", f"{row['image_id']}.png", folders=TEXTVQA_IMAGES),
                "\n".join(
                    [
                        row["question"].capitalize(),
                        *([f"Reference OCR token: {', '.join(tokens.get(row['image_id'], []))}"] if with_ocr else []),
                        ONE_WORD,
                    ]
                ),
                truth=truth[row["image_id"], row["question"].lower()] | {"question_id": row["question_id"]},
            )
            for row in rows
        ]


def _textvqa_key(question_id: Any, text: str) -> Hashable:
    """Image and question; LLaVA's files also have the tokens in front of the question."""
    lines = text.split("\n")
    line = lines[1] if len(lines) == 3 and lines[0].startswith("Reference OCR token:") else lines[0]
    return str(question_id), line.lower()


def _upload_textvqa(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    rows = [{"question_id": question.truth["question_id"], "answer": text} for question, text in answers]
    return {"textvqa_results.json": json.dumps(rows, ensure_ascii=False)}


def _read_mm_vet(data: Path, images: Path) -> list[Question]:
    path = find_file(data, "mm-vet.json")
    with reading(path):
        return [
            Question(
                int(name.removeprefix("v1_")), image_file(images, row["imagename"], folders=GQA_IMAGES), row["question"]
            )
            for name, row in read_data(path).items()
        ]


def _upload_mm_vet(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    texts = {f"v1_{question.question_id}": text for question, text in answers}
    return {"mm-vet.json": json.dumps(texts, indent=2, ensure_ascii=False)}


def _read_scenes(data: Path, images: Path) -> list[Question]:
    """LLaVA's question file and VQAv2's annotations; the category of a question is its kind."""
    path, truth = find_file(data, "questions.jsonl"), find_file(data, "annotations.json")
    annotations = _annotations(truth)
    with reading(path):
        rows = [json.loads(line) for line in read_lines(path)]
        return [
            Question(
                row["question_id"],
                image_file(images, row["image"], folders=GQA_IMAGES) if row.get("image") else None,
                row["text"],
                row["category"],
                truth=annotations[row["question_id"]]["multiple_choice_answer"].lower(),
                groups=(row["category"],),
            )
            for row in rows
        ]


def _upload_scenes(answers: Sequence[Answer], data: Path) -> dict[str, str]:
    return {"scenes.jsonl": json_text([{"question_id": q.question_id, "answer": text} for q, text in answers])}


PROMPT = f"question, {ONE_WORD}"
OPEN_ENDED = {
    "vqav2": VQASet(
        f"{PROMPT}; VQA script: normalised if the answers differ, soft score",
        _read_vqav2,
        _upload_vqav2,
        item_scores(vqa_score),
    ),
    "vqav2_test_dev": VQASet(
        f"{PROMPT}; EvalAI's processor",
        _read_test_dev,
        _upload_test_dev,
        unscored="scored by the VQA challenge's server",
        paper={"accuracy": PAPER["vqav2"]},
    ),
    "gqa": VQASet(
        f"{PROMPT}; lower case, periods off, equal strings",
        _read_gqa,
        _upload_gqa,
        item_scores(exact_score),
        paper={"accuracy": PAPER["gqa"]},
    ),
    "textvqa": VQASet(
        f"{PROMPT}; without OCR tokens; EvalAI's processor, soft score",
        lambda data, images: _read_textvqa(data, images, with_ocr=False),
        _upload_textvqa,
        item_scores(lambda text, truth: textvqa_score(text, truth["answers"])),
        key=_textvqa_key,
    ),
    "textvqa_ocr": VQASet(
        f"{PROMPT}; Rosetta's OCR tokens between them; EvalAI's processor, soft score",
        lambda data, images: _read_textvqa(data, images, with_ocr=True),
        _upload_textvqa,
        item_scores(lambda text, truth: textvqa_score(text, truth["answers"])),
        key=_textvqa_key,
        asked_with=OCR_FILE,
        paper={"accuracy": PAPER["textvqa_ocr"]},
    ),
    "mm_vet": VQASet(
        "question alone; judged by GPT-4",
        _read_mm_vet,
        _upload_mm_vet,
        unscored="graded by GPT-4 with MM-Vet's few-shot prompt (gpt-4-0613 in published figures)",
        max_new_tokens=1024,
        paper={"accuracy": PAPER["mm_vet"]},
    ),
    "scenes": VQASet(
        "prompt of the question file; lower case, periods off, equal strings",
        _read_scenes,
        _upload_scenes,
        item_scores(exact_score),
    ),
}
