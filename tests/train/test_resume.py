"""Runs that are stopped, killed, damaged or started twice."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from data_mix.samples import BadSample
from tests.helpers.image_files import encoded, write_folder
from tests.helpers.processes import locked
from tests.helpers.survive import long_run, outcome
from tests.train.conftest import arguments, logged, losses, train_apart, train_here
from train import checkpoint, loop
from train.phase import main
from train.run_folder import read_record, result_files, write_record
from um3.core.errors import Interrupted, UserError


class Killed(Exception):
    """Stands for a kill between two steps."""


def before_each_step(patch, change):
    """Call `change` with the step's number, from 0; the metrics that it returns replace those of the step."""
    real = loop._train_step

    def train_step(task, **options):
        changed = change(options["step"]) or {}
        return real(task, **options) | changed

    patch.setattr(loop, "_train_step", train_step)


def kill(command, step, monkeypatch):
    """Run `command`, killed after `step` steps."""

    def die(number):
        if number >= step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_each_step(patch, die)
        main(command)


def kill_and_resume(command, step, monkeypatch, *changes):
    """Run `command`, killed after `step` steps, then again to its end with `changes`."""
    kill(command, step, monkeypatch)
    main([*command, *changes])


ENGINES = [("adamw", 0), ("adamw", 2), ("adamw", 3), ("muon", 0), ("muon", 2)]


