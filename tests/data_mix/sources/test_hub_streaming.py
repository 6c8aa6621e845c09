"""Hugging Face data sets, downloaded or streamed: each file is fetched once, through failures and restarts."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_mix.batches import token_stream
from data_mix.batches.token_stream import TokenStream
from data_mix.order import each_index
from data_mix.samples import BadSample, Split
from data_mix.sources.hub_streaming import HubFiles, HubStream
from data_mix.sources.image_sources import ImageSourceConfig, TableImages, open_image_source
from data_mix.sources.text import TableDocuments, TextSourceConfig, open_text_source
from tests.data_mix.batches.test_mix import IDS, TOKENIZER
from tests.data_mix.sources.test_sources import numbers_of
from tests.helpers.image_files import encoded, write_hub_images, write_shards
from train.recipes.tokenizer_setup import ImageDataConfig
from um3.core.errors import UserError
from um3.core.files import read_json


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the data set own/words; it is read below the working folder like a data set of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "own" / "words"
    folder.mkdir(parents=True)
    return folder


def write_words(folder: Path, *, files: int = 3, part: str = "train", rows: int = 10) -> None:
    for number in range(files):
        texts = [f"{part} document {number * rows + row}" for row in range(rows)]
        pq.write_table(pa.table({"text": texts}), folder / f"{part}-{number:05d}-of-{files:05d}.parquet")


def documents(stream: int, *, split: Split = "train", **options: Any) -> TableDocuments:
    options = {"kind": "hub", "path": "own/words", "val_fraction": 0.0, **options}
    source = open_text_source(TextSourceConfig(name="h", stream=stream, **options), split=split)
    assert isinstance(source, TableDocuments)
    return source


def read(source: TableDocuments, indices: Sequence[int] | None = None) -> list[str]:
    """The texts, or the reason of one that cannot be read."""
    texts = []
    for index in range(len(source)) if indices is None else indices:
        try:
            texts.append(source[index])
        except BadSample as error:
            texts.append(error.reason)
    return texts


def numbered(first: int, end: int, *, part: str = "train") -> list[str]:
    return [f"{part} document {number}" for number in range(first, end)]


def resume(source: TableDocuments, other: TableDocuments) -> bool:
    """Whether `source` takes over what `other` knows of the files."""
    return bool(source.rows.resume(json.loads(json.dumps(other.rows.state()))))


def let_fail(monkeypatch: pytest.MonkeyPatch, *, fails_at: int, num_failures: int) -> list[int]:
    """Let file 1 fail at its row `fails_at` the first `num_failures` times; return the list of the opened files."""
    opened, rows = list[int](), HubFiles.rows

    def failing_rows(files: HubFiles, file: int) -> Iterator[dict[str, Any]]:
        opened.append(file)
        for place, row in enumerate(rows(files, file)):
            if file == 1 and place == fails_at and opened.count(1) <= num_failures:
                raise ConnectionError("cut")
            yield row

    monkeypatch.setattr(HubFiles, "rows", failing_rows)
    return opened


def test_a_downloaded_set(words: Path) -> None:
    write_words(words)
    train, val = read(documents(0, val_fraction=0.1)), read(documents(0, val_fraction=0.1, split="val"))
    assert sorted(train + val) == sorted(numbered(0, 30)) and 0 < len(val) < 10, "divided by hash"
    for part in ("validation", "test"):
        write_words(words, files=1, part=part)
    assert read(documents(0, split="val")) == numbered(0, 10, part="validation")
    assert read(documents(0)) == numbered(0, 30)


def test_val_is_the_first_rows_and_train_the_next(words: Path) -> None:
    write_words(words)
    assert read(documents(20, val_fraction=0.1, split="val")) == numbered(0, 2)
    assert read(documents(20, val_fraction=0.1)) == numbered(2, 22)
    assert list(each_index(documents(20), seed=3, name="x")) == list(range(20)), "a stream is read in its own order"
    assert list(each_index(documents(0), seed=3, name="x")) != list(range(30))


def test_a_val_split_of_the_data_set_is_used(words: Path) -> None:
    write_words(words)
    write_words(words, files=1, part="validation")
    assert read(documents(20, val_fraction=0.1)) == numbered(0, 20)
    val = documents(20, val_fraction=0.1, split="val")
    assert read(val) == numbered(0, 2, part="validation") and val.rows.key(1) == "own/words/validation#1"
    with pytest.raises(UserError, match="val split; raise val_fraction"):
        documents(20, split="val")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "csv", "txt"])
def test_kinds_of_files(words: Path, kind: str) -> None:
    """DCLM-baseline is .jsonl.zst on the hub."""
    lines = numbered(0, 5)
    if kind.startswith("jsonl"):
        lines = [json.dumps({"text": line, "url": "x"}) for line in lines]
    with pa.output_stream(str(words / f"a.{kind}"), compression="detect") as file:
        file.write("\n".join(["text"] * (kind == "csv") + lines).encode())
    assert read(documents(5)) == numbered(0, 5)


def test_rows_past_the_end_are_counted_and_reported_once(words: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_words(words, files=2)
    source = documents(30, val_fraction=0.1)
    assert read(source) == numbered(3, 20) + ["past the end"] * 13
    assert caplog.text.count("ends after 20 rows, 13 fewer than stream=") == 1
    texts = [f"train document {number}" for number in (3, 19, 18)]
    assert read(source, [29, 0, 16, 15, 17]) == ["past the end", *texts, "past the end"]


def test_a_damaged_file_is_skipped_and_stays_skipped(words: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows before the damage are used; the rows of the next files keep their numbers in a resumed process."""
    for number in range(3):
        texts = [f"{number}-{row} " + "words " * 50 for row in range(20)]
        pq.write_table(pa.table({"text": texts}), words / f"{number}.parquet", row_group_size=5, compression="zstd")
    data = bytearray((words / "1.parquet").read_bytes())
    third = pq.read_metadata(words / "1.parquet").row_group(2).column(0).data_page_offset
    data[third : third + 60] = bytes(60)
    (words / "1.parquet").write_bytes(data)
    source = documents(60)
    texts = [text.split()[0] for text in read(source)]
    kept = sum(text.startswith("1-") for text in texts)  # 10 rows are whole; the reader may fail while it reads ahead
    assert 0 < kept <= 10 and texts[:20] == [f"0-{row}" for row in range(20)]
    assert texts[20:] == [f"1-{i}" for i in range(kept)] + [f"2-{i}" for i in range(20)] + ["past"] * (20 - kept)
    assert caplog.text.count(f"from its row {kept} on") == 1
    with pytest.raises(UserError, match=r"1\.parquet.*set skip_bad_files=true"):
        read(documents(60, skip_bad_files=False))
    later = documents(60)
    assert resume(later, source) and [file.name for file in later.bad_files.reasons] == ["1.parquet"]
    assert read(later, [20 + kept + 3])[0].startswith("2-3 ")
    (words / "1.parquet").write_bytes(b"nothing")
    assert not resume(documents(60), source), "another file, so another data set"
    again = [text.split()[0] for text in read(documents(60))]
    assert again[:40] == [f"{number}-{row}" for number in (0, 2) for row in range(20)]


