"""The paper's five language tasks, as lm-eval defines them, on local copies of their data.

For each local copy a task YAML includes lm-eval's own YAML and changes where the data comes from, and nothing else.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.tables import json_lines
from um3.core.errors import UserError
from um3.core.files import walk_files, write_json, write_text

DataFiles = dict[str, str]
"""JSONL files by split."""
SPLIT_WORDS = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}


class LanguageTask(NamedTuple):
    """lm-eval's YAML, the hub's name and config of the data, and the scored split.

    labels, label: the labels of an item's choices as in the hub's copy, and the field of its answer.
    stems: how the names of local files start, besides the task's own name.
    """

    yaml: str
    hub_name: str
    labels: Callable[[dict[str, Any]], Sequence[int | str]]
    hub_config: str | None = None
    split: str = "validation"
    label: str = "label"
    stems: tuple[str, ...] = ()


TASKS = {
    "arc_challenge": LanguageTask(
        "arc/arc_challenge.yaml",
        "allenai/ai2_arc",
        lambda item: item["choices"]["label"],
        "ARC-Challenge",
        split="test",
        label="answerKey",
        stems=("arc_c", "arc-c"),
    ),
    "hellaswag": LanguageTask(
        "hellaswag/hellaswag.yaml", "Rowan/hellaswag", lambda item: [*map(str, range(len(item["endings"])))]
    ),
    "piqa": LanguageTask("piqa/piqa.yaml", "baber/piqa", lambda _: (0, 1)),
    "social_iqa": LanguageTask(
        "siqa/siqa.yaml", "lighteval/siqa", lambda _: ("1", "2", "3"), stems=("social-iqa", "siqa")
    ),
    "winogrande": LanguageTask(
        "winogrande/default.yaml", "allenai/winogrande", lambda _: ("1", "2"), "winogrande_xl", label="answer"
    ),
}


def find_benchmarks(folder: str | Path) -> dict[str, DataFiles | Path]:
    """The data of each of the paper's tasks in `folder`; nothing for an empty name.

    That is JSONL files whose names start with the task's, or a folder named as on the hub (`baber/piqa`). UserError if
    the folder does not exist, or several files could be the same split.
    """
    if not str(folder):
        return {}
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"LM_EVAL_DATA (language.benchmarks) is {root}, which is not a folder; correct or unset it")
    data: dict[str, DataFiles | Path] = {}
    for name, task in TASKS.items():
        if task.split in (files := _split_files(root, name=name)):
            data[name] = files
        elif (root / task.hub_name).is_dir():
            data[name] = root / task.hub_name
    return data


def _split_files(root: Path, *, name: str) -> DataFiles:
    """The JSONL files of a task by the split in their names; a file without one is the scored split."""
    task, files = TASKS[name], DataFiles()
    for path in walk_files(root, suffixes=(".jsonl",)):
        if path.parent == root and path.name.lower().startswith((name, *task.stems)):
            words = [split for word, split in SPLIT_WORDS.items() if word in path.stem.lower()]
            split = words[0] if words else task.split
            if split in files:
                raise UserError(f"{files[split]} and {path} are both the {split} split of {name}; keep one of them")
            files[split] = str(path.resolve())
    return files


def write_task_yamls(folder: Path, *, data: Mapping[str, DataFiles | Path]) -> None:
    """Write NAME.yaml for each task to `folder`, an `include_path` of lm-eval; UserError for unreadable data."""
    import datasets
    from lm_eval.tasks import manager

    for name, source in data.items():
        config: dict[str, Any] = {"include": str(Path(manager.__file__).parent / TASKS[name].yaml)}
        options: dict[str, Any] = {"cache_dir": str(folder / "cache")}
        if isinstance(source, Path):
            try:
                splits = datasets.get_dataset_split_names(str(source), TASKS[name].hub_config)
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise _unreadable(name, source=source, error=error) from error
            config |= {"dataset_path": str(source.resolve())}
        else:
            splits = list(source)
            options["data_files"] = {split: str(folder / f"{name}-{split}.jsonl") for split in splits}
            for split, copy in options["data_files"].items():
                is_scored = split == TASKS[name].split
                _copy_with_labels(Path(source[split]), Path(copy), task=TASKS[name], is_scored=is_scored)
            config |= {"dataset_path": "json", "dataset_name": None}
        # lm-eval reads every split that the YAML names.
        absent = {f"{split}_split": None for split in ("validation", "test") if split not in splits}
        absent |= {} if "train" in splits else {"training_split": None}
        write_json(folder / f"{name}.yaml", config | absent | {"task": name, "dataset_kwargs": options})  # JSON is YAML


def _copy_with_labels(source: Path, target: Path, *, task: LanguageTask, is_scored: bool) -> None:
    """Copy a JSONL file with every label as lm-eval expects it: "1", 1 and 1.0 are one label.

    UserError if a line is no item of the task, or has a label that is not one of its choices.
    """
    lines = []
    for fields, place, _ in json_lines(source):
        if fields is None:
            raise UserError(f"{place} is not a JSON object; correct the line, or fetch the file again")
        label = fields.get(task.label)
        label = int(label) if isinstance(label, float) and label.is_integer() else label
        try:
            labels = {str(label): label for label in task.labels(fields)}
        except (LookupError, TypeError) as error:
            raise UserError(f"{place} is not an item of the task ({error!r}); fetch the file again") from None
        if is_scored and str(label).strip() not in labels:
            expected = [*labels.values()]
            raise UserError(f"{place}: the field '{task.label}' is {label!r}, not one of {expected}; correct it")
        lines.append(json.dumps(fields | {task.label: labels.get(str(label).strip(), label)}) + "\n")
    if is_scored and not lines:
        raise UserError(f"{source} has no items; fetch it again")
    write_text(target, "".join(lines))


def open_benchmarks(
    benchmarks: str | Path, *, folder: str | Path, limit: int | None = None
) -> dict[str, dict[str, Any] | UserError]:
    """lm-eval's loaded task for the data of each task in `benchmarks`; `folder` is for temporary files.

    Every item (the first `limit`) is checked, so that errors appear before a model is loaded: 1.4 ms each. A task whose
    data cannot be read, are not the task's, or lack the answers has its UserError instead. UserError without any data.
    """
    import datasets
    import jinja2
    from lm_eval.tasks import TaskManager

    data = find_benchmarks(benchmarks)
    if str(benchmarks) and not data:
        raise UserError(
            f"{benchmarks} has no data of the language tasks ({', '.join(TASKS)}); add files such as "
            "piqa_valid.jsonl or folders such as baber/piqa (docs/evaluation.md)"
        )
    datasets.disable_progress_bars()
    unreadable = (OSError, LookupError, TypeError, ValueError, datasets.exceptions.DatasetsError, jinja2.TemplateError)
    loaded: dict[str, dict[str, Any] | UserError] = {}
    for name, source in data.items():
        try:
            write_task_yamls(Path(folder) / name, data={name: source})
            tasks = TaskManager(include_path=str(Path(folder) / name), include_defaults=False).load([name])
            for task in tasks["tasks"].values():
                _check_answers(task, label=TASKS[name].label, limit=limit)
            loaded[name] = tasks
        except UserError as error:
            loaded[name] = error
        except unreadable as error:
            loaded[name] = _unreadable(name, source=source, error=error)
    return loaded


def _check_answers(task: Any, *, label: str, limit: int | None) -> None:
    """Raise ValueError unless every item has one of its choices as the answer."""
    for number, item in enumerate(itertools.islice(task.eval_docs, limit), start=1):
        choices = task.doc_to_choice(item)
        # WinoGrande's choices are contexts, and lm-eval keeps the answer's index where others keep the context.
        answer = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
        if answer not in (choices if isinstance(answer, str) else range(len(choices))):
            raise ValueError(f"item {number} has the {label} {item[label]!r}, none of its {len(choices)} choices")


def _unreadable(name: str, *, source: DataFiles | Path, error: Exception) -> UserError:
    cause = error.__cause__ or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
    path = source if isinstance(source, Path) else source[TASKS[name].split]
    split = TASKS[name].split
    return UserError(f"{path} is not the {split} split of {name}, with its answers ({reason}); fetch it again")