@pytest.mark.parametrize(
    ("kind", "zero_stage"),
    [engine if engine == ("adamw", 2) else pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES],
)
def test_a_checkpoint_loads_at_any_zero_stage(kind, zero_stage, made, tmp_path, monkeypatch):
    optimizer = f"optimizer.kind={kind}"
    whole = losses(made / "um3") if kind == "adamw" else train_here("um3", made, tmp_path / "whole", optimizer)
    command = arguments("um3", made, f"loop.output_dir={tmp_path}/moved", optimizer)
    kill_and_resume(command, 2, monkeypatch, f"engine.zero_stage={zero_stage}")
    assert losses(tmp_path / "moved") == pytest.approx(whole, rel=1e-5)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def swap(path):
    shutil.copy(path.parents[1] / "step-00000002" / path.name, path)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """A run of six steps that was killed after the fifth: its command, and its checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("killed")
    command = [*long_run("stage1", folder, steps=6), "loop.keep_checkpoints=2", 'loop.keep_best_by=""']
    with pytest.MonkeyPatch.context() as patch:
        kill([*command, f"loop.output_dir={folder}/run"], 5, patch)
    return command, folder / "run"


@pytest.fixture
def stopped(killed_once, tmp_path):
    """A copy of `killed_once` to damage: its command, and the folder of its checkpoints."""
    command, folder = killed_once
    shutil.copytree(folder, tmp_path / "run")
    return [*command, f"loop.output_dir={tmp_path}/run"], tmp_path / "run/checkpoints"


@pytest.mark.parametrize("damage", [flip, cut, swap, Path.unlink])
@pytest.mark.parametrize("file", ["model-00000.safetensors", "meta.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(file, damage, stopped, caplog):
    _, folder = stopped
    damage(folder / "step-00000004" / file)
    with caplog.at_level("WARNING"):
        assert checkpoint.find_checkpoint(folder)[0] == folder / "step-00000002"
    assert f"step-00000004 is damaged ({file})" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004.damaged"]


def test_from_the_previous_checkpoint_the_run_computes_the_same_bits(stopped, tmp_path):
    command, folder = stopped
    main([*command, f"loop.output_dir={tmp_path}/whole"])
    flip(folder / "step-00000004/model-00000.safetensors")
    (folder / "step-00000006.partial").mkdir()  # as after a kill during a save
    main(command)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_without_a_valid_checkpoint_nothing_is_overwritten(stopped, tmp_path):
    command, folder = stopped
    flip(folder / "step-00000002/model-00000.safetensors")
    (folder / "step-00000004/meta.json").unlink()

    def times():
        files = [path for path in (tmp_path / "run").rglob("*") if path.name != "train.log"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    with pytest.raises(UserError, match=r"step-00000004: meta.json; step-00000002: model-0"):
        main(command)
    assert before == times()


def test_an_unfinished_first_checkpoint_does_not_count(stopped, tmp_path):
    command, folder = stopped
    shutil.rmtree(folder / "step-00000002")
    (folder / "step-00000004").rename(folder / "step-00000002.partial")
    main(command)
    assert logged(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("best_by", "kept"), [("train/loss", [3, 7, 8]), ('""', [7, 8])])
def test_the_newest_checkpoints_and_the_best_are_kept(best_by, kept, tmp_path, monkeypatch):
    before_each_step(monkeypatch, lambda step: {"train/loss": float(abs(step + 1 - 3))})  # the lowest after step 3
    options = ["loop.max_steps=8", "loop.save_every_steps=1", f"loop.keep_best_by={best_by}"]
    train_here("stage1", tmp_path, tmp_path, *options)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in kept]
    if best_by == "train/loss":
        means = checkpoint.read_meta(tmp_path / "checkpoints/step-00000003")["state"]["means"]
        assert means == {"train/loss": 0.0}


def test_an_unknown_metric_is_reported(tmp_path, capsys):
    train_here("stage1", tmp_path, tmp_path, "loop.keep_best_by=train/los", "loop.max_steps=1")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "keep_best_by" in line]
    assert "'train/los'" in line and "train/loss" in line


def test_a_non_finite_loss_loses_nothing_and_its_remedy_works(stopped, tmp_path):
    command, folder = stopped
    start = f"loop.resume_from={folder}/step-00000004"
    hot = [*command, f"loop.output_dir={tmp_path}/hot", start, "optimizer.lr=1e18", "loop.save_every_steps=1"]
    place = "on rank 0: images of scenes: scenes-train-0-"
    with pytest.raises(UserError, match=rf"^step 6: .*train/mse is (nan|inf).* {place}.*RUN="):
        main(hot)
    assert [path.name for path in (tmp_path / "hot/checkpoints").iterdir()] == ["step-00000005"]
    assert logged(tmp_path / "hot", "step") == [5] and not (tmp_path / "hot/model").exists()
    cool = [*command, f"loop.output_dir={tmp_path}/cool"]
    with pytest.raises(UserError, match="step-00000009 is not a whole checkpoint"):
        main([*cool, f"loop.resume_from={folder}/step-00000009"])
    main([*cool, start])
    main(command)
    assert outcome(tmp_path / "cool")["model"] == outcome(tmp_path / "run")["model"]


@pytest.mark.parametrize("change", ["optimizer.lr=0.1", "loop.seed=7", "vocabulary.text_vocab_size=300"])
def test_a_checkpoint_of_another_run_is_refused(change, made, tmp_path):
    folder = tmp_path / "other/checkpoints"
    shutil.copytree(made / "um3/checkpoints", folder)
    name, _, value = change.partition("=")
    with pytest.raises(UserError, match=rf"step-00000004 .*{name}: \S+ -> {value}"):
        train_here("um3", made, tmp_path / "other", change)
    assert not (tmp_path / "other/done.json").exists()
    if "vocab" in name:
        (folder / "step-00000004").rename(tmp_path / "step-00000004")
        options = [f"loop.resume_from={tmp_path}/step-00000004", change]
        with pytest.raises(UserError, match=r"vocabulary: \w+ -> \w+"):
            train_here("um3", made, tmp_path / "third", *options)


def test_a_checkpoint_of_another_shape_is_refused(made, tmp_path):
    options = [f"loop.resume_from={made}/um3/checkpoints/step-00000004", "model.hidden_size=64"]
    with pytest.raises(UserError, match=r"step-00000004 holds '\S+' of shape \(\d+, 32\), .* \(\d+, 64\)"):
        train_here("um3", made, tmp_path, *options)


@pytest.fixture(scope="module")
def stage1_of_images(tmp_path_factory):
    """Folder `images` of 40 images with captions, and `run`, a stage 1 on them that was killed after two steps."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "images").mkdir()
    for number in range(40):
        (folder / f"images/{number:02d}.png").write_bytes(encoded(number))
        (folder / f"images/{number:02d}.txt").write_text(f"picture {number} of {('red', 'blue')[number % 2]}")
    with pytest.MonkeyPatch.context() as patch:
        kill(on_images(folder), 2, patch)
    return folder


