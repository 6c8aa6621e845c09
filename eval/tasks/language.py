"""Language with lm-eval, offline: the paper's five tasks from local copies, and a cloze and bits per byte of prose.

The five are lm-eval's own, unmodified (`eval.tasks.lm_eval_data`), scored by `eval.lm.UM3LM` on text ids alone: visual ids
never take probability from a word. Every item's log-likelihoods are kept beside the scores.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.paper_values import LANGUAGE_METRICS, UM3
from eval.scores import Interval, Measurement, Score, bootstrap
from eval.tasks.lm_eval_data import TASKS, local_benchmarks, paper_tasks
from eval.tasks.prose_tasks import CHOICES, CLOZE, PROSE, ClozeItem, cloze_items, cloze_task, prose_task
from um3.core.errors import UserError
from um3.core.files import write_text

if TYPE_CHECKING:
    from eval.lm import UM3LM

NUM_SAMPLES = 12
ITEMS_FILE = "language_items.jsonl"
SCORING = "log-likelihood over text ids, after the model's own start of a text"


class LanguageResult(NamedTuple):
    """Rows; a few cloze items with the model's answers; of each benchmark the first item as the model reads it."""

    scores: list[Score]
    cloze: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]


def language_scores(
    lm: "UM3LM",
    *,
    documents: Sequence[str],
    folder: str | Path,
    seed: int,
    num_items: int = 200,
    num_documents: int = 50,
    benchmarks: str | Path = "",
    limit: int | None = None,
) -> LanguageResult:
    """Scores of every language task, the log-likelihoods of every item in `folder`/language_items.jsonl.

    `documents` are held-out texts, from which the cloze and the bits per byte are made; without any these have no
    value. `benchmarks` is a folder with local copies of the paper's tasks; `limit` scores the first so many items of
    each of those.

    Raises:
        UserError: nothing to measure, too little text, or a benchmark file that cannot be read.
    """
    with local_benchmarks(benchmarks) as found:
        _check_there_is_work(benchmarks, found=found, documents=documents)
        of = Measurement("language", seed, {"scored": SCORING, "shots": 0, "max_tokens": lm.own_max_tokens})
        result, items = LanguageResult([], [], {}), list[dict[str, Any]]()
        if documents:
            cloze = cloze_items(documents, num_items=num_items, seed=seed)
            texts = [text for text in documents if text.strip()][:num_documents]
            results = _run_own(lm, cloze=cloze, texts=texts, folder=Path(folder))
            result.scores.extend([*_choice_rows(results, name=CLOZE, of=of), *_prose_rows(results, of=of)])
            result.cloze.extend(_samples(results, items=cloze))
            items += [*_items(results, name=CLOZE), *_items(results, name=PROSE)]
        else:
            result.scores.extend(_absent_prose(of=of))
        for name in TASKS:
            if name not in found:
                result.scores.append(_absent_row(name, of=of))
                continue
            results = run_tasks(lm, tasks=[name], limit=limit)
            result.scores.extend(_choice_rows(results, name=name, of=of))
            context, continuation = _sorted_samples(results, name=name)[0]["arguments"][0]
            result.prompts[name] = {"context": context, "continuation": continuation}
            items += _items(results, name=name)
    write_text(Path(folder) / ITEMS_FILE, "".join(json.dumps(item) + "\n" for item in items))
    return result


def check_data(benchmarks: str | Path, *, documents: Sequence[str]) -> None:
    """Read what `language_scores` will read, before a model is loaded and hours are spent.

    Raises:
        UserError: nothing to measure, or a benchmark that cannot be read.
    """
    import datasets

    with local_benchmarks(benchmarks) as found:
        _check_there_is_work(benchmarks, found=found, documents=documents)
        datasets.disable_progress_bars()
        for name in found:
            datasets.load_dataset(TASKS[name].hub_name, TASKS[name].hub_config)


def _check_there_is_work(benchmarks: str | Path, *, found: Mapping[str, Path], documents: Sequence[str]) -> None:
    if str(benchmarks) and not found:
        raise UserError(
            f"{benchmarks} holds none of the language benchmarks ({', '.join(TASKS)}); put files such as "
            "piqa_valid.jsonl or folders such as baber/piqa there (docs/evaluation.md)"
        )
    if not found and not documents:
        raise UserError(
            "no benchmark folder and no held-out text, so nothing to measure; set LM_EVAL_DATA to a folder with "
            "local copies of the tasks (docs/evaluation.md), or TEXT to texts of your own"
        )


