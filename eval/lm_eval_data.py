"""The paper's five language tasks, as lm-eval defines them, on local copies of their data.

For each local copy a task YAML includes lm-eval's own YAML and changes where the data comes from, and nothing else.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from um3.core.errors import UserError
from um3.core.files import write_json

DataFiles = dict[str, str]
"""JSONL files by split."""
SPLIT_WORDS = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}


class LanguageTask(NamedTuple):
    """lm-eval's YAML, name and config of the data on the hub, the scored split, how names of local files start."""

    yaml: str
    hub_name: str
    hub_config: str | None
    split: str
    stems: tuple[str, ...]


TASKS = {
    name: LanguageTask(*fields)
    for name, *fields in (
        ("arc_challenge", "arc/arc_challenge.yaml", "allenai/ai2_arc", "ARC-Challenge", "test", ("arc_c", "arc-c")),
        ("hellaswag", "hellaswag/hellaswag.yaml", "Rowan/hellaswag", None, "validation", ("hellaswag",)),
        ("piqa", "piqa/piqa.yaml", "baber/piqa", None, "validation", ("piqa",)),
        ("social_iqa", "siqa/siqa.yaml", "lighteval/siqa", None, "validation", ("social_iqa", "social-iqa", "siqa")),
        ("winogrande", "winogrande/default.yaml", "allenai/winogrande", "winogrande_xl", "validation", ("winogrande",)),
    )
}


def find_benchmarks(folder: str | Path) -> dict[str, DataFiles | Path]:
    """The data of each of the paper's tasks in `folder`; nothing for an empty name.

    That is JSONL files whose names start with the task's, or a folder named as on the hub (`baber/piqa`).

    Raises:
        UserError: the folder does not exist, or several files could be the same split.
    """
    if not str(folder):
        return {}
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"LM_EVAL_DATA (language.benchmarks) is {root}, which is not a folder; correct or unset it")
    data: dict[str, DataFiles | Path] = {}
    for name, task in TASKS.items():
        files = _split_files(root, name=name)
        if task.split in files:
            data[name] = files
        elif (root / task.hub_name).is_dir():
            data[name] = root / task.hub_name
    return data


def _split_files(root: Path, *, name: str) -> DataFiles:
    """The JSONL files of a task by the split in their names; a file without one is the scored split."""
    task, files = TASKS[name], DataFiles()
    for path in sorted(root.glob("*.jsonl")):
        if path.name.lower().startswith(task.stems):
            words = [split for word, split in SPLIT_WORDS.items() if word in path.stem.lower()]
            split = words[0] if words else task.split
            if split in files:
                raise UserError(f"{files[split]} and {path} are both the {split} split of {name}; keep one of them")
            files[split] = str(path.resolve())
    return files


def write_task_yamls(folder: Path, *, data: Mapping[str, DataFiles | Path]) -> None:
    """Write NAME.yaml for each task in `data` to `folder`, which is then an `include_path` of lm-eval.

    Raises:
        UserError: a folder of data cannot be read.
    """
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
            splits, options = list(source), options | {"data_files": source}
            config |= {"dataset_path": "json", "dataset_name": None}
        # lm-eval reads every split that the YAML names.
        absent = {f"{split}_split": None for split in ("validation", "test") if split not in splits}
        absent |= {} if "train" in splits else {"training_split": None}
        write_json(folder / f"{name}.yaml", config | absent | {"task": name, "dataset_kwargs": options})  # JSON is YAML


def load_tasks(
    folder: Path, *, data: Mapping[str, DataFiles | Path], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """lm-eval's loaded task for each benchmark in `data`, ready for `lm_eval.evaluate`; `folder` holds the YAMLs.

    Every item (the first `limit`) is checked, so that errors appear before a model is loaded: 1.4 ms each.

    Raises:
        UserError: the data of a task cannot be read, are not the task's, or lack the answers.
    """
    import datasets
    import jinja2
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    write_task_yamls(folder, data=data)
    manager, loaded = TaskManager(include_path=str(folder), include_defaults=False), {}
    for name, source in data.items():
        try:
            loaded[name] = manager.load([name])
            for task in loaded[name]["tasks"].values():
                _check_answers(task, limit=limit)
        except (
            OSError,
            LookupError,
            TypeError,
            ValueError,
            datasets.exceptions.DatasetsError,
            jinja2.TemplateError,
        ) as e:
            raise _unreadable(name, source=source, error=e) from e
    return loaded


def _check_answers(task: Any, *, limit: int | None) -> None:
    """Raise ValueError unless every item has one of its choices as the answer."""
    for number, item in enumerate(itertools.islice(task.eval_docs, limit), start=1):
        choices = task.doc_to_choice(item)
        # WinoGrande's choices are contexts, and lm-eval keeps the answer's index where others keep the context.
        answer = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
        if answer not in (choices if isinstance(answer, str) else range(len(choices))):
            raise ValueError(f"item {number} has the answer {answer!r}, which is not one of its {len(choices)} choices")


def _unreadable(name: str, *, source: DataFiles | Path, error: Exception) -> UserError:
    cause = error.__cause__ or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
    path = source if isinstance(source, Path) else source[TASKS[name].split]
    return UserError(
        f"{path} is not the {TASKS[name].split} split of {name}, with its answers ({reason}); fetch it again"
    )
