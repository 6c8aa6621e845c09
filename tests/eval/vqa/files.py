"""Small sets in the official formats, each with its perfect answers."""

import base64
import json
from io import BytesIO

from PIL import Image

from eval.vqa.sets import SETS

ONE_WORD = "Answer the question using a single word or phrase."


def ten(*answers):
    return [{"answer": answer, "answer_id": place} for place, answer in enumerate((answers * 10)[:10], start=1)]


def png(shade=0):
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(content := BytesIO(), "PNG")
    return content.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_vqav2(folder):
    for name in ("COCO_val2014_000000000042.jpg", "b.png"):
        write(folder / "val2014" / name, png())
    questions = [
        {"question_id": 420, "image_id": 42, "question": "What is it?"},
        {"question_id": 421, "image_id": 42, "question": "How many?"},
        {"question_id": 430, "image_id": 43, "image": "b.png", "question": "Is it red?"},
    ]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    pagoda = ten("pagoda", "a pagoda")
    rows = [
        {"question_id": 420, "question_type": "what is", "answer_type": "other", "answers": pagoda},
        {"question_id": 421, "question_type": "how many", "answer_type": "number", "answers": ten("2", "two")},
        {"question_id": 430, "question_type": "is it", "answer_type": "yes/no", "answers": ten("yes")},
    ]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": rows})
    return ["pagoda", "two", "yes"]


def write_vqav2_test_dev(folder):
    write(folder / "test2015" / "COCO_test2015_000000000001.jpg", png())
    rows = [{"question_id": number, "image_id": 1, "question": "What?"} for number in (10, 11, 12)]
    write(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": rows[:2]})
    write(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": rows})
    return ["A red, round Ball", "2"]


def write_gqa(folder):
    for name in ("n1.jpg", "n2.png"):
        write(folder / "images" / name, png())
    rows = {
        "201": {"question": "What?", "imageId": "n1", "answer": "red", "isBalanced": True},
        "202": {"question": "Is it?", "imageId": "n2", "answer": "yes", "isBalanced": True},
        "203": {"question": "Is it not?", "imageId": "n2", "answer": "no", "isBalanced": False},
    }
    for row, kind in zip(rows.values(), ("query", "verify", "verify"), strict=True):
        row["types"] = {"structural": kind}
    write(folder / "testdev_balanced_questions.json", rows)
    return ["Red.", "Yes"]


def write_textvqa(folder):
    write(folder / "train_images" / "ab.jpg", png())
    rows = [
        {"image_id": "ab", "question_id": 1, "question": "what Brand is it?", "answers": ["dakota"] * 10},
        {"image_id": "ab", "question_id": 2, "question": "how much?", "answers": ["$5"] * 10},
        {"image_id": "cd", "question_id": 3, "question": "which?", "answers": ["none", "0"] * 5},
    ]
    write(folder / "train_images" / "cd.jpg", png(1))
    write(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    tokens = [{"image_id": "ab", "ocr_tokens": ["DAKOTA", "$5"]}, {"image_id": "cd", "ocr_tokens": []}]
    write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    return ["Dakota.", "$5", "none"]


def write_pope(folder):
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the imange?", "label": "yes"},
            {"question_id": 2, "image": "a.jpg", "text": f"Is there a {split} cat in the image?", "label": "no"},
        ]
        write(folder / f"coco_pope_{split}.json", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "val2014" / "a.jpg", png())
    return ["Yes", "No, there is not."] * 3


def write_mme(folder):
    release = folder / "MME_Benchmark_release_version"
    write(release / "existence" / "01.jpg", png())
    lines = "Is it?  Please answer yes or no.\tYes\nNot? Please answer yes or no.\tNo\n"
    write(release / "existence" / "01.txt", lines)
    write(release / "artwork" / "images" / "7.jpg", png())
    lines = "Is it old? Please answer yes or no.\tNo\nIs it new? Please answer yes or no.\tYes\n"
    write(release / "artwork" / "questions_answers_YN" / "7.txt", lines)
    return ["Yes", "no.", "No", "yes"]


def write_mm_vet(folder):
    write(folder / "images" / "v1_0.png", png())
    rows = {f"v1_{n}": {"imagename": "v1_0.png", "question": f"Why {n}?", "answer": "so"} for n in (0, 1)}
    write(folder / "mm-vet.json", rows)
    return ["Because.", "It is."]


def write_scienceqa(folder):
    write(folder / "test" / "5" / "image.png", png())
    problems = {
        "5": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "A map.", "image": "image.png"},
        "6": {"question": "Who?", "choices": ["a", "b", "c"], "answer": 2, "hint": "", "image": None},
        "7": {"question": "Train?", "choices": ["a"], "answer": 0, "hint": "", "image": None},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"test": ["5", "6"], "train": ["7"]})
    return ["B", "The answer is C."]


def write_seed_bench(folder):
    write(folder / "SEED-Bench-image" / "p", png())
    write(folder / "SEED-Bench-video-image" / "10_v1.png", png())
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    rows = [
        {"question_id": "101", "data_id": "p", "data_type": "image", "question_type_id": 1, "answer": "A"},
        {"question_id": "v1", "data_id": "1.mp4", "data_type": "video", "question_type_id": 10, "answer": "D"},
    ]
    rows = [row | choices | {"question": "Which?"} for row in rows]
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    write(folder / "SEED-Bench.json", {"questions": rows, "question_type": types})
    return ["A", "D"]


def write_mmbench(folder):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    columns += ["comment", "split"]
    image = base64.b64encode(png()).decode()
    rows = [
        ["3", "Which?", "A hint", "x", "y", "", "", "A", "c", image, "s", "l", "", "dev"],
        ["4", 'Why "so"?', "nan", "x", "y", "z", "w", "B", "c", image, "s", "l", "", "dev"],
    ]
    lines = ["\t".join(columns), *("\t".join(f'"{cell}"'.replace('"so"', '""so""') for cell in row) for row in rows)]
    write(folder / "mmbench_dev_20230712.tsv", "\n".join(lines) + "\n")
    return ["A", "B. y"]


def write_scenes(folder):
    write(folder / "images" / "s.png", png())
    rows = [
        {"question_id": "s-1", "image": "s.png", "text": f"How many?\n{ONE_WORD}", "category": "count"},
        {"question_id": "s-2", "image": "s.png", "text": f"What colour?\n{ONE_WORD}", "category": "colour"},
        {"question_id": "s-3", "text": "What is 1 plus 1?", "category": "count"},
    ]
    write(folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pairs = zip(rows, ["3", "Red", "2"], strict=True)
    truth = [{"question_id": row["question_id"], "multiple_choice_answer": answer} for row, answer in pairs]
    write(folder / "annotations.json", {"annotations": truth})
    return ["3", "red.", "2"]


write_textvqa_ocr = write_textvqa
WRITERS = {name: globals()[f"write_{name}"] for name in SETS}
