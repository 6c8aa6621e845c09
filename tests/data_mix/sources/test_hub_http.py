"""Hugging Face data sets over HTTP, by the real client: only the needed files are fetched, through failures."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_mix.codes.encode import main
from data_mix.codes.shards import open_code_sources
from tests.data_mix.codes.test_encode import shard_bytes
from tests.helpers.hub import LocalHub
from tests.helpers.image_files import write_hub_images
from tests.helpers.tiny_qlip import make_qlip
from um3.core.files import read_json


def client(hub: LocalHub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder, with `hub` as the only hub."""
    (folder / "empty").mkdir(exist_ok=True)
    command = [sys.executable, *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240}
    return subprocess.run(command, cwd=folder / "empty", env=hub.environment(folder), **options)


READ = """
from data_mix.sources.text import TextSourceConfig, open_text_source
config = TextSourceConfig(name="h", path="own/words@v2", stream=STREAM, val_fraction=0.0)
source = open_text_source(config, split="train")
print(len(source))
for index in range(45_000):
    text = source[index]
print(text)
"""


@pytest.mark.slow
def test_only_the_needed_files_are_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "own" / "words"
    folder.mkdir(parents=True)
    for number in range(3):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{number}-{row} {row**9 % 9973}"}) + "\n" for row in range(40_000))
    with LocalHub(tmp_path / "hub") as hub:
        for stream, length in ((50_000, "50000"), (0, "120000")):
            hub.fetched.clear()
            lines = client(hub, tmp_path, "-c", READ.replace("STREAM", str(stream))).stdout.splitlines()
            assert lines[0] == length and lines[1].startswith("1-4999 ")
            assert "v2" in hub.revisions and ("2.jsonl.gz" in hub.fetched) == (stream == 0)


@pytest.mark.slow
def test_codes_of_a_streamed_set_resume_after_a_network_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hub" / "own" / "images"
    folder.mkdir(parents=True)
    for number in range(3):
        write_hub_images(folder / f"train-{number:05d}-of-00003.parquet", range(number * 10, number * 10 + 10))
    qlip, codes, config = make_qlip(tmp_path / "qlip"), tmp_path / "codes", tmp_path / "codes.yaml"
    config.write_text(
        f"codes: {{visual_tokenizer: {qlip}, output_dir: {codes}, samples_per_shard: 4, batch_size: 2, "
        "images: [{name: i, path: own/images, stream: 25, val_fraction: 0.1}]}\n"
    )
    with LocalHub(tmp_path / "hub") as hub:
        encode = ("-m", "data_mix", "encode", "--config", str(config))
        hub.ends_at = "train-00001-of-00003.parquet"
        stopped = client(hub, tmp_path, *encode)
        assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
        assert "cannot read" in stopped.stderr and "run the same command again to resume" in stopped.stderr
        finished = shard_bytes(codes)
        assert [Path(name).stem for name in finished] == ["train-i-00000"], "rows 3 to 6; the next shard needs file 1"
        hub.ends_at, hub.has_ended = "", False
        assert client(hub, tmp_path, *encode).returncode == 0
        assert shard_bytes(codes).items() >= finished.items()
        summary = read_json(codes / "summary.json")["splits"]
        assert (summary["train"]["i"]["images"], summary["val"]["i"]["images"]) == (25, 3)
        (codes / "summary.json").unlink()
        hub.commit = "d" * 40
        assert "8 shards of another" in client(hub, tmp_path, *encode).stderr, "a commit makes another data set"
    shards = open_code_sources(codes, split="train")["i"]
    assert [shards[index].key for index in range(25)] == [f"own/images/train#{row}" for row in range(3, 28)]
    assert [shards[index].captions for index in range(25)] == [(f"number {row}",) for row in range(3, 28)]
    main(["--config", str(config)])
    assert "up to date" in capsys.readouterr().out, "without a hub"