def test_rows_that_a_file_no_longer_gives_keep_their_numbers(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_words(words)
    source, later = documents(30), documents(30)
    read(source)
    assert resume(later, source)
    opened = let_fail(monkeypatch, fails_at=4, num_failures=1000)
    assert read(later) == numbered(0, 14) + ["unreadable file"] * 6 + numbered(20, 30)
    assert len(opened) < 20, "the file is not read again for each of its rows"


def test_a_short_failure_loses_nothing(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_words(words)
    source = documents(30)
    let_fail(monkeypatch, fails_at=0, num_failures=4)
    assert read(source) == numbered(0, 30) and not source.bad_files.reasons


def test_damaged_and_empty_files_side_by_side(words: Path) -> None:
    write_words(words, files=5)
    for number in (1, 2):
        (words / f"train-{number:05d}-of-00005.parquet").write_bytes(b"PAR1 nothing PAR1")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), words / "train-00003-of-00005.parquet")
    source = documents(20)
    assert read(source) == numbered(0, 10) + numbered(40, 50)
    assert len(source.bad_files.reasons) == 2, "an empty file is not damaged"


def texts_of(stream: TokenStream) -> str:
    return str(TOKENIZER.decode(torch.from_numpy(stream.tokens[:].astype("int64")), skip_special_tokens=True))


def test_tokens_of_a_changed_set_are_made_again(
    words: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_stream, "DOCUMENTS_AT_ONCE", 5)
    monkeypatch.setattr(token_stream, "SAVE_EVERY_S", -1.0)
    write_words(words)
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "ids": IDS, "seq_len": 9, "cache": words.parent / "run"}
    value = HubStream.value

    def interrupted_at_17(stream: HubStream, index: int, *, column: str) -> Any:
        if index == 17:
            raise KeyboardInterrupt
        return value(stream, index, column=column)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(HubStream, "value", interrupted_at_17)
        TokenStream(documents(25), **options)
    assert read_json(next((words.parent / "run").glob("*.json")))["documents"] == 15
    (words / "train-00000-of-00003.parquet").unlink()
    write_words(words, files=1, rows=5)
    text = texts_of(TokenStream(documents(25), **options))
    assert "changed" in caplog.text
    assert [int(number) for number in re.findall(r"train document (\d+)", text)] == [*range(5), *range(10, 30)]