def on_images(folder):
    """Command of a stage 1 in `folder`/run on `folder`/images."""
    sources = f'data.sources=[{{name: mine, path: "{folder}/images", val_fraction: 0.1}}]'
    return arguments("stage1", folder, f"loop.output_dir={folder}/run", sources)


def test_a_run_resumes_with_its_vocabulary_on_moved_data_only_if_they_are_the_same(
    stage1_of_images, tmp_path, monkeypatch
):
    def fail(self, index):
        raise BadSample("unreadable image")

    moved = tmp_path / "moved"
    shutil.copytree(stage1_of_images, moved)
    with monkeypatch.context() as patch:
        patch.setattr("data_mix.sources.images.ImageReader.__getitem__", fail)
        with pytest.raises(UserError, match=r"none of the .* samples"):  # unreadable, but the same vocabulary
            main(on_images(moved))
    main(on_images(moved))
    (vocabulary,) = (moved / "run/cache").glob("captions-*.json")
    entries = json.loads(json.loads(vocabulary.read_text())["backend"])["model"]["vocab"]
    assert json.loads((moved / "run/model/tokenizer.json").read_text())["model"]["vocab"] == entries
    assert str(moved) in (moved / "run/config.yaml").read_text()

    changed = tmp_path / "changed"
    shutil.copytree(stage1_of_images, changed)
    (changed / "images/90.png").write_bytes(encoded(90))
    (changed / "images/90.txt").write_text("seventeen wonderful butterflies")
    with pytest.raises(UserError, match=r"data\.sources\.mine: \w+ -> \w+"):
        main(on_images(changed))


def test_another_vocabulary_is_refused(stage1_of_images, tmp_path):
    shutil.copytree(stage1_of_images, tmp_path / "copy")
    (vocabulary,) = (tmp_path / "copy/run/cache").glob("captions-*.json")
    record = read_record(vocabulary)
    swapped = {"red": "blue", "blue": "red"}
    pattern = r"(?<=\\u0120)(red|blue)(?=\")|(?<=Ġ)(red|blue)(?=\")"
    write_record(vocabulary, record | {"backend": re.sub(pattern, lambda word: swapped[word[0]], record["backend"])})
    with pytest.raises(UserError, match=r"fingerprints\.vocabulary: \w+ -> \w+"):
        main(on_images(tmp_path / "copy"))
    cut(vocabulary)
    with pytest.raises(UserError, match=vocabulary.name):
        main(on_images(tmp_path / "copy"))


def test_an_empty_validation_split_is_found_before_training(stage1_of_images, tmp_path):
    shutil.copytree(stage1_of_images / "images", tmp_path / "images")
    command = [argument.replace("0.1}", "1e-9}") for argument in on_images(tmp_path)]
    with pytest.raises(UserError, match=r"in the val split.*VAL_FRACTION"):
        main(command)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_changed_text_is_named(made, tmp_path, monkeypatch):
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"Passage {number} " + "word " * 60 for number in range(40)))
    source = f"[{{name: prose, path: {prose}, val_fraction: 0.3}}]"
    command = arguments("um3", made, f"loop.output_dir={tmp_path}/um3", f"data.texts={source}")
    kill(command, 2, monkeypatch)
    prose.write_text(prose.read_text().replace("word", "verb"))
    os.utime(prose, (0, 0))
    with pytest.raises(UserError, match=r"data\.texts\.prose: \w+ -> \w+"):
        main(command)


