"""The language part of `make eval`, run by lm-eval: the paper's five tasks, and a cloze and bits per byte of prose.

The five tasks are lm-eval's own, on local copies of their data (`eval.lm_eval_data`). `eval.lm.UM3LM` scores text
ids alone, so visual ids take no probability from a word. Every item's log-likelihoods are stored beside the scores.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.config import EvalConfig, LanguageConfig
from eval.lm_eval_data import TASKS, open_benchmarks
from eval.paper_values import LANGUAGE_METRICS, UM3
from eval.results_cache import ResultsCache
from eval.scores import Interval, Measurement, PartResult, Score, bootstrap
from eval.tasks.prose_tasks import CHOICES, CLOZE, PROSE, ClozeItem, cloze_items, prose_tasks
from eval.tasks.validation_data import validation_documents
from um3.core.errors import UserError
from um3.core.files import short_hash, write_text

if TYPE_CHECKING:
    from eval.lm import UM3LM

NUM_SAMPLES = 12
ITEMS_FILE = "language_items.jsonl"
SCORING = "log-likelihood over text ids, after the model's own start of a text"


def evaluate_language(config: EvalConfig, *, model: Path, request: str) -> PartResult:
    """Evaluate any causal language model. Finished requests are stored until the last score is known.

    UserError if there is nothing to measure, too little text, or a benchmark or model that cannot be read.
    """
    part = config.language
    documents = validation_documents(config.texts, seed=config.seed) if config.texts else []
    with TemporaryDirectory() as folder:
        benchmarks = open_benchmarks(part.benchmarks, folder=folder, limit=part.limit)
        if not benchmarks and not documents:
            raise UserError(
                "nothing to measure: there is neither a benchmark folder nor validation text; set LM_EVAL_DATA to a "
                "folder with the tasks' data (docs/evaluation.md), or TEXT to texts"
            )
        from eval.lm import UM3LM, load_language_model

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # progress is shown here
        loaded, tokenizer = load_language_model(str(model))
        cache = ResultsCache(config.results_dir / "language.cache", protocol=request)
        max_length = part.max_tokens or None
        lm = UM3LM(loaded, tokenizer=tokenizer, batch_size=part.batch_size, max_length=max_length, cache=cache)
        data: dict[str, Any] = {"documents": documents, "benchmarks": benchmarks}
        result = language_scores(lm, **data, config=part, folder=config.results_dir, seed=config.seed)
    cache.remove()
    return result


def language_scores(
    lm: "UM3LM",
    *,
    documents: Sequence[str],
    benchmarks: Mapping[str, Any],
    config: LanguageConfig,
    folder: Path,
    seed: int,
) -> PartResult:
    """Rows of every language task; the log-likelihoods of every item go to `folder`/language_items.jsonl.

    `documents` are validation texts, for the cloze and the bits per byte; `benchmarks` the tasks of `open_benchmarks`.
    What either lacks has no value. UserError for too little text.
    """
    of = Measurement("language", seed, {"scored": SCORING, "shots": 0, "max_tokens": lm.own_max_tokens})
    result, items = PartResult([], {"cloze": [], "prompts": {}}, {}), list[dict[str, Any]]()
    if documents:
        cloze = cloze_items(documents, num_items=config.num_items, seed=seed)
        texts = [text for text in documents if text.strip()][: config.num_documents]
        results = _run_prose_tasks(lm, cloze=cloze, texts=texts, folder=folder)
        result.scores.extend([*_choice_rows(results, name=CLOZE, of=of), *_prose_rows(results, of=of)])
        items += [*_items(results, name=CLOZE), *_items(results, name=PROSE)]
        for item, asked in list(zip(items, cloze, strict=False))[:NUM_SAMPLES]:
            chosen = int(np.argmax(item["log_likelihoods"]))
            result.samples["cloze"].append({**asked._asdict(), "chosen": chosen, "right": chosen == asked.label})
    else:
        note = "no validation text; set TEXT to texts"
        result.scores.extend(_missing_rows(CLOZE, "acc", "acc_norm", note=note, of=of))
        result.scores.extend(_missing_rows(PROSE, "bits_per_byte", "word_perplexity", note=note, of=of))
    errors = []
    for name in TASKS:
        missing = f"no local data; put {TASKS[name].hub_name} or {name}.jsonl into a folder, set LM_EVAL_DATA to it"
        task = benchmarks.get(name, missing)
        if isinstance(task, UserError | str):
            errors += [str(task)] if isinstance(task, UserError) else []
            result.scores.extend(_missing_rows(name, LANGUAGE_METRICS[name], note=str(task), of=of))
            continue
        results = run_tasks(lm, task, limit=config.limit)
        result.scores.extend(_choice_rows(results, name=name, of=of))
        context, continuation = results["samples"][name][0]["arguments"][0]
        result.samples["prompts"][name] = {"context": context, "continuation": continuation}
        items += _items(results, name=name)
    write_text(folder / ITEMS_FILE, "".join(json.dumps(item) + "\n" for item in items))
    return result._replace(errors=errors)


def run_tasks(lm: "UM3LM", loaded: dict[str, Any], *, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results for loaded tasks, without examples in the prompt; the samples are in the order of the items."""
    from lm_eval import evaluate

    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    # simple_evaluate would ask pip, git and lscpu about the machine, which takes seconds per task.
    results = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert results is not None, "lm-eval returns results on the first rank, and there is only one"
    for samples in results["samples"].values():
        samples.sort(key=lambda sample: int(sample["doc_id"]))
    return dict(results)


