"""Language tasks made from validation text, as lm-eval task configs: a cloze, and the bits per byte."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.seeds import derive_seed

CLOZE = "um3_prose_cloze"
PROSE = "um3_prose"
CHOICES = 4
CONTEXT_SENTENCES = 3
MIN_SENTENCE = 25  # characters; shorter sentences ("Yes," said he.) fit after anything
MAX_SENTENCE = 200  # longer ones are lists that exceed a small model's context
CANDIDATES = 40  # the distractors are those nearest in length to the answer of so many random sentences


class ClozeItem(NamedTuple):
    """Choose the sentence that follows `context`: `choices[label]`. The other choices come from other documents."""

    context: str
    choices: list[str]
    label: int


def cloze_items(documents: Sequence[str], *, num_items: int, seed: int) -> list[ClozeItem]:
    """At most `num_items` items, spread evenly over the documents; the same documents and seed give the same items.

    An item shows up to three sentences and asks for the next one. The distractors have about the answer's length, so
    that neither the length nor the total log-probability reveals the answer. UserError for too few usable sentences.
    """
    generator = random.Random(derive_seed(seed, CLOZE))
    sentences = [split_sentences(document) for document in documents]
    places = [(index, position) for index, document in enumerate(sentences) for position in range(1, len(document))]
    positions = [(index, position) for index, position in places if _is_usable(sentences[index][position])]
    usable = {i: answers for i, document in enumerate(sentences) if (answers := list(filter(_is_usable, document)))}
    if not positions or len(usable) < CHOICES:
        raise UserError(
            f"{len(documents)} validation documents are too few or too short for a cloze: it needs {CHOICES} "
            f"documents with sentences of {MIN_SENTENCE} to {MAX_SENTENCE} characters; add texts or raise val_fraction"
        )
    step, items = max(1.0, len(positions) / num_items), list[ClozeItem]()
    for number in range(min(num_items, len(positions))):
        index, position = positions[int(number * step)]
        answer, context = sentences[index][position], sentences[index][max(0, position - CONTEXT_SENTENCES) : position]
        others = [other for other in usable if other != index]
        candidates = {generator.choice(usable[generator.choice(others)]) for _ in range(CANDIDATES)}
        by_length = sorted((abs(len(text) - len(answer)), text) for text in candidates - {answer})
        choices = [text for _, text in by_length[: CHOICES - 1]]
        label = generator.randrange(len(choices) + 1)
        choices.insert(label, answer)
        items.append(ClozeItem(" ".join(context), choices, label))
    return items


def split_sentences(text: str) -> list[str]:
    """Split a text after . ! ? (and closing quotes) before a capital letter or an opening quote."""
    flat = " ".join(text.split())
    return [part for part in re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))\s+(?=[\"'“‘]?[A-Z])", flat) if part]


def _is_usable(sentence: str) -> bool:
    return MIN_SENTENCE <= len(sentence) <= MAX_SENTENCE


def prose_tasks(*, cloze_file: Path, prose_file: Path, cache: Path) -> list[dict[str, Any]]:
    """Multiple choice over a JSONL file of `ClozeItem`s; bits per byte and word perplexity over one of {"text"}."""

    def task(name: str, path: Path, **fields: Any) -> dict[str, Any]:
        data = {"data_files": {"test": str(path.resolve())}, "cache_dir": str(cache)}
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        return config | {"metadata": {"version": 1.0}} | fields

    choice = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices"}
    accuracies = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    return [
        task(CLOZE, cloze_file, **choice, doc_to_target="label", metric_list=accuracies),
        task(PROSE, prose_file, **rolling, metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]),
    ]