def run_tasks(lm: "UM3LM", *, tasks: Sequence[str | dict[str, Any]], limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results for tasks by name or dictionary.

    Raises:
        UserError: the data of a task cannot be read as that task.
    """
    import datasets
    from lm_eval import evaluate

    datasets.disable_progress_bars()
    names = ", ".join(str(task["task"]) if isinstance(task, dict) else task for task in tasks)
    try:
        loaded = paper_tasks().load(list(tasks))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        # Not simple_evaluate: it asks pip, git and lscpu what this machine is, seconds for every task.
        results = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except (OSError, KeyError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the data of task {names} cannot be read ({type(error).__name__}: {reason})") from error
    assert results is not None, "lm-eval gives results on the first rank, and there is only one"
    return dict(results)


def _run_own(lm: "UM3LM", *, cloze: Sequence[ClozeItem], texts: Sequence[str], folder: Path) -> dict[str, Any]:
    """The results of the two tasks made from held-out texts, which are written to `folder` as JSONL."""
    cloze_file, prose_file = folder / f"{CLOZE}.jsonl", folder / f"{PROSE}.jsonl"
    write_text(cloze_file, "".join(json.dumps(item._asdict()) + "\n" for item in cloze))
    write_text(prose_file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    with TemporaryDirectory() as cache:
        own = [cloze_task(cloze_file, cache=Path(cache)), prose_task(prose_file, cache=Path(cache))]
        return run_tasks(lm, tasks=own)


def _choice_rows(results: dict[str, Any], *, name: str, of: Measurement) -> list[Score]:
    """Accuracies of a multiple choice: lm-eval's values, each with the interval over its items."""
    values, samples = results["results"][name], _sorted_samples(results, name=name)
    counts = results["n-samples"][name]
    sha256 = _sha256([[sample["arguments"], sample["target"]] for sample in samples])
    of = of.named(name).with_protocol(items=len(samples), items_sha256=sha256)
    own = {"note": f"which sentence comes next in held-out prose; chance is 1 in {CHOICES}"} if name == CLOZE else {}
    return [
        of.score(
            metric,
            values[f"{metric},none"],
            n=len(samples),
            skipped=int(counts["original"]) - len(samples),
            version=str(results["versions"].get(name, "")),
            unit="%",
            paper=UM3[name] if metric == LANGUAGE_METRICS.get(name) else None,
            **bootstrap([float(sample[metric]) for sample in samples])._asdict(),
            **own,
        )
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in values
    ]


def _prose_rows(results: dict[str, Any], *, of: Measurement) -> list[Score]:
    values, samples = results["results"][PROSE], _sorted_samples(results, name=PROSE)
    sha256 = _sha256([sample["target"] for sample in samples])
    of = of.named(PROSE).with_protocol(documents=len(samples), documents_sha256=sha256)
    losses = [-float(sample["bits_per_byte"][0]) for sample in samples]
    per_byte = bootstrap([loss / math.log(2) for loss in losses], weights=[s["bits_per_byte"][1] for s in samples])
    per_word = bootstrap(losses, weights=[sample["word_perplexity"][1] for sample in samples])
    perplexity = Interval(*(None if end is None else math.exp(end) for end in per_word))
    return [
        of.score(
            metric,
            values[f"{metric},none"],
            n=len(samples),
            version=str(results["versions"].get(PROSE, "")),
            higher_is_better=False,
            note="over held-out documents",
            **interval._asdict(),
        )
        for metric, interval in (("bits_per_byte", per_byte), ("word_perplexity", perplexity))
    ]


def _absent_prose(*, of: Measurement) -> list[Score]:
    note = "no held-out text was given; set TEXT to texts of your own"
    rows = ((CLOZE, "acc", "%"), (CLOZE, "acc_norm", "%"), (PROSE, "bits_per_byte", ""), (PROSE, "word_perplexity", ""))
    return [of.named(task).missing(metric, note=note, unit=unit) for task, metric, unit in rows]


def _absent_row(name: str, *, of: Measurement) -> Score:
    note = f"no local copy; put {TASKS[name].hub_name} or {name}.jsonl into a folder and set LM_EVAL_DATA to it"
    return of.named(name).missing(LANGUAGE_METRICS[name], note=note, paper=UM3[name], unit="%")


def _sorted_samples(results: dict[str, Any], *, name: str) -> list[dict[str, Any]]:
    return sorted(results["samples"][name], key=lambda sample: int(sample["doc_id"]))


def _items(results: dict[str, Any], *, name: str) -> list[dict[str, Any]]:
    """What every item got: a choice's log-likelihoods and hits, or a document's log-likelihood, bytes and words."""
    rows = []
    for sample in _sorted_samples(results, name=name):
        row: dict[str, Any] = {"task": name, "item": sample["doc_id"]}
        if name == PROSE:
            likelihood, num_bytes = sample["bits_per_byte"]
            row |= {"log_likelihood": likelihood, "bytes": num_bytes, "words": sample["word_perplexity"][1]}
        else:
            row |= {"answer": sample["target"], "log_likelihoods": _likelihoods(sample)}
            row |= {metric: sample[metric] for metric in ("acc", "acc_norm") if metric in sample}
        rows.append(row)
    return rows


def _likelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(response[0]) for response in sample["filtered_resps"]]


def _samples(results: dict[str, Any], *, items: Sequence[ClozeItem]) -> list[dict[str, Any]]:
    """The first cloze items with what the model chose."""
    shown = []
    for sample in _sorted_samples(results, name=CLOZE)[:NUM_SAMPLES]:
        likelihoods = _likelihoods(sample)
        chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        item = items[sample["doc_id"]]
        shown.append({**item._asdict(), "chosen": chosen, "right": chosen == item.label})
    return shown


def _sha256(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(value)).encode()).hexdigest()[:12]