def _run_prose_tasks(lm: "UM3LM", *, cloze: Sequence[ClozeItem], texts: Sequence[str], folder: Path) -> dict[str, Any]:
    """The results of the two tasks made from validation text, which is written to `folder` as JSONL."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    cloze_file, prose_file = folder / f"{CLOZE}.jsonl", folder / f"{PROSE}.jsonl"
    write_text(cloze_file, "".join(json.dumps(item._asdict()) + "\n" for item in cloze))
    write_text(prose_file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    with TemporaryDirectory() as cache:
        configs = prose_tasks(cloze_file=cloze_file, prose_file=prose_file, cache=Path(cache))
        return run_tasks(lm, TaskManager(include_defaults=False).load(configs))


def _choice_rows(results: dict[str, Any], *, name: str, of: Measurement) -> list[Score]:
    """lm-eval's accuracies of a multiple choice, with their intervals over the items."""
    values, samples = results["results"][name], results["samples"][name]
    items_sha256 = short_hash([[sample["arguments"], sample["target"]] for sample in samples])
    of = of.named(name).with_protocol(items=len(samples), items_sha256=items_sha256)
    note = f"choose the next sentence of validation text; chance is 1 in {CHOICES}" if name == CLOZE else ""
    return [
        of.score(
            metric,
            values[f"{metric},none"],
            n=len(samples),
            skipped=int(results["n-samples"][name]["original"]) - len(samples),
            version=str(results["versions"].get(name, "")),
            unit="%",
            paper=UM3[name] if metric == LANGUAGE_METRICS.get(name) else None,
            note=note,
            **bootstrap([float(sample[metric]) for sample in samples])._asdict(),
        )
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in values
    ]


def _prose_rows(results: dict[str, Any], *, of: Measurement) -> list[Score]:
    values, samples = results["results"][PROSE], results["samples"][PROSE]
    documents_sha256 = short_hash([sample["target"] for sample in samples])
    of = of.named(PROSE).with_protocol(documents=len(samples), documents_sha256=documents_sha256)
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
            note="over validation documents",
            **interval._asdict(),
        )
        for metric, interval in (("bits_per_byte", per_byte), ("word_perplexity", perplexity))
    ]


def _missing_rows(task: str, *metrics: str, note: str, of: Measurement) -> list[Score]:
    unit, scored = "%" if metrics[0].startswith("acc") else "", LANGUAGE_METRICS.get(task)
    papers = {metric: UM3.get(task) if metric == scored else None for metric in metrics}
    return [of.named(task).missing(metric, note=note, unit=unit, paper=paper) for metric, paper in papers.items()]


def _items(results: dict[str, Any], *, name: str) -> list[dict[str, Any]]:
    """Per item: a choice's log-likelihoods and accuracies, or a document's log-likelihood, bytes and words."""
    items = []
    for sample in results["samples"][name]:
        item: dict[str, Any] = {"task": name, "item": sample["doc_id"]}
        if name == PROSE:
            log_likelihood, num_bytes = sample["bits_per_byte"]
            item |= {"log_likelihood": log_likelihood, "bytes": num_bytes, "words": sample["word_perplexity"][1]}
        else:
            log_likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
            item |= {"answer": sample["target"], "log_likelihoods": log_likelihoods}
            item |= {metric: sample[metric] for metric in ("acc", "acc_norm") if metric in sample}
        items.append(item)
    return items