@pytest.mark.parametrize("phase", ["stage1", "um3"])
def test_a_run_killed_before_its_result_makes_the_same_files(phase, made, tmp_path):
    shutil.copytree(made / phase, tmp_path / phase)
    shutil.rmtree(tmp_path / phase / "model")
    (tmp_path / phase / "done.json").unlink()
    main(arguments(phase, made, f"loop.output_dir={tmp_path}/{phase}"))
    assert result_files(tmp_path / phase) == result_files(made / phase)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_result_is_made_again(damage, made, tmp_path, capsys):
    folder = tmp_path / "stage1"
    shutil.copytree(made / "stage1", folder)
    damage(folder / "model/model.safetensors")
    (folder / "model/README.md").write_text("notes of its user")
    command = arguments("stage1", made, f"loop.output_dir={folder}")
    main(command)
    assert "model/model.safetensors" in capsys.readouterr().out
    assert result_files(folder)["model/model.safetensors"] == result_files(made / "stage1")["model/model.safetensors"]
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=rf"model/\w+.*delete {folder}"):
        main(command)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"inputs": {}, "sha256": "0"}', "[" * 100_000])
def test_an_odd_record_is_one_line(content, made, tmp_path):
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(UserError, match=r"done\.json"):
        main(arguments("stage1", made, f"loop.output_dir={tmp_path}"))


def test_a_lost_config_is_told(stopped, tmp_path, capsys):
    command, _ = stopped
    file = tmp_path / "run/config.yaml"
    file.write_text("")
    with pytest.raises(UserError, match=r"config\.yaml is empty"):
        main(command)
    file.unlink()
    with pytest.raises(UserError, match=r"step-00000004 .*optimizer\.lr: 0\.006 -> 0\.1"):
        main([*command, "optimizer.lr=0.1"])
    assert not file.exists()
    main(command)
    assert "config.yaml is missing" in capsys.readouterr().err and "lr: 0.006" in file.read_text()


def test_a_run_folder_has_one_writer(stopped, tmp_path):
    command, _ = stopped
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match=f"another process is writing to {tmp_path}/run"):
            main(command)
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    main(command)


def test_a_run_does_not_resume_with_other_inputs(made, tmp_path, monkeypatch):
    shutil.copytree(made / "stage1/model", tmp_path / "stage1")
    flip(tmp_path / "stage1/model.safetensors")
    command = arguments("stage2", made, f"loop.output_dir={tmp_path}/stage2")
    kill(command, 3, monkeypatch)
    with pytest.raises(UserError, match=r"step-00000002 is of a run with other .*inputs\.init_from: \w+ -> \w+"):
        main([*command, f"init_from={tmp_path}/stage1"])


def test_sigterm_saves_and_stops(tmp_path, monkeypatch):
    before_each_step(monkeypatch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
    with pytest.raises((Interrupted, SystemExit)):
        train_here("stage1", tmp_path, tmp_path)
    assert (tmp_path / "checkpoints/step-00000003/meta.json").exists() and not (tmp_path / "done.json").exists()


def test_skipped_images_are_counted_over_a_resumption_and_all_processes(tmp_path, monkeypatch):
    write_folder(tmp_path / "images")
    for number in range(0, 40, 2):
        (tmp_path / f"images/b/c/{number:02d}.png").write_bytes(b"no image")
    command = [*long_run("stage1", tmp_path, steps=4), f"data.sources=[{{name: mine, path: {tmp_path}/images}}]"]
    kill_and_resume([*command, f"loop.output_dir={tmp_path}/run"], 2, monkeypatch)
    main([*command, f"loop.output_dir={tmp_path}/whole"])
    key = "data/skipped/mine/not_an_image"
    counts = logged(tmp_path / "whole", key)
    assert counts == sorted(counts) and counts[-1] > counts[1] > 0
    assert logged(tmp_path / "run", key) == counts
    train_apart([*command, f"loop.output_dir={tmp_path}/two"], processes=2)
    for name in ("run", "two"):
        assert read_record(tmp_path / name / "done.json")["skipped"] == {key: counts[-1]}
