"""Lists of prompts from the files in which benchmarks publish them."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.seeds import numpy_generator

TEXT_FIELDS = ("prompt", "caption", "text")
ID_FIELDS = ("item_id", "id")


class Prompt(NamedTuple):
    """What to draw, under which name; `line` is the JSON line it came from, where it came from one."""

    id: str
    text: str
    line: str = ""


def read_prompts(path: str | Path, *, limit: int = 0, seed: int = 0) -> list[Prompt]:
    """The prompts of a file, in its order; the first `limit` of them, 0 for all.

    .jsonl  objects with prompt (or caption, text), and perhaps id: GenEval's metadata
    .csv .tsv  a table with such a column: LlamaGen's COCO list, PartiPrompts, DPG-Bench's (rows of one item_id are one)
    .txt    one a line; a folder of .txt files has one in each, named as the file (DPG-Bench)
    .json   COCO's or Karpathy's captions of val2014: images in an order fixed by `seed`, one caption chosen for each

    Raises:
        UserError: no such file, an unreadable line, an empty prompt, or a name that two prompts have.
    """
    path = Path(path)
    try:
        found = list(_read(path, seed=seed))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a file of prompts") from None
    except (ValueError, KeyError, TypeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read as prompts ({type(error).__name__}: {error})") from None
    prompts = [
        prompt._replace(id=prompt.id or f"{index:05d}", text=" ".join(prompt.text.split()))
        for index, prompt in enumerate(found[:limit] if limit else found)
    ]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    names: set[str] = set()
    for index, prompt in enumerate(prompts):
        if not prompt.text:
            raise UserError(f"{path}: prompt {index + 1} ({prompt.id}) is empty; say what to draw, or take it out")
        if prompt.id in names or not re.fullmatch(r"[\w-][\w.-]*", prompt.id):
            raise UserError(f"{path}: '{prompt.id}' cannot name prompt {index + 1}; give each a file name of its own")
        names.add(prompt.id)
    return prompts


def _read(path: Path, *, seed: int) -> Iterator[Prompt]:
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            yield Prompt(file.stem, file.read_text(encoding="utf-8-sig"))
    elif path.suffix == ".jsonl":
        yield from _from_lines(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from _from_table(path)
    elif path.suffix == ".json":
        yield from _from_coco(json.loads(path.read_bytes()), seed=seed)
    else:
        yield from (Prompt("", line) for _, line in _lines(path))


def _from_lines(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        try:
            yield _from_record(json.loads(line), line=line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number} is no JSON object with a prompt ({type(error).__name__}: {error}); correct the line"
            ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with something in them. Not `splitlines`, which also cuts at U+2028, a form feed and the like."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield number, line


def _from_table(path: Path) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        before = ""
        for row in rows:
            prompt = _from_record({str(name).lower(): value for name, value in row.items()})
            if not prompt.id or prompt.id != before:  # DPG-Bench repeats the prompt in front of each question
                yield prompt
            before = prompt.id


def _from_record(record: dict[str, Any], *, line: str = "") -> Prompt:
    text = next((record[field] for field in TEXT_FIELDS if field in record), None)
    if not isinstance(text, str):
        raise KeyError(f"none of {', '.join(TEXT_FIELDS)}")
    return Prompt(next((str(record[field]) for field in ID_FIELDS if record.get(field) is not None), ""), text, line)


def _from_coco(content: Any, *, seed: int) -> Iterator[Prompt]:
    """One caption an image: of all of val2014, which Karpathy's file cuts into val, test and restval."""
    captions: dict[str, list[str]] = {}
    if "annotations" in content:
        for note in content["annotations"]:
            captions.setdefault(str(note["image_id"]), []).append(note["caption"])
    else:
        for image in content["images"]:
            if image.get("filepath", "val2014") == "val2014":
                captions[str(image.get("cocoid", image["filename"]))] = [each["raw"] for each in image["sentences"]]
    names = sorted(name for name, given in captions.items() if given)
    generator = numpy_generator(seed, "coco-prompts")
    for place in generator.permutation(len(names)):
        given = captions[names[place]]
        yield Prompt(names[place], given[int(generator.integers(len(given)))])
