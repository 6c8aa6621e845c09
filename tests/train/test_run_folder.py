"""Run folders: which settings they are locked to, and from when; more steps for a finished run."""

import re
import shutil

import pytest

from tests.helpers.survive import long_run, outcome
from tests.train.conftest import arguments, copy_half, logged, losses, train_here
from tests.train.test_resume import kill
from train.phase import CONFIGS, main
from train.run_folder import read_record, write_record
from um3.core.commands import find_config
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.hub import weights_digest


def test_other_settings_and_other_inputs_are_refused(made, tmp_path):
    changes = ["optimizer.lr=0.1", "data.sources=[{name: scenes, kind: scenes, length: 9}]"]
    with pytest.raises(UserError) as caught:
        main(arguments("stage1", made, *changes))
    for part in ("data.sources[0].length: 200 -> 9;", "optimizer.lr: 0.006 -> 0.1;", "RUN=", f"delete {made}/stage1 "):
        assert part in str(caught.value)
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    shutil.copy(copied / "stage2/model/model.safetensors", copied / "stage1/model/model.safetensors")
    with pytest.raises(UserError, match=r"inputs\.init_from"):
        main(arguments("stage2", copied))


STARTS = {
    "stage1": "model.init_from=@",
    "um3": "model.base_model=@ visual_tokenizer=@",
    "um3-instruct": "init_from=@",
    "llava-instruct": "init_from=@",
}


@pytest.mark.parametrize("phase", STARTS)
def test_the_start_of_a_phase_is_one_of_its_inputs(phase, made):
    model = made / "um3/model"
    overrides = STARTS[phase].replace("@", str(model)).split()
    config = load_config(CONFIGS[phase], path=find_config("demo"), section=phase, overrides=overrides)
    assert config.inputs()["init_from"] == weights_digest(model) != ""


def test_a_folder_without_a_checkpoint_is_not_locked_to_its_settings(tmp_path, monkeypatch):
    command = [*long_run("stage1", tmp_path, steps=2), f"loop.output_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="/nope"):
        main([*command, "data.sources=[{name: data, path: /nope}]"])
    kill([*command, "optimizer.lr=0.1", "data.sources=[{name: scenes, kind: scenes, length: 90}]"], 1, monkeypatch)
    assert (tmp_path / "run/config.yaml").exists() and len(losses(tmp_path / "run")) == 1
    main(command)
    main([*command, f"loop.output_dir={tmp_path}/whole"])
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_from_before_a_setting_has_its_default(made, tmp_path, capsys):
    done, half = tmp_path / "done", copy_half(made / "stage1", tmp_path / "half")
    shutil.copytree(made / "stage1", done)
    for path in (done / "done.json", half / "checkpoints/step-00000002/meta.json"):
        record = read_record(path)
        config = record["config"] if path.parent == done else record["state"]["run"]["config"]
        del config["optimizer"]["ema_decay"], config["data"]["sources"][0]["exclude"]
        write_record(path, record)
    for folder in (done, half):
        main(arguments("stage1", made, f"loop.output_dir={folder}"))
        assert ("up to date" in capsys.readouterr().out) is (folder == done)
        with pytest.raises(UserError, match=r"optimizer\.ema_decay: 0\.0 -> 0\.5"):
            main(arguments("stage1", made, f"loop.output_dir={folder}", "optimizer.ema_decay=0.5"))
    assert losses(half) == losses(made / "stage1")[2:]


LONGER = {
    "constant": "has had the same 4 steps",
    "cosine": r"0\.25 of its peak, where it was 0\b.*is not that of a run of 6",
}


@pytest.mark.parametrize("schedule", LONGER)
def test_more_steps_resume_a_finished_run(schedule, made, tmp_path, capsys):
    options = [f"optimizer.schedule={schedule}", "optimizer.final_lr_ratio=0", "optimizer.warmup_steps=0"]
    train_here("stage1", made, tmp_path / "run", *options, "loop.max_steps=4")
    capsys.readouterr()
    train_here("stage1", made, tmp_path / "run", *options, "loop.max_steps=6")
    assert re.search(rf"loop\.max_steps: 4 -> 6; .*{LONGER[schedule]}", capsys.readouterr().err)
    assert logged(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]
    train_here("stage1", made, tmp_path / "run", *options, "loop.max_steps=6")
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"loop\.max_steps: 6 -> 5;"):
        train_here("stage1", made, tmp_path / "run", *options, "loop.max_steps=5")
    whole = train_here("stage1", made, tmp_path / "whole", *options, "loop.max_steps=6")
    assert (losses(tmp_path / "run") == whole) is (schedule == "constant")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint .*loop\.max_steps=6"):
        train_here("stage1", made, tmp_path / "run", *options, "loop.max_steps=8")
