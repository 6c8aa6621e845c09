"""Items of each language task, their files, and lm-eval requests, for the tests of language."""

import json

from lm_eval.api.instance import Instance

from eval.lm_eval_data import TASKS

PAIRS = [("Anna walked slowly", " through the old harbour."), ("", "Bela wrote a letter."), ("Carl ", "left early.")]
# One item of each task, with the fields of the hub's copies.
ITEMS = {
    "arc_challenge": {
        "question": "Which is a planet?", "choices": {"text": ["Mars", "Sirius", "Halley"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    "hellaswag": {
        "activity_label": "Sewing", "ctx_a": "Dora threads a needle.", "ctx_b": "she", "label": "0",
        "endings": ["sews a button.", "paints [title] a wall.", "flies.", "eats it."],
    },
    "piqa": {"goal": "Open a jar", "sol1": "Turn its lid.", "sol2": "Turn its bottom inside out.", "label": 0},
    "social_iqa": {
        "context": "Emil gave Flora a book.", "question": "What will Flora do?",
        "answerA": "read it", "answerB": "boil it", "answerC": "drive it", "label": "1",
    },
    "winogrande": {
        "sentence": "Anna thanked Dora, since _ had helped.", "option1": "Anna", "option2": "Dora", "answer": "2",
    },
}  # fmt: skip
FILES = {name: f"{name}_{task.split}.jsonl" for name, task in TASKS.items()}


def requests(pairs, kind="loglikelihood"):
    """lm-eval's instances for pairs (context, continuation), or for the arguments of another `kind`."""
    options = {"request_type": kind, "doc": {}, "idx": 0}
    return [Instance(arguments=pair, metadata=("task", index, 1), **options) for index, pair in enumerate(pairs)]


def changed(name, **changes):
    """A line of a benchmark file: the task's item with changes."""
    return json.dumps(ITEMS[name] | changes) + "\n"


def write_benchmarks(folder, *, count=12, names=tuple(ITEMS)):
    """Local copies of tasks with `count` different items each."""
    for name in names:
        text = next(key for key, value in ITEMS[name].items() if isinstance(value, str))
        lines = [changed(name, **{text: f"{number} {ITEMS[name][text]}"}) for number in range(count)]
        (folder / FILES[name]).write_text("".join(lines))
    return folder
