"""Language with lm-eval, offline: a cloze and bits per byte of held-out prose, and the paper's five tasks when at hand.

The tasks are dictionaries over local files (`eval.language_tasks`), scored by `eval.lm.UM3LM` on the text half of the
softmax alone: visual ids never take probability from a word.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eval.language_tasks import (
    CHOICES,
    CLOZE,
    HUB_TASKS,
    PROSE,
    ClozeItem,
    cloze_items,
    cloze_task,
    find_benchmarks,
    hub_task,
    prose_task,
)
from eval.paper import LANGUAGE_METRICS, UM3
from eval.scores import Measurement, Score
from um3.core.errors import UserError
from um3.core.files import write_text
from um3.pipeline import UM3Pipeline

NUM_SAMPLES = 12
SCORING = "text half of the softmax, bos before every context"


def language_scores(
    pipeline: UM3Pipeline,
    *,
    documents: Sequence[str],
    folder: str | Path,
    seed: int,
    num_items: int = 200,
    num_documents: int = 50,
    benchmarks: str | Path = "",
    limit: int = 0,
    max_tokens: int = 0,
    batch_size: int = 16,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Scores of every language task, and a few cloze items with the model's answers.

    `documents` are held-out texts; the tasks made from them are written to `folder` as JSONL. `benchmarks` is a folder
    with local copies of the paper's tasks; `limit` above 0 scores only the first so many items of each of those.
    `max_tokens` is the longest context, 0 for the model's own.

    Raises:
        UserError: too little text, or a benchmark file that cannot be read.
    """
    found = find_benchmarks(benchmarks)
    items = cloze_items(documents, num_items=num_items, seed=seed)
    texts = [text for text in documents if text.strip()][:num_documents]
    cloze_file, prose_file = Path(folder) / f"{CLOZE}.jsonl", Path(folder) / f"{PROSE}.jsonl"
    write_text(cloze_file, "".join(json.dumps(item._asdict()) + "\n" for item in items))
    write_text(prose_file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    with TemporaryDirectory() as temporary:
        cache = Path(temporary)
        own = [cloze_task(cloze_file, cache=cache), prose_task(prose_file, cache=cache)]
        results = run_tasks(pipeline, tasks=own, batch_size=batch_size, max_tokens=max_tokens)
        of = Measurement("language", seed, {"scored": SCORING, "shots": 0, "max_tokens": max_tokens})
        rows = _cloze_rows(results, items=items, of=of) + _prose_rows(results, texts=texts, of=of)
        for name in HUB_TASKS:
            path = found.get(name)
            if path is None:
                rows.append(_absent_row(name, of=of))
                continue
            task = hub_task(name, path=path, cache=cache)
            results_of_task = run_tasks(
                pipeline, tasks=[task], batch_size=batch_size, max_tokens=max_tokens, limit=limit
            )
            rows += _hub_rows(results_of_task, name=name, path=path, of=of.with_protocol(limit=limit))
    return rows, _samples(results, items=items)


def run_tasks(
    pipeline: UM3Pipeline, *, tasks: Sequence[dict[str, Any]], batch_size: int, max_tokens: int = 0, limit: int = 0
) -> dict[str, Any]:
    """lm-eval's results for task dictionaries.

    Raises:
        UserError: the data of a task cannot be read as that task.
    """
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval.lm import UM3LM

    # Only what is wrong, not what is going on: UM3LM shows the progress.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    names = ", ".join(str(task["task"]) for task in tasks)
    try:
        results = simple_evaluate(
            model=UM3LM.of(pipeline, batch_size=batch_size, max_tokens=max_tokens),
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=False),
            limit=limit or None,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, KeyError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the data of task {names} cannot be read ({type(error).__name__}: {reason})") from error
    assert results is not None, "lm-eval gives results on the first rank, and there is only one"
    return dict(results)


def _cloze_rows(results: dict[str, Any], *, items: Sequence[ClozeItem], of: Measurement) -> list[Score]:
    of = of.named(CLOZE).with_protocol(items_sha256=_sha256(items))
    note = f"which sentence comes next in held-out prose; chance is 1 in {CHOICES}"
    values = results["results"][CLOZE]
    return [of.score(name, values[f"{name},none"], n=len(items), unit="%", note=note) for name in ("acc", "acc_norm")]


def _prose_rows(results: dict[str, Any], *, texts: Sequence[str], of: Measurement) -> list[Score]:
    of = of.named(PROSE).with_protocol(documents_sha256=_sha256(texts))
    common: dict[str, Any] = {"n": len(texts), "higher_is_better": False, "note": "over held-out documents"}
    values = results["results"][PROSE]
    return [of.score(name, values[f"{name},none"], **common) for name in ("bits_per_byte", "word_perplexity")]


def _hub_rows(results: dict[str, Any], *, name: str, path: Path, of: Measurement) -> list[Score]:
    values, counts = results["results"][name], results["n-samples"][name]
    of = of.named(name).with_protocol(data=path.name)
    return [
        of.score(
            metric,
            values[f"{metric},none"],
            n=int(counts["effective"]),
            skipped=int(counts["original"]) - int(counts["effective"]),
            version=str(results["versions"].get(name, "")),
            unit="%",
            paper=UM3[name] if metric == LANGUAGE_METRICS[name] else None,
        )
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in values
    ]


def _absent_row(name: str, *, of: Measurement) -> Score:
    note = f"no local copy; put {HUB_TASKS[name].hub_name} or {name}.jsonl into a folder and set LM_EVAL_DATA to it"
    return of.named(name).missing(LANGUAGE_METRICS[name], note=note, paper=UM3[name], unit="%")


def _samples(results: dict[str, Any], *, items: Sequence[ClozeItem]) -> list[dict[str, Any]]:
    """The first cloze items with what the model chose."""
    shown = []
    for sample in sorted(results["samples"][CLOZE], key=lambda sample: sample["doc_id"])[:NUM_SAMPLES]:
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        item = items[sample["doc_id"]]
        shown.append({**item._asdict(), "chosen": chosen, "right": chosen == item.label})
    return shown


def _sha256(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(value)).encode()).hexdigest()[:12]
