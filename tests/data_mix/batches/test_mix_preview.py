"""`make mix-preview`: the shares of a config, and the figure of every shipped one."""

from pathlib import Path

import pytest
from PIL import Image

from data_mix.batches.config import DataConfig
from data_mix.batches.mix_preview import main, source_shares
from data_mix.sources.text import TextSourceConfig
from tests.helpers.code_shards import write_codes
from um3.core.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"


def test_shares_come_from_the_weights_or_from_the_codes(tmp_path: Path) -> None:
    for source, num_images in (("photo", 3), ("film", 1)):
        write_codes(tmp_path, source=source, num_images=num_images)
    config = DataConfig(str(tmp_path), texts=[TextSourceConfig(name="a", weight=3), TextSourceConfig(name="b")])
    images = {"i2t/film": 0.25, "i2t/photo": 0.75, "t2i/film": 0.25, "t2i/photo": 0.75}
    assert source_shares(config) == pytest.approx({"text/a": 0.75, "text/b": 0.25} | images)
    config.image_weights = {"film": 1.0}
    assert source_shares(config)["t2i/film"] == 1.0
    config.codes, config.image_weights = "absent", {}
    assert source_shares(config)["i2t/images"] == 1.0


@pytest.mark.parametrize("name", ["demo", "um3_llama3_1b"])
def test_shipped_configs_are_drawn(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--out", str(tmp_path / "mix.png")]
    main([*arguments, "loop.max_steps=50", "optimizer.lr=1"])
    assert Image.open(tmp_path / "mix.png").size == (960, 672)
    assert "mix of 50 steps of" in capsys.readouterr().out


def test_a_config_without_a_length_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("um3: {loop: {batch_size: 8}}\n")
    with pytest.raises(UserError, match=r"loop\.max_steps to None; pass loop\.max_steps"):
        main(["--config", str(tmp_path / "short.yaml"), "--out", str(tmp_path / "mix.png")])
