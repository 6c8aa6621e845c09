"""Log levels, provenance, seeds, and where models are found."""

import re
import shutil
import subprocess

import huggingface_hub.constants
import pytest
import torch

from tests.helpers.processes import ROOT, run_python
from um3.core.errors import UserError
from um3.core.hub import model_folder
from um3.core.metrics import machine, versions
from um3.core.ranges import EXACT_BELOW
from um3.core.seeds import derive_seed, numpy_generator, sample_seed, seed_everything, torch_generator

LOG_PROGRAM = """
import logging
from um3.core.log import setup_logging
setup_logging(); setup_logging()
for name in ("train.loop", "um3.core.metrics", "somebody.else"):
    logging.getLogger(name).info("%s info", name)
    logging.getLogger(name).warning("%s warning", name)
"""


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("0", "train.loop info, train.loop warning, um3.core.metrics info, um3.core.metrics warning, somebody.else"),
        ("1", "rank 1 train.loop warning, rank 1 um3.core.metrics warning, rank 1 somebody.else"),
    ],
)
def test_log_levels_by_rank(rank, expected):
    lines = run_python(LOG_PROGRAM, RANK=rank).stderr.splitlines()
    assert ", ".join(line.partition(" ")[2] for line in lines) == f"{expected} warning"


def test_names_from_outside_cannot_forge_a_line_of_the_log():
    program = f"""{LOG_PROGRAM}
import warnings
logging.getLogger("train").warning("skipped %s", "a\\n08:00:00 all is well\\x1b[31m")
warnings.warn("b\\nc")"""
    *_, logged, warned = run_python(program).stderr.splitlines()
    assert logged.endswith(r"skipped a\n08:00:00 all is well\x1b[31m") and warned == r"UserWarning: b\nc"


def test_the_commit_says_whether_the_tree_has_changes(tmp_path):
    def commit():
        program = "from um3.core.metrics import commit; print(commit())"
        return run_python(program, cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout.strip()

    shutil.copytree(ROOT / "um3" / "core", tmp_path / "um3" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "um3/__init__.py", tmp_path / "um3")  # without it, the installed um3 would be imported
    assert commit() == "unknown"
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=tmp_path, check=True)
    clean = commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "new.txt").touch()
    assert commit() == f"{clean}+changes"


def test_versions_and_machine_are_named():
    installed, cores = versions(), machine()["cpu_cores"]
    assert installed["torch"] == torch.__version__ and installed["python"].startswith("3.")
    assert "absent" not in installed.values() and isinstance(cores, int) and cores >= 1


def test_seeds_never_change():
    """Other values here would change the random numbers of every run."""
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(17, "step", 3) == 4789921028265567934


def test_seeds_differ_by_seed_name_and_order():
    names = [(), ("a",), ("a", 0), ("a", 1), (1, "a"), ("b",)]
    seeds = [derive_seed(seed, *name) for seed in (0, 1, -1) for name in names]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_that_users_see_survive_a_reader_of_json_that_knows_floats_only():
    seeds = [sample_seed(0, "image", index) for index in range(1000)]
    assert len(set(seeds)) == 1000 and max(seeds) > EXACT_BELOW // 2
    assert [int(float(seed)) for seed in seeds] == seeds


def test_generators_depend_on_seed_and_name_alone():
    draws = []
    for global_seed, name in ((5, "noise"), (6, "noise"), (6, "other")):
        torch.manual_seed(global_seed)
        seed_draw = torch.rand(3, generator=torch_generator(1, name)).tolist()
        numpy_draw = numpy_generator(1, name).random()
        seed_everything(3, name)
        draws.append([seed_draw, numpy_draw, torch.rand(3).tolist()])
    first, second, other = draws
    assert first == second and all(a != b for a, b in zip(second, other, strict=True))
    assert numpy_generator(1, "noise").random() != numpy_generator(2, "noise").random()


def test_a_model_is_a_local_folder_or_a_cached_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    assert model_folder(tmp_path) == tmp_path and model_folder("owner/name") == snapshot
    for wrong in ("owner/other", "nowhere", tmp_path / "no" / "folder"):
        with pytest.raises(UserError, match=f"QLIP.*'{wrong}'.*hub id"):
            model_folder(wrong, kind="QLIP tokenizer")