def test_tokens_end_with_the_set(words: Path) -> None:
    write_words(words)
    cache = words.parent / "run"
    stream = TokenStream(documents(10**9), tokenizer=TOKENIZER, ids=IDS, seq_len=9, cache=cache)
    assert texts_of(stream).count("train document") == 30
    assert {file.suffix for file in cache.iterdir()} <= {".bin", ".json"}


def test_without_any_readable_file_the_error_is_one_line(words: Path) -> None:
    write_words(words, files=2)
    source = documents(20)
    assert source[0] == "train document 0"
    for file in words.iterdir():
        file.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"cannot read .*00001.* at its row 0: .*run the same command"):
        read(source)


def images(stream: int, *, split: Split = "train", **options: Any) -> Any:
    options = {"kind": "hub", "path": "own/words", "val_fraction": 0.0, **options}
    return open_image_source(ImageSourceConfig(name="i", stream=stream, **options), split=split, size=12, seed=0)


def test_images(words: Path) -> None:
    write_hub_images(words / "train.parquet", range(20))
    train, val = (images(10, split=split, val_fraction=0.2) for split in ("train", "val"))
    assert isinstance(train, TableImages) and train[0].key == "own/words/train#2"
    assert numbers_of(val) == [0, 1] and numbers_of(train) == list(range(2, 12))
    train, val = (images(0, split=split, val_fraction=0.2) for split in ("train", "val"))
    assert sorted(numbers_of(train) + numbers_of(val)) == list(range(20)) and len(val) > 0
    assert train[0].key.startswith("own/words/train#")


def test_excluded_images_are_in_neither_split_of_a_set_with_its_own_splits(words: Path) -> None:
    write_hub_images(words / "train.parquet", range(0, 6))
    write_hub_images(words / "validation.parquet", range(4, 8))
    excluded = [f"own/words/validation#{row}" for row in range(4)]
    train, val = (images(0, split=split, exclude=excluded[:2]) for split in ("train", "val"))
    assert numbers_of(train) == list(range(6)) and numbers_of(val) == [6, 7]
    with pytest.raises(UserError, match="exclude leaves no sample of the val split"):
        images(0, split="val", exclude=excluded)


def test_images_of_tars(words: Path) -> None:
    write_shards(words)
    streamed, local = images(4), images(0, kind="auto")
    assert all(np.array_equal(streamed[index].image_HWC, local[index].image_HWC) for index in range(4))


@pytest.mark.parametrize("stream", [0, 4])
def test_images_that_are_files(words: Path, stream: int) -> None:
    folder = words / "train"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(number))
    rows = [{"file_name": f"{number}.png", "text": f"number {number}"} for number in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert numbers_of(images(stream)) == list(range(stream or 6))
    (folder / "1.png").unlink()
    with pytest.raises(BadSample, match=r"cannot be read|no image"):
        images(stream)[1]


@pytest.mark.parametrize("stream", [0, 2])
def test_paths_in_a_table_are_not_followed(words: Path, stream: int) -> None:
    """The author of the table could name any file of this machine."""
    secret = words.parent / "secret.png"
    secret.write_bytes(encoded(0))
    values = [{"bytes": encoded(1), "path": None}, {"bytes": None, "path": str(secret)}]
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    table = pa.Table.from_pylist([{"image": value, "caption": "number 1"} for value in values], schema=schema)
    pq.write_table(table, words / "train.parquet")
    source = images(stream)
    assert source[0].captions == ("number 1",)
    with pytest.raises(BadSample, match="no image"):
        source[1]


def test_mistakes_are_one_line(words: Path) -> None:
    write_words(words)
    for path, stream, message in (
        (str(words), 5, "stream=5 is for kind=hub, not kind=parquet"),
        ("own/absent", 5, r"own/absent\): no file .* no Hugging Face data set could be opened"),
        ("own/absent", 0, r"own/absent\): no file .* no Hugging Face data set could be opened"),
        ("own/words:german", 5, "BuilderConfig 'german' not found"),
    ):
        with pytest.raises(UserError, match=message):
            documents(stream, path=path, kind="hub" if path.startswith("own") else "auto")[0]
    with pytest.raises(UserError, match=r"no column 'body' \(has: text\); set field"):
        documents(5, field="body")[0]
    with pytest.raises(ValueError, match=r"source 'i'.*stream=0"):
        ImageDataConfig(sources=[ImageSourceConfig(name="i", path="own/words", stream=5)])
