"""docs/data_formats.md: each example is written to disk as the page shows it, and its source reads all of it."""

import logging
import re
from pathlib import Path

import pytest
import yaml

from data_mix.conversations import open_conversations
from data_mix.sources.config import ConversationSourceConfig, ImageSourceConfig, TextSourceConfig
from data_mix.sources.image_sources import open_image_source
from data_mix.sources.text import open_text_source
from tests.helpers.image_files import encoded, write_tar
from tests.helpers.processes import ROOT
from um3.core.config import build_config

PAGE = (ROOT / "docs/data_formats.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LISTS = {"images": ImageSourceConfig, "texts": TextSourceConfig, "conversations": ConversationSourceConfig}
CONFIGS = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
SOURCES = [(kind, entry) for config in CONFIGS for kind, entries in config.items() for entry in entries]
SAMPLES = {"photos": 2, "shots": 2, "squares": 1, "shards": 2, "scans": 1, "coco": 1, "prose": 1, "web": 2, "chats": 1}


def write_files(listing: str) -> None:
    """The files of a listing: a path, or SHARD: MEMBER, and its text; indented lines continue the text."""
    texts, shards = dict[str, list[str]](), dict[str, dict[str, bytes]]()
    for line in listing.splitlines():
        if line[:1].strip():
            name, _, text = re.sub(r"(\.\w+) {2,}", r"\1\t", line, count=1).partition("\t")
            texts[name] = [text]
        else:
            texts[name].append(line.strip())
    for name, lines in texts.items():
        data = "\n".join(lines).encode() if any(lines) else encoded(9, "JPEG")
        shard, separator, member = name.partition(": ")
        if separator:
            shards.setdefault(shard, {})[member] = data
        Path(shard).parent.mkdir(parents=True, exist_ok=True)
        Path(shard).write_bytes(data)
    for shard, members in shards.items():
        write_tar(Path(shard), members)


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The current folder holds the files of all examples."""
    monkeypatch.chdir(tmp_path)
    for language, text in BLOCKS:
        if language == "text":
            write_files(text)
        elif language == "python":
            exec(compile(text, "data_formats.md", "exec"), {})


def test_every_example_is_read_whole(examples, caplog):
    assert [entry["name"] for _, entry in SOURCES] == list(SAMPLES)
    for kind, entry in SOURCES:
        config = build_config(LISTS[kind], [("the page", entry)], origin="the page")
        if kind == "images":
            source = open_image_source(config, split="train", size=8, seed=0)
            assert all(sample.captions for sample in source)
        elif kind == "texts":
            source = open_text_source(config, split="train")
            assert all(source)
        else:
            source = open_conversations(config, split="train", check_images=True)
            assert source[0].turns[0].answer == "A cat."
        assert len(source) == SAMPLES[entry["name"]], entry
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # nothing is skipped


def test_every_kind_of_source_is_on_the_page():
    kinds = {"parquet", "webdataset", "coco", "folder", "hub", "txt", "jsonl"}
    assert kinds <= set(re.findall(r"[a-z]+", PAGE.lower()))
