import json
import shutil
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from language_items import FILES, changed
from lm_eval import simple_evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from eval.tasks.language import language_scores, run_tasks
from eval.tasks.lm_eval_data import TASKS, find_benchmarks, local_benchmarks, paper_tasks
from um3.core.errors import UserError

BENCH = Path(__file__).parents[4] / "shared/data/bench"


@pytest.mark.skipif(not BENCH.is_dir(), reason="no local benchmark files")
def test_the_papers_tasks_run_from_local_files(um3_lm):
    with local_benchmarks(BENCH) as found:
        assert set(found) == {"arc_challenge", "hellaswag", "piqa", "winogrande"}
        assert found["arc_challenge"].name == "arc-challenge_test.jsonl"
        results = run_tasks(um3_lm, tasks=list(found), limit=4)
    for name in found:
        assert 0 <= results["results"][name]["acc,none"] <= 1
        assert results["n-samples"][name]["effective"] == 4
    first = json.loads(found["piqa"].read_text().splitlines()[0])
    sample = next(s for s in results["samples"]["piqa"] if s["doc_id"] == 0)
    assert sample["arguments"][0][0] == f"Question: {first['goal']}\nAnswer:"


def test_the_tasks_are_lm_evals_own_to_the_last_setting(bench):
    """Only the data come from elsewhere: the configuration that lm-eval reports is that of its YAML."""
    with local_benchmarks(bench):
        tasks = paper_tasks().load(list(TASKS))["tasks"]
    files = {path.stem: path for path in (Path(lm_eval.tasks.__file__).parent / "arc").glob("*.yaml")}
    assert load_yaml(files["arc_challenge"])["dataset_path"] == "allenai/ai2_arc"
    for name, task in tasks.items():
        config = task.config
        assert (config.dataset_path, config.dataset_name) == (TASKS[name].hub_name, TASKS[name].hub_config)
        assert config.dataset_kwargs is None and config.custom_dataset is None and config.training_split == "train"


def test_a_hub_like_folder_serves_any_task_and_load_dataset_is_put_back(um3_lm, bench, tmp_path):
    folder = tmp_path / "baber" / "piqa"
    folder.mkdir(parents=True)
    shutil.copy(bench / FILES["piqa"], folder / "validation.jsonl")
    (tmp_path / "some" / "other").mkdir(parents=True)
    (tmp_path / "some" / "other" / "test.jsonl").write_text('{"a": 1}\n')
    original = datasets.load_dataset
    with local_benchmarks(tmp_path) as found:
        assert found == {"piqa": folder}
        assert len(datasets.load_dataset("baber/piqa")["validation"]) == 12
        assert run_tasks(um3_lm, tasks=["piqa"])["n-samples"]["piqa"]["effective"] == 12  # without a train split
        assert datasets.load_dataset("some/other")["test"][0] == {"a": 1}
    assert datasets.load_dataset is original


def test_training_items_beside_them_are_for_few_shots(um3_lm, bench, tmp_path):
    shutil.copy(bench / FILES["piqa"], tmp_path / "piqa_valid.jsonl")
    (tmp_path / "piqa_train.jsonl").write_text(2 * changed("piqa", goal="Close a jar"))
    with local_benchmarks(tmp_path) as found:
        assert found == {"piqa": tmp_path / "piqa_valid.jsonl"}
        results = simple_evaluate(
            um3_lm, tasks=["piqa"], task_manager=paper_tasks(), num_fewshot=1, bootstrap_iters=0, limit=2
        )
    context = results["samples"]["piqa"][0]["arguments"][0][0]
    assert context.startswith("Question: Close a jar\nAnswer: Turn its lid.\n\nQuestion: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa", '{"goal": "x"}\n', "item 1, has no 'sol1': it is not the data of piqa"),
        ("piqa", changed("winogrande"), "has no 'goal': it is not the data of piqa"),
        ("winogrande", changed("piqa"), "has no 'sentence': it is not the data of winogrande"),
        ("piqa", changed("piqa") + "{half\n", "line 2, is not JSON"),
        ("piqa", changed("piqa") + changed("piqa", label=-1), "item 2: 'label' is '-1', not one of 0, 1"),
        ("hellaswag", changed("hellaswag", label=""), "'label' is '', not one of 0, 1, 2, 3"),
        ("arc_challenge", changed("arc_challenge", answerKey="E"), "'answerKey' is 'E', not one of A, B, C"),
        ("arc_challenge", changed("arc_challenge", choices="A or B"), "'answerKey' is 'A', not one of"),
        ("piqa", changed("piqa") + changed("piqa", goal=[1]), "are not alike"),
        ("piqa", "3\n", "has no 'goal'"),
        ("piqa", "\n", "holds no items of piqa"),
        ("piqa", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_benchmark_files_with_problems_are_one_line_errors(name, content, message, um3_lm, tmp_path):
    (tmp_path / FILES[name]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        language_scores(um3_lm, documents=[], folder=tmp_path / "out", seed=0, benchmarks=tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_benchmark_folders_with_problems_are_one_line_errors(um3_lm, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_benchmarks(tmp_path / "none")
    with pytest.raises(UserError, match="holds none of the language benchmarks"):
        language_scores(um3_lm, documents=[], folder=tmp_path, seed=0, benchmarks=tmp_path)
    with pytest.raises(UserError, match="set LM_EVAL_DATA to a folder"):
        language_scores(um3_lm, documents=[], folder=tmp_path, seed=0)
    for name in ("piqa_a.jsonl", "piqa_b.jsonl"):
        (tmp_path / name).write_text(changed("piqa"))
    with pytest.raises(UserError, match="several files for piqa's validation split"):
        find_benchmarks(tmp_path)
    hub = tmp_path / "hub" / "baber" / "piqa"
    hub.mkdir(parents=True)
    (hub / "validation.parquet").write_bytes(b"PAR1 no more")
    with (
        pytest.raises(UserError, match="cannot be read as the hub's baber/piqa"),
        local_benchmarks(tmp_path / "hub"),
    ):
        run_tasks(um3_lm, tasks=["piqa"])
