"""A set of questions, its files, and files of answers.

`DATA` holds a set's official files, in the folder itself or one below it, also gzipped. Answers are read from and
written as LLaVA's JSON lines: {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}.
"""

import contextlib
import csv
import gzip
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eval.command import SkipCounter
from eval.scores import Measurement, Score
from eval.tables import read_records
from um3.core.errors import UserError
from um3.core.files import parse_json, short_hash
from um3.core.text import printable

ONE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
ODD = (LookupError, TypeError, ValueError, AttributeError, EOFError, OSError, csv.Error)
"""What reading a file of another form raises."""


class Question(NamedTuple):
    """One question.

    image: a file, encoded bytes, or None for a question about a text. text: the user's turn without `<image>`. groups:
    the names of the rows that its score also counts for.
    """

    question_id: int | str
    image: Path | bytes | None
    text: str
    category: str = "default"
    truth: Any = None
    groups: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Names the question in messages and in the cache of answers."""
        return f"{self.question_id}: {self.text}"


class Answer(NamedTuple):
    """A question and the answer to it."""

    question: Question
    text: str


def by_id(question_id: Any, text: str) -> Hashable:
    """The key of an answer where every question has its own id."""
    return str(question_id)


def first_line(question_id: Any, text: str) -> Hashable:
    """The key of an answer by its id and the first line of its prompt, so that ids of another version match nothing."""
    return str(question_id), text.partition("\n")[0]


@dataclass(frozen=True)
class VQASet:
    """A set: how its files are read (from DATA and a folder of images), scored, and written for others.

    rule: the prompt and the scoring, for the protocol. score: rows of a list of answers; None if only a server or a
    judge scores the set, and `unscored` says which. upload: the files of the official answer format, by name. key:
    finds the question of an answer by its id and prompt. asked_with: a file that only prompts need, not scores.
    """

    rule: str
    read: Callable[[Path, Path], list[Question]]
    upload: Callable[[Sequence[Answer], Path], Mapping[str, str | bytes]]
    score: Callable[[Sequence[Answer], Measurement], list[Score]] | None = None
    unscored: str = ""
    key: Callable[[Any, str], Hashable] = by_id
    max_new_tokens: int = 128
    asked_with: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)


def item_scores(score: Callable[[str, Any], float]) -> Callable[[Sequence[Answer], Measurement], list[Score]]:
    """Rows of a set whose score is a mean over questions: `accuracy`, and one row for each group."""

    def rows(answers: Sequence[Answer], of: Measurement) -> list[Score]:
        groups = defaultdict(list)
        for question, text in answers:
            for name in ("accuracy", *question.groups):
                groups[name].append(score(text, question.truth))
        return [of.mean(name, groups[name], unit="x100") for name in ("accuracy", *sorted({*groups} - {"accuracy"}))]

    return rows


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` in a folder or one below it; UserError for none, or for two of one name."""
    for name in names:
        found = [file for place in ("", "*/") for end in ("", ".gz") for file in folder.glob(f"{place}{name}{end}")]
        if len(found) > 1:
            raise UserError(f"{folder} has {found[0]} and {found[1]}; set data= to the folder of one of them")
        if found:
            return found[0]
    raise UserError(f"{folder} has no {' or '.join(names)}; set data= to the folder with the set's official files")


def read_data(path: Path, *, keys: Sequence[str] = ()) -> Any:
    """The value of a JSON file, also gzipped; UserError if it is none, or is an object without `keys`."""
    with reading(path):
        return parse_json(read_bytes(path), where=path, keys=keys)


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzipped."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    with reading(path):
        return [line for line in read_bytes(path).decode("utf-8-sig").split("\n") if line.strip()]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what another form raises into a UserError that names the file."""
    try:
        yield
    except ODD as error:
        reason = f"{type(error).__name__}: {error}"[:160]
        raise UserError(f"{path} is not in the set's official format ({reason}); copy the published file") from None


def image_file(images: Path, *names: str, folders: Sequence[str] = ("",)) -> Path:
    """The first of `names` that exists in `images` or a folder of it; the first place if none does.

    UserError for a name that leaves the folder.
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"the image '{name}' of a question lies outside of {images}; correct the question file")
    places = [images / folder / name for folder in folders for name in names]
    return next((place for place in places if place.is_file()), places[0])


def options(texts: Sequence[str]) -> str:
    """`A. text` and so on, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def question_lines(questions: Sequence[Question], *, images: Path) -> str:
    """LLaVA's question file."""
    rows = []
    for question in questions:
        image = question.image
        name = Path(os.path.relpath(image, images)).as_posix() if isinstance(image, Path) else ""
        row = {"question_id": question.question_id, "image": name, "text": question.text, "category": question.category}
        rows.append({key: value for key, value in row.items() if value or key != "image"})
    return json_text(rows)


def answer_lines(answers: Sequence[Answer], *, model_id: str) -> str:
    """LLaVA's answer file."""
    rows: list[dict[str, Any]] = [
        {
            "question_id": question.question_id,
            "prompt": question.text,
            "text": text,
            "answer_id": short_hash(model_id, question.name, text),
            "model_id": model_id,
            "metadata": {},
        }
        for question, text in answers
    ]
    return json_text(rows)


def json_text(rows: Sequence[Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_answers(path: Path, questions: Sequence[Question], *, of: VQASet, skipped: SkipCounter) -> list[Answer]:
    """Read the answers to `questions` from another program's file, in the order of the questions.

    The file has LLaVA's lines, or a list of objects with an id and an answer as the sets' result files have. Questions
    without an answer and answers to no question are skipped.

    Raises:
        UserError: no such file, another form, a second answer to a question, or no answer to any question.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; set answers= to a file of LLaVA's form")
    places: dict[Hashable, deque[int]] = defaultdict(deque)
    for index, question in enumerate(questions):
        places[of.key(question.question_id, question.text)].append(index)
    texts, first = dict[int, str](), ""
    with reading(path):
        rows = list(_mme_rows(path) if path.is_dir() else ((row.fields, row.place) for row in read_records(path)))
    for fields, place in rows:
        fields = fields or {}
        question_id = fields.get("question_id", fields.get("questionId"))
        text = next((fields[name] for name in ("text", "answer", "prediction") if name in fields), None)
        prompt = fields.get("prompt", "")
        if question_id is None or not isinstance(text, str) or not isinstance(prompt, str):
            skipped.add("line without question_id and text", place)
            continue
        first, key = first or str(question_id), of.key(question_id, prompt)
        if key not in places:
            skipped.add("answer to another question", f"{question_id} {prompt}"[:80].strip())
        elif not places[key]:
            raise UserError(f"{place}: a second answer to question {question_id}; a file has one for each")
        else:
            texts[places[key].popleft()] = text
    if not texts:
        ours = printable(f"question {questions[0].name[:80]}")
        raise UserError(f"{path} answers no question of the set, which begins with {ours}; its first id is '{first}'")
    for index, question in enumerate(questions):
        if index not in texts:
            skipped.add("question without answer", str(question.question_id))
    return [Answer(questions[index], texts[index]) for index in sorted(texts)]


def _mme_rows(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of MME's result files, CATEGORY.txt with image, question, truth and answer."""
    for file in sorted(folder.glob("*.txt")):
        for number, line in enumerate(read_lines(file), start=1):
            image, prompt, _, text = line.split("\t")
            yield {"question_id": f"{file.stem}/{image}", "prompt": prompt, "text": text}, f"{file}:{number}"
