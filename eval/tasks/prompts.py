"""Lists of prompts from the files in which benchmarks publish them (`eval.tables` reads the files)."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eval.tables import Record, captions_of, image_id_of, read_records
from um3.core.errors import UserError
from um3.core.seeds import numpy_generator

TEXT_FIELDS = ("prompt", "caption", "text")
ID_FIELDS = ("item_id", "id")
VAL2014 = "val2014"


class Prompt(NamedTuple):
    """A prompt with its id; `line` is the JSON line that it was read from, empty for other files."""

    id: str
    text: str
    line: str = ""


def read_prompts(path: str | Path, *, limit: int = 0, seed: int = 0) -> list[Prompt]:
    """Read the first `limit` prompts of a file in its order (0: all).

    .jsonl       objects with prompt, caption or text, and optionally an id: GenEval's metadata
    .csv .tsv    tables with such a column: LlamaGen's COCO list, PartiPrompts, DPG-Bench (equal rows count once)
    .txt         one prompt a line; a folder of .txt files has one prompt a file, named after the file (DPG-Bench)
    .json        COCO's or Karpathy's captions of val2014: `seed` chooses the order and one caption per image

    UserError for a missing file, an unreadable line, an empty prompt, or an id that two prompts share.
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; set prompts= to a file of prompts")
    try:
        records = read_records(path)
        found = _coco_prompts(records, seed=seed) if Path(path).suffix == ".json" else _prompts(records)
        prompts = [
            prompt._replace(id=prompt.id or f"{index:05d}", text=" ".join(prompt.text.split()))
            for index, prompt in enumerate(list(found)[: limit or None])
        ]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read as prompts ({type(error).__name__}: {error})") from None
    if not prompts:
        raise UserError(f"{path} contains no prompts; write one per line")
    ids: set[str] = set()
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.text:
            raise UserError(f"{path}: prompt {number} ({prompt.id}) is empty; write its text or delete it")
        if prompt.id in ids or not re.fullmatch(r"[\w-][\w.-]*", prompt.id):
            raise UserError(f"{path}: the id '{prompt.id}' of prompt {number} must be unique and a valid file name")
        ids.add(prompt.id)
    return prompts


def _prompts(records: Iterator[Record]) -> Iterator[Prompt]:
    previous = Prompt("", "")
    for fields, place, line in records:
        text = next((fields[name] for name in TEXT_FIELDS if fields.get(name) is not None), None) if fields else None
        if not fields or not isinstance(text, str):
            raise UserError(f"{place}: expected an object with a text named {', '.join(TEXT_FIELDS)}; correct it")
        prompt_id = next((str(fields[name]) for name in ID_FIELDS if fields.get(name) is not None), "")
        prompt = Prompt(prompt_id, text, line)
        if not prompt_id or prompt != previous:  # DPG-Bench's table repeats the prompt for each question
            yield prompt
        previous = prompt


def _coco_prompts(records: Iterator[Record], *, seed: int) -> Iterator[Prompt]:
    """One caption per image of val2014, which Karpathy's file divides into val, test and restval."""
    captions: dict[str, list[str]] = {}
    for fields, _, _ in records:
        if fields and fields.get("filepath", VAL2014) == VAL2014 and (texts := captions_of(fields)):
            captions.setdefault(image_id_of(fields) or fields["filename"], []).extend(texts)
    ids = sorted(captions)
    generator = numpy_generator(seed, "coco-prompts")
    for place in generator.permutation(len(ids)):
        texts = captions[ids[place]]
        yield Prompt(ids[place], texts[int(generator.integers(len(texts)))])
