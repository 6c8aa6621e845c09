"""Validation of a tokenizer while it trains: what it measures, and that it changes nothing."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_mix.sources.image_sources import ImageSourceConfig
from eval.metrics.reconstruction import psnr
from eval.tasks.validation_data import validation_images
from tests.train.conftest import logged, losses, train_here
from tokenizer import load
from tokenizer.images import QLIPImages, decode_codes, encode_images

EVERY_TWO = ["validation.every_steps=2", "validation.num_images=5"]
ZERO = [pytest.param(f"engine.zero_stage={stage} optimizer.kind=adamw", marks=pytest.mark.slow) for stage in (0, 3)]


@pytest.mark.parametrize("phase", ["stage1", "stage2"])
@pytest.mark.parametrize("override", ["loop.micro_batch_size=0", *ZERO])
def test_it_measures_the_model_and_changes_nothing(phase, override, made, tmp_path):
    measured = train_here(phase, made, tmp_path / phase, *EVERY_TWO, "loop.loggers=[tensorboard]", *override.split())
    assert measured == losses(made / phase) if override.startswith("loop") else True
    values = logged(tmp_path / phase, "validation/psnr/scenes")
    assert values[::2] == [None, None] and None not in values[1::2]
    data = validation_images(ImageSourceConfig(name="scenes", length=200), num_images=5, size=32, seed=0)
    tokenizer = QLIPImages(*load(tmp_path / phase / "model"))
    rebuilt = decode_codes(tokenizer, encode_images(tokenizer, data.images))
    assert values[-1] == pytest.approx(float(psnr(rebuilt, originals_BHWC=data.images).mean()), abs=0.01)
    events = EventAccumulator(str(tmp_path / phase / "tensorboard")).Reload()
    assert [image.step for image in events.Images("validation/scenes")] == [2, 4]


def test_stage_1_measures_how_captions_find_their_images(made, tmp_path):
    train_here("stage1", made, tmp_path / "stage1", *EVERY_TWO)
    shares = logged(tmp_path / "stage1", "validation/accuracy/scenes")[1::2]
    assert all(share in np.linspace(0, 1, 6, dtype=np.float32) for share in shares)
    assert min(logged(tmp_path / "stage1", "validation/contrastive/scenes")[1::2]) > 0


def test_a_source_without_validation_images_trains_all_the_same(made, tmp_path, capfd):
    few = "{name: few, kind: scenes, length: 8, val_fraction: 0}"
    sources = f"data.sources=[{{name: scenes, kind: scenes, length: 200}}, {few}]"
    train_here("stage1", made, tmp_path / "stage1", *EVERY_TWO, sources)
    assert "'few' is not validated" in capfd.readouterr().err
    assert logged(tmp_path / "stage1", "validation/psnr/scenes")[1]
