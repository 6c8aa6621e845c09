"""Settings for own images: what is said of them, what is chosen, and that every phase takes it."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from tests.helpers.image_files import encoded, write_folder
from train.phase import CONFIGS
from train.plan import own_images
from train.settings_check import PHASES
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.files import write_json

BASE = own_images.find_config("own_images")


def source(folder, **settings):
    return ImageSourceConfig(name="mine", path=str(folder), kind="auto", **settings)


def looked(folder, **settings):
    seen = own_images.look(source(folder, **settings), size=32)
    return seen, "\n".join(seen.lines)


def arguments(folder, *settings, minutes=1):
    images = f"[{{name: mine, path: {folder}}}]"
    options = ["--config", str(BASE), "--sources", images, "--out", str(folder.parent / "run/own_images.yaml")]
    return [*options, "--minutes", str(minutes), *settings]


def test_images_and_captions_are_described(tmp_path):
    write_folder(tmp_path / "images")
    seen, text = looked(tmp_path / "images")
    assert seen.short_side == 16 and seen.num_train + 1 < 40
    assert f"images of 'mine': {seen.num_train} train, {40 - seen.num_train} val" in text
    assert f"captions: {seen.num_train} different ones of {seen.num_train}, of 2 words (median)" in text
    assert "these are few images" in text and "copies of" not in text.replace("expect copies of them", "")


def test_few_images_leave_enough_for_validation(tmp_path):
    write_folder(tmp_path / "images")
    seen, _ = looked(tmp_path / "images")
    assert seen.source.val_fraction == own_images.MOST_VAL_FRACTION
    assert looked(tmp_path / "images", val_fraction=0.0)[0].num_train == 40
    assert looked(tmp_path / "images", val_fraction=0.5)[0].source.val_fraction == 0.5


def test_what_spoils_a_run_is_said_before_it_starts(tmp_path):
    folder = tmp_path / "images"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for number in range(6):
            (folder / split / f"{number}.png").write_bytes(encoded(number + (split == "val") * 4))
            (folder / split / f"{number}.txt").write_text("ein Bär")
    for number in (6, 7, 8):
        (folder / f"train/{number}.txt").write_text("ein Bär")
    shutil.copy(folder / "train/5.png", folder / "train/6.png")
    Image.fromarray(np.zeros((1, 400, 3), np.uint8)).save(folder / "train/7.png")
    (folder / "train/8.png").write_bytes(b"no image")
    (folder / "film.mp4").write_bytes(b"")
    seen, text = looked(folder)
    assert seen.num_train == 9
    assert "1 of 8 are over 4:1 long" in text
    assert "every caption is 'ein Bär'" in text and "1 captions have letters beyond ASCII" in text
    assert "other files, which are not read: .mp4 (1)" in text
    assert "1 training images are copies of others" in text
    assert "2 of 6 validation images are copies of training images, which are left out" in text
    assert seen.source.exclude == ["val/0.png", "val/1.png"]
    assert len(open_image_source(seen.source, split="val", size=16, seed=0)) == 4
    assert len(open_image_source(seen.source, split="train", size=16, seed=0)) == 9


def write_copies(root, *, different):
    """40 training images, and 40 of validation of which all but `different` are copies of them."""
    for split in ("train", "val"):
        write_folder(root / split)
    for number in range(different):
        (root / "val" / ("a" if number % 2 else "b/c") / f"{number:02d}.png").write_bytes(encoded(100 + number))


@pytest.mark.parametrize("different", [0, 1])
def test_validation_images_stay_if_too_few_are_no_copies(different, tmp_path):
    write_copies(tmp_path, different=different)
    seen, text = looked(tmp_path)
    found = f"{40 - different} of 40 validation images are copies of training images; add"
    assert seen.source.exclude == [] and found in text


def test_copies_that_no_config_can_list_are_to_be_removed(tmp_path, monkeypatch):
    write_copies(tmp_path, different=2)
    assert len(looked(tmp_path)[0].source.exclude) == 38
    monkeypatch.setattr(own_images, "MOST_EXCLUDED", 37)
    seen, text = looked(tmp_path)
    assert seen.source.exclude == [] and "38 of 40 validation images are copies of training images; remove" in text
    images = [
        {"split": split, "filepath": f"{split}/a", "filename": f"{number:02d}.png", "sentences": [{"raw": "a cup"}]}
        for split in ("train", "val")
        for number in range(1, 40, 2)
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": images})
    monkeypatch.undo()
    seen = own_images.look(ImageSourceConfig(name="mine", path=str(tmp_path), kind="coco"), size=32)
    assert seen.source.exclude == [] and "19 of 20 validation images are copies" in "".join(seen.lines)


def test_a_copy_whose_name_is_not_utf8_is_left_out(tmp_path):
    write_copies(tmp_path, different=40)
    for split in ("train", "val"):
        for suffix, content in ((b".png", encoded(200)), (b".txt", b"a cup")):
            Path(os.fsdecode(os.fsencode(tmp_path / split) + b"/caf\xe9" + suffix)).write_bytes(content)
    seen, _ = looked(tmp_path)
    assert seen.source.exclude == ["val/caf\ufffd.png"]
    assert len(open_image_source(seen.source, split="val", size=16, seed=0)) == 40


def test_images_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / f"images/{number}.png").write_bytes(b"no image")
        (tmp_path / f"images/{number}.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"source 'mine' .*: none of .* images can be read; convert them"):
        looked(tmp_path / "images")


@pytest.mark.parametrize(
    ("side", "minutes", "size"), [(20, 60, 32), (64, 15, 64), (600, 60, 64), (600, 240, 128), (64, 240, 64)]
)
def test_the_size_follows_the_images_and_the_time(side, minutes, size):
    seen = own_images.Look(ImageSourceConfig(name="mine", path="x"), 20, side, [])
    settings = own_images._sized([seen], minutes=minutes, processes=1)
    assert settings["stage1"]["model"]["image_size"] == size
    assert [settings[phase]["loop"]["batch_size"] for phase in own_images.SHARES] == [20, 16, 20]
    of_three = own_images._sized([seen], minutes=minutes, processes=3)
    assert [of_three[phase]["loop"]["batch_size"] for phase in own_images.SHARES] == [18, 15, 18]
    assert settings["codes"]["images"] == settings["eval"]["images"] == [{"name": "mine", "path": "x"}]


@pytest.mark.parametrize("steps", [20, 123, 5000])
def test_every_phase_takes_what_is_written(steps, tmp_path):
    seen = own_images.Look(ImageSourceConfig(name="mine", path="it's ${b}"), 3000, 64, [])
    settings = own_images._sized([seen], minutes=60, processes=1)
    for phase in own_images.SHARES:
        settings[phase] = own_images._merged(settings[phase], own_images._schedule(phase, steps=steps))
    own_images._write_config(tmp_path / "own.yaml", settings, base=BASE)
    read = {phase: load_config(PHASES[phase], path=tmp_path / "own.yaml", section=phase) for phase in PHASES}
    for phase in own_images.SHARES:
        config = read[phase]
        assert config.loop.max_steps == steps and config.optimizer.warmup_steps < steps
        assert config.optimizer.lr == load_config(CONFIGS[phase], path=BASE, section=phase).optimizer.lr
    assert read["stage1"].data.sources == read["codes"].images == read["eval"].images == [seen.source]
    stage1, um3 = read["stage1"].model, read["um3"]
    assert stage1.bits == um3.vocabulary.subtokens * um3.vocabulary.bits_per_subtoken
    patches = (stage1.image_size // stage1.patch_size) ** 2
    assert um3.data.seq_len == own_images.CAPTION_TOKENS + um3.vocabulary.subtokens * patches
    assert um3.model.max_position_embeddings >= um3.data.seq_len and um3.data.mix.calm_down_steps < steps


def test_settings_that_exist_are_kept(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/own_images.yaml").write_text("mine")
    own_images.main(arguments(tmp_path / "images"))
    assert "delete it to choose again" in capsys.readouterr().out
    assert (tmp_path / "run/own_images.yaml").read_text() == "mine"


def test_minutes_must_be_above_0(tmp_path):
    with pytest.raises(UserError, match=r"--minutes 0 .make: MINUTES=. is not a number above 0"):
        own_images.main(arguments(tmp_path / "images", minutes=0))


TINY = ["loop.num_threads=1", "model.hidden_size=16", "model.num_heads=2", "model.num_layers=1", "um3.model.head_dim=8"]
TINY += ["model.intermediate_size=16", "text.hidden_size=16", "text.num_layers=1", "text.num_heads=2"]
TINY += ["um3.model.num_kv_heads=2", "text.intermediate_size=16", "text_validation.num_sequences=4"]


@pytest.mark.slow
def test_a_rehearsal_measures_every_phase_and_leaves_the_settings_alone(tmp_path, capsys):
    write_folder(tmp_path / "images")
    own_images.main(arguments(tmp_path / "images", *TINY, "stage2.loop.max_steps=7"))
    table = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cells[0].strip() for cells in table] == ["phase", *own_images.SHARES]
    path = tmp_path / "run/own_images.yaml"
    assert [child.name for child in path.parent.iterdir() if child.suffix] == [path.name]
    steps = {phase: load_config(CONFIGS[phase], path=path, section=phase).loop.max_steps for phase in own_images.SHARES}
    assert all(own_images.FEWEST_STEPS <= count <= 400 * 40 for count in steps.values())
    assert [int(cells[1].replace(",", "")) for cells in table[1:]] == [steps["stage1"], 7, steps["um3"]]
    (source,) = load_config(CONFIGS["stage1"], path=path, section="stage1").data.sources
    assert dataclasses.asdict(source)["path"] == str(tmp_path / "images")


def test_a_phase_that_fails_is_one_line_and_nothing_is_written(tmp_path):
    write_folder(tmp_path / "images")
    with pytest.raises(UserError, match=r"^stage1: .*/nowhere"):
        own_images.main(arguments(tmp_path / "images", "text.tokenizer=/nowhere"))
    assert not [*(tmp_path / "run").glob("[!.]*")]
