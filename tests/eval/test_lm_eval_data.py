"""The paper's tasks on local data: lm-eval's own configuration, and every problem found before a model is loaded."""

import json
import re
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
from language_items import FILES, changed
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval.lm_eval_data import TASKS, find_benchmarks, open_benchmarks, write_task_yamls
from eval.tasks.language import run_tasks
from um3.core.errors import UserError

BENCH = Path(__file__).parents[3] / "shared/data/bench"


@pytest.mark.skipif(not BENCH.is_dir(), reason="no local benchmark files")
def test_the_papers_tasks_run_from_local_files(um3_lm, tmp_path):
    data = find_benchmarks(BENCH)
    assert set(data) == {"arc_challenge", "hellaswag", "piqa", "winogrande"}
    assert data["arc_challenge"]["test"] == str(BENCH / "arc-challenge_test.jsonl")
    for name, loaded in open_benchmarks(BENCH, folder=tmp_path, limit=4).items():
        results = run_tasks(um3_lm, loaded, limit=4)
        assert 0 <= results["results"][name]["acc,none"] <= 1 and results["n-samples"][name]["effective"] == 4
        if name == "piqa":
            first = json.loads((BENCH / "piqa_valid.jsonl").read_text().splitlines()[0])
            sample = next(s for s in results["samples"]["piqa"] if s["doc_id"] == 0)
            assert sample["arguments"][0][0] == f"Question: {first['goal']}\nAnswer:"


def test_the_tasks_are_lm_evals_own_but_for_their_data(benchmarks):
    root, data_keys = Path(lm_eval.tasks.__file__).parent, {"dataset_path", "dataset_name", "dataset_kwargs"}
    data_keys |= {"training_split", "validation_split", "test_split", "tag", "metadata"}
    for name, loaded in benchmarks.items():
        (task,) = loaded["tasks"].values()
        original, ours = load_yaml(root / TASKS[name].yaml), task.config.to_dict(keep_callable=True)
        assert original["dataset_path"] == TASKS[name].hub_name
        assert original.get("dataset_name") == TASKS[name].hub_config
        assert ours["dataset_path"] == "json" and original[f"{TASKS[name].split}_split"] == TASKS[name].split
        for key in original.keys() - data_keys:
            assert ours[key] == original[key] or callable(original[key]), key
        assert task.eval_docs.num_rows == 12


def test_a_folder_named_as_on_the_hub_serves_too(um3_lm, bench, tmp_path):
    folder = tmp_path / "baber" / "piqa"
    folder.mkdir(parents=True)
    shutil.copy(bench / FILES["piqa"], folder / "validation.jsonl")
    assert find_benchmarks(tmp_path) == {"piqa": folder}
    loaded = open_benchmarks(tmp_path, folder=tmp_path / "tasks")
    assert run_tasks(um3_lm, loaded["piqa"])["n-samples"]["piqa"]["effective"] == 12


def test_training_items_serve_few_shot_prompts(um3_lm, bench, tmp_path):
    shutil.copy(bench / FILES["piqa"], tmp_path / "piqa_valid.jsonl")
    (tmp_path / "piqa_train.jsonl").write_text(2 * changed("piqa", goal="Close a jar"))
    (tmp_path / "._piqa_valid.jsonl").write_bytes(b"\xff")
    data = find_benchmarks(tmp_path)
    assert data == {"piqa": {s: str(tmp_path / f"piqa_{s[:5]}.jsonl") for s in ("train", "validation")}}
    write_task_yamls(tmp_path / "tasks", data=data)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    options = {"task_manager": manager, "num_fewshot": 1, "bootstrap_iters": 0, "limit": 2}
    results = simple_evaluate(um3_lm, tasks=["piqa"], **options)
    context = results["samples"]["piqa"][0]["arguments"][0][0]
    assert context.startswith("Question: Close a jar\nAnswer: Turn its lid.\n\nQuestion: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa", '{"goal": "x"}\n', "piqa"),
        ("piqa", changed("winogrande"), r":1: .*label"),
        ("winogrande", changed("piqa"), r":1: .*answer"),
        ("piqa", changed("piqa") + "{half\n", "JSON"),
        ("piqa", changed("piqa") + changed("piqa", label=-1), r":2: .*label.*-1"),
        ("piqa", changed("piqa") + changed("piqa", label="right"), r":2: .*label.*'right'"),
        ("hellaswag", changed("hellaswag", label=""), r":1: .*label.*''"),
        ("hellaswag", changed("hellaswag", label=7), r":1: .*label.* 7"),
        ("arc_challenge", changed("arc_challenge", answerKey="E"), r":1: .*answerKey.*'E'"),
        ("arc_challenge", changed("arc_challenge", choices="A or B"), "not an item"),
        ("social_iqa", changed("social_iqa", label="4"), r":1: .*label.*'4'"),
        ("winogrande", changed("winogrande", answer=3), r":1: .*answer.* 3"),
        ("piqa", "3\n", "piqa"),
        ("piqa", "\n", "piqa"),
        ("piqa", b"\xff\xfe\x00", "piqa"),
    ],
)
def test_files_with_problems_are_one_line_errors(name, content, message, tmp_path):
    (tmp_path / FILES[name]).write_bytes(content if isinstance(content, bytes) else content.encode())
    (error,) = open_benchmarks(tmp_path, folder=tmp_path / "tasks").values()
    assert isinstance(error, UserError) and re.search(message, str(error))
    assert str(tmp_path / FILES[name]) in str(error)


@pytest.mark.parametrize(
    ("name", "field", "labels"),
    [
        ("piqa", "label", [0, "0", 0.0, " 0"]),
        ("winogrande", "answer", ["2", 2, 2.0]),
        ("hellaswag", "label", ["0", 0, 0.0]),
        ("social_iqa", "label", ["1", 1, 1.0]),
        ("arc_challenge", "answerKey", ["1", 1, 1.0]),
    ],
)
def test_a_label_counts_by_its_value_not_by_its_type(name, field, labels, um3_lm, tmp_path):
    """The hub's copies have 0 in PIQA and "2" in WinoGrande; other copies have them the other way around."""
    changes = {"choices": {"text": ["Mars", "Sirius"], "label": ["1", "2"]}} if name == "arc_challenge" else {}
    results = []
    for number, label in enumerate(labels):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / FILES[name]).write_text(changed(name, **changes, **{field: label}))
        sample = run_tasks(um3_lm, open_benchmarks(folder, folder=folder / "tasks")[name])["samples"][name][0]
        results.append([sample["target"], sample["acc"], sample["filtered_resps"]])
    assert all(result == results[0] for result in results)


def test_folders_with_problems_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=r"LM_EVAL_DATA.*not a folder"):
        find_benchmarks(tmp_path / "none")
    with pytest.raises(UserError, match=r"piqa_valid\.jsonl"):
        open_benchmarks(tmp_path, folder=tmp_path)
    for name in ("piqa_a.jsonl", "piqa_b.jsonl"):
        (tmp_path / name).write_text(changed("piqa"))
    with pytest.raises(UserError, match=r"piqa_a.*piqa_b.*validation split of piqa"):
        find_benchmarks(tmp_path)
    hub = tmp_path / "hub" / "baber" / "piqa"
    hub.mkdir(parents=True)
    (hub / "validation.parquet").write_bytes(b"PAR1 no more")
    (error,) = open_benchmarks(tmp_path / "hub", folder=tmp_path / "tasks").values()
    assert re.search(f"{hub}.*piqa", str(error))
