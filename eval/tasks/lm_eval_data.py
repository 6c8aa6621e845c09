"""Local copies of lm-eval's benchmarks: found, checked, and read in the place of the hub by the unmodified tasks."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from um3.core.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.tasks import TaskManager

SPLITS = ("train", "validation", "test")


class HubTask(NamedTuple):
    """One of the paper's tasks: lm-eval's folder of its YAML, the hub's name for its data, the split that is scored.

    A local file's name begins with one of `stems`. Every item has the `columns` and an answer, which lies in the column
    `answer` and is one of `answers` (of the labels of its own choices where these are empty).
    """

    yaml_folder: str
    hub_name: str
    hub_config: str | None
    stems: tuple[str, ...]
    split: str
    columns: tuple[str, ...]
    answer: str
    answers: tuple[str, ...] = ()


TASKS: dict[str, HubTask] = {
    "arc_challenge": HubTask(
        "arc",
        "allenai/ai2_arc",
        "ARC-Challenge",
        ("arc_challenge", "arc-challenge"),
        "test",
        ("question", "choices"),
        "answerKey",
    ),
    "hellaswag": HubTask(
        "hellaswag",
        "Rowan/hellaswag",
        None,
        ("hellaswag",),
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings"),
        "label",
        ("0", "1", "2", "3"),
    ),
    "piqa": HubTask("piqa", "baber/piqa", None, ("piqa",), "validation", ("goal", "sol1", "sol2"), "label", ("0", "1")),
    "social_iqa": HubTask(
        "siqa",
        "lighteval/siqa",
        None,
        ("social_iqa", "social-iqa", "siqa"),
        "validation",
        ("context", "question", "answerA", "answerB", "answerC"),
        "label",
        ("1", "2", "3"),
    ),
    "winogrande": HubTask(
        "winogrande",
        "allenai/winogrande",
        "winogrande_xl",
        ("winogrande",),
        "validation",
        ("sentence", "option1", "option2"),
        "answer",
        ("1", "2"),
    ),
}


def find_benchmarks(folder: str | Path) -> dict[str, Path]:
    """Where the scored split of each of the paper's tasks lies in `folder`; nothing for an empty name.

    That is a JSONL file whose name begins like the task's, or a folder named as on the hub (`baber/piqa`).

    Raises:
        UserError: the folder does not exist, or several files could be the same split.
    """
    if not str(folder):
        return {}
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"the folder of language benchmarks, {root}, does not exist; correct or empty LM_EVAL_DATA")
    found = {}
    for name, task in TASKS.items():
        files = _split_files(root, name=name)
        if task.split in files:
            found[name] = files[task.split]
        elif (root / task.hub_name).is_dir():
            found[name] = root / task.hub_name
    return found


@contextlib.contextmanager
def local_benchmarks(folder: str | Path) -> Iterator[dict[str, Path]]:
    """Within, lm-eval's tasks read their data from `folder` where it has them; yields what `find_benchmarks` finds.

    The tasks stay as they are: what is replaced is where `datasets.load_dataset` looks. A folder named as on the hub
    serves any task of lm-eval, not the paper's five alone.
    """
    import datasets

    found, original = find_benchmarks(folder), datasets.load_dataset
    by_hub_name = {(TASKS[name].hub_name, TASKS[name].hub_config): name for name in found}

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        task = by_hub_name.get((path, name))
        if task and found[task].is_file():
            return read_files(Path(folder), name=task)
        if not str(folder) or not (Path(folder) / path).is_dir():
            return original(path, name, **options)
        place = Path(folder) / path
        try:
            data = original(str(place), name, **options)
            if task:
                _check(data[TASKS[task].split], name=task, where=str(place))
                data = _with_every_split(data, scored=TASKS[task].split)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{place} cannot be read as the hub's {path} ({reason}); fetch it again") from error
        return data

    datasets.load_dataset = load_dataset
    try:
        yield found
    finally:
        datasets.load_dataset = original


def read_files(root: Path, *, name: str) -> "DatasetDict":
    """The JSONL files of a task; a split without a file is empty.

    Raises:
        UserError: a file that cannot be read, has no items, or whose items are not those of the task.
    """
    from datasets import Dataset

    files = _split_files(root, name=name)
    items = {split: _read_lines(file) for split, file in files.items()}
    for split, file in files.items():
        _check(items[split] if split == TASKS[name].split else items[split][:1], name=name, where=str(file))
    try:
        data = {split: Dataset.from_list(found) for split, found in items.items()}
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the items of {name} in {root} are not alike ({reason}); fetch its files again") from None
    return _with_every_split(data, scored=TASKS[name].split)


def _with_every_split(data: Mapping[str, Any], *, scored: str) -> "DatasetDict":
    """lm-eval opens the splits for few-shot prompts too, also where it shows none: those that are missing are empty."""
    from datasets import DatasetDict

    return DatasetDict({split: data[split] if split in data else data[scored].select([]) for split in SPLITS})


def paper_tasks(include_path: Any = None, metadata: Any = None) -> "TaskManager":
    """lm-eval's index of the paper's tasks alone (and of `include_path`): that of all its tasks takes 11 s to build."""
    from lm_eval.tasks import manager

    root = Path(manager.__file__).parent
    folders: list[str | Path] = [root / task.yaml_folder for task in TASKS.values()]
    given = include_path if isinstance(include_path, list | tuple) else [include_path] if include_path else []
    return manager.TaskManager(include_path=[*folders, *given], include_defaults=False, metadata=metadata)


def _split_files(root: Path, *, name: str) -> dict[str, Path]:
    """The JSONL files of a task by split, told by their names; one that names no split is the scored one."""
    task, found = TASKS[name], dict[str, Path]()
    for path in sorted(root.glob("*.jsonl")):
        if not path.name.lower().startswith(task.stems):
            continue
        stem = path.stem.lower()
        named = ("train", "train"), ("val", "validation"), ("dev", "validation"), ("test", "test")
        split = next((split for word, split in named if word in stem), task.split)
        if split in found:
            raise UserError(
                f"{root} holds several files for {name}'s {split} split ({found[split].name}, {path.name}); keep one"
            )
        found[split] = path
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    items = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, is not JSON ({error}); fetch the file again") from None
    return items


def _check(items: Iterable[Mapping[str, Any]], *, name: str, where: str) -> None:
    """UserError unless there are items, each of which is one of the task and has an answer."""
    task, number = TASKS[name], 0
    for number, item in enumerate(items, 1):
        missing = [key for key in (*task.columns, task.answer) if not isinstance(item, Mapping) or key not in item]
        if missing:
            raise UserError(f"{where}, item {number}, has no '{missing[0]}': it is not the data of {name}")
        answers = task.answers or _labels(item["choices"])
        if str(item[task.answer]) not in answers:
            raise UserError(
                f"{where}, item {number}: '{task.answer}' is '{item[task.answer]}', not one of {', '.join(answers)}; "
                f"give the {task.split} split of {name}, with its answers"
            )
    if not number:
        raise UserError(f"{where} holds no items of {name}; fetch it again")


def _labels(choices: Any) -> Sequence[str]:
    """The labels of an item's own choices, {"text": [...], "label": [...]}; none if these are something else."""
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    return [str(label) for label in labels] if isinstance(labels, list) else []
