"""Language tasks made from held-out prose, as lm-eval dictionaries: a cloze and the bits per byte."""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.seeds import derive_seed

CLOZE = "um3_prose_cloze"
PROSE = "um3_prose"
CHOICES = 4
CONTEXT_SENTENCES = 3
MIN_SENTENCE = 25  # characters; shorter ones ("Yes," said he.) could follow anything
MAX_SENTENCE = 200  # and longer ones are lists that no small model's context holds
POOL = 40  # the distractors are the nearest in length of so many sentences of other documents


class ClozeItem(NamedTuple):
    """Which sentence comes next? `choices[label]`; the others are sentences of other documents."""

    context: str
    choices: list[str]
    label: int


def cloze_items(documents: Sequence[str], *, num_items: int, seed: int) -> list[ClozeItem]:
    """At most `num_items` items, spread evenly over the documents; the same documents and seed give the same items.

    An item shows up to three sentences and asks for the next. Distractors have about its length, so that neither
    brevity nor a total log-probability gives the answer away.

    Raises:
        UserError: the documents yield no item.
    """
    draw = random.Random(derive_seed(seed, CLOZE))
    sentences = [split_sentences(document) for document in documents]
    places = [
        (index, position)
        for index, found in enumerate(sentences)
        for position in range(1, len(found))
        if _fits(found[position])
    ]
    usable = {index: fitting for index, found in enumerate(sentences) if (fitting := list(filter(_fits, found)))}
    if not places or len(usable) < CHOICES:
        raise UserError(
            f"{len(documents)} held-out text documents are too few or too short for a cloze; "
            f"it needs {CHOICES} documents with sentences of {MIN_SENTENCE} to {MAX_SENTENCE} characters"
        )
    step = max(1.0, len(places) / num_items)
    chosen = [places[int(number * step)] for number in range(min(num_items, len(places)))]
    return [_item(sentences, index=index, position=position, usable=usable, draw=draw) for index, position in chosen]


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: cut after . ! ? (and closing quotes) before a capital or an opening quote."""
    flat = " ".join(text.split())
    return [part for part in re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))\s+(?=[\"'“‘]?[A-Z])", flat) if part]


def _fits(sentence: str) -> bool:
    return MIN_SENTENCE <= len(sentence) <= MAX_SENTENCE


def _item(
    sentences: Sequence[Sequence[str]],
    *,
    index: int,
    position: int,
    usable: Mapping[int, Sequence[str]],
    draw: random.Random,
) -> ClozeItem:
    answer = sentences[index][position]
    others = [other for other in usable if other != index]
    pool = {draw.choice(usable[draw.choice(others)]) for _ in range(POOL)}
    distractors = sorted(pool - {answer}, key=lambda text: (abs(len(text) - len(answer)), text))[: CHOICES - 1]
    label = draw.randrange(len(distractors) + 1)
    choices = [*distractors[:label], answer, *distractors[label:]]
    return ClozeItem(" ".join(sentences[index][max(0, position - CONTEXT_SENTENCES) : position]), choices, label)


def cloze_task(path: Path, *, cache: Path) -> dict[str, Any]:
    """Multiple choice over a JSONL file of `ClozeItem`s."""
    return {
        "task": CLOZE,
        **_json_data(path, split="test", cache=cache),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
        "metadata": {"version": 1.0},
    }


def prose_task(path: Path, *, cache: Path) -> dict[str, Any]:
    """Bits per byte and word perplexity of a JSONL file of {"text"}."""
    return {
        "task": PROSE,
        **_json_data(path, split="test", cache=cache),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        "metadata": {"version": 1.0},
    }


def _json_data(path: Path, *, split: str, cache: Path) -> dict[str, Any]:
    options = {"data_files": {split: str(path.resolve())}, "cache_dir": str(cache)}
    return {"dataset_path": "json", "dataset_kwargs": options}


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}
