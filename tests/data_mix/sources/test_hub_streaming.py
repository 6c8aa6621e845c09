"""Sets of the hub, downloaded or read as they come: each file fetched once, through failures and restarts."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from data_mix.codes.encode import main
from data_mix.codes.shards import CodeShards
from data_mix.order import each_index
from data_mix.samples import BadSample, Split
from data_mix.sources.hub_streaming import StreamedPart
from data_mix.sources.image_folder import TableImages
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.text import TableDocuments, TextSourceConfig, open_text_source
from tests.data_mix.batches.test_mix import IDS, TOKENIZER
from tests.data_mix.codes.test_encode import make_qlip, shard_bytes
from tests.data_mix.sources.test_sources import encoded, numbers_of, write_shards
from tests.helpers.hub import LocalHub, local_hub
from train.config import ImageDataConfig
from um3.core.errors import UserError
from um3.core.files import read_json

ROWS_PER_FILE = 10


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, where owner/name is found like a set of the hub; caches are below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "own" / "words").mkdir(parents=True)
    return tmp_path


def write_words(folder: Path, *, files: int = 3, part: str = "train", rows: int = ROWS_PER_FILE) -> None:
    for number in range(files):
        texts = [f"{part} document {number * rows + row}" for row in range(rows)]
        pq.write_table(pa.table({"text": texts}), folder / f"{part}-{number:05d}-of-{files:05d}.parquet")


def documents(stream: int, *, split: Split = "train", val_fraction: float = 0.1, **settings: str) -> TableDocuments:
    config = TextSourceConfig(name="h", kind="hub", path="own/words", stream=stream, val_fraction=val_fraction)
    source = open_text_source(TextSourceConfig(**(vars(config) | settings)), split=split)
    assert isinstance(source, TableDocuments)
    return source


def read(source: TableDocuments, indices: Sequence[int] | None = None) -> list[str]:
    """What can be read, a reason where it cannot."""
    texts = []
    for index in range(len(source)) if indices is None else indices:
        try:
            texts.append(source[index])
        except BadSample as error:
            texts.append(error.reason)
    return texts


def numbered(first: int, end: int, *, part: str = "train") -> list[str]:
    return [f"{part} document {number}" for number in range(first, end)]


def test_a_downloaded_set(here: Path) -> None:
    write_words(here / "own" / "words")
    train, val = read(documents(0)), read(documents(0, split="val"))
    assert sorted(train + val) == sorted(numbered(0, 30)) and 0 < len(val) < 10, "divided by hash"
    for part in ("validation", "test"):
        write_words(here / "own" / "words", files=1, part=part)
    assert read(documents(0, split="val")) == numbered(0, 10, part="validation")
    assert read(documents(0)) == numbered(0, 30)


def test_val_is_the_first_rows_and_train_the_next(here: Path) -> None:
    write_words(here / "own" / "words")
    assert read(documents(20, split="val")) == numbered(0, 2)
    assert read(documents(20)) == numbered(2, 22)
    assert read(documents(0, val_fraction=0.0))[:22] == numbered(0, 22), "the order of the set that is downloaded"


def test_a_val_part_of_its_own_is_taken(here: Path) -> None:
    write_words(here / "own" / "words")
    write_words(here / "own" / "words", files=1, part="validation")
    assert read(documents(20)) == numbered(0, 20)
    assert read(documents(20, split="val")) == numbered(0, 2, part="validation")
    assert documents(20, split="val")._part.key(1) == "own/words/validation#1"
    with pytest.raises(UserError, match="nothing for the val split; raise val_fraction"):
        documents(20, split="val", val_fraction=0.0)


def test_rows_may_be_asked_for_again(here: Path) -> None:
    write_words(here / "own" / "words")
    source = documents(25, val_fraction=0.0)
    for indices in ([3], [3, 4], [19, 20], [0, 24], [12, 11], list(range(25))):
        assert read(source, indices) == [f"train document {index}" for index in indices]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_compressed_lines(here: Path, kind: str) -> None:
    """DCLM-baseline is .jsonl.zst on the hub."""
    for number in range(2):
        with pa.output_stream(str(here / "own" / "words" / f"{number}.{kind}"), compression="detect") as file:
            file.write("\n".join(json.dumps({"text": f"{number}-{row}", "url": "x"}) for row in range(3)).encode())
    assert read(documents(6, val_fraction=0.0)) == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]


def test_past_the_end_is_counted_and_told_once(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_words(here / "own" / "words", files=2)
    assert read(documents(30)) == numbered(3, 20) + ["past the end"] * 13
    assert caplog.text.count("ends after 20 rows, 13 fewer than stream asks for") == 1
    assert read(documents(30), [29, 0, 16, 17]) == ["past the end", *numbered(3, 4), *numbered(19, 20), "past the end"]


def test_a_damaged_file_is_set_aside_and_stays_so(
    here: Path, short_waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    """What it gave before is used; the rows after it have the same numbers ever after."""
    folder = here / "own" / "words"
    for number in range(3):
        texts = [f"{number}-{row} " + "words " * 50 for row in range(20)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=5, compression="zstd")
    data = bytearray((folder / "1.parquet").read_bytes())
    third = pq.read_metadata(folder / "1.parquet").row_group(2).column(0).data_page_offset
    data[third : third + 60] = bytes(60)
    (folder / "1.parquet").write_bytes(data)
    source = documents(60, val_fraction=0.0)
    texts = [text.split()[0] for text in read(source)]
    kept = sum(text.startswith("1-") for text in texts)  # 10 rows are sound; the reader may fail while it reads ahead
    assert 0 < kept <= 10 and texts[:20] == [f"0-{row}" for row in range(20)]
    assert texts[20:] == [f"1-{i}" for i in range(kept)] + [f"2-{i}" for i in range(20)] + ["past"] * (20 - kept)
    assert caplog.text.count(f"set aside from its row {kept} on") == 1
    later = documents(60, val_fraction=0.0)
    assert goes_on(later, source) and [file.name for file in later.set_aside.reasons] == ["1.parquet"]
    assert read(later, [20 + kept + 3])[0].startswith("2-3 ")
    (folder / "1.parquet").write_bytes(b"nothing")
    assert not goes_on(documents(60, val_fraction=0.0), source), "another file, so another set"
    again = [text.split()[0] for text in read(documents(60, val_fraction=0.0))]
    assert again[:40] == [f"{number}-{row}" for number in (0, 2) for row in range(20)]


def goes_on(later: TableDocuments, source: TableDocuments) -> bool:
    """Whether what one knew of the files holds for the other."""
    assert later.streamed is not None and source.streamed is not None
    return later.streamed.go_on(json.loads(json.dumps(source.streamed.state())))


def test_rows_that_a_file_does_not_give_any_more(here: Path, short_waits: None) -> None:
    """They keep their numbers, and those behind them are not read anew for each of them."""
    write_words(here / "own" / "words")
    source, later = documents(30, val_fraction=0.0), documents(30, val_fraction=0.0)
    read(source)
    assert goes_on(later, source) and later.streamed is not None
    opened: list[int] = []
    whole = later.streamed._files

    class Failing:
        """File 1 gives four rows."""

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def rows(self, number: int) -> Iterator[dict[str, Any]]:
            opened.append(number)
            for place, row in enumerate(whole.rows(number)):
                if number == 1 and place == 4:
                    raise ConnectionError("cut")
                yield row

    later.streamed.__dict__["_files"] = Failing()
    assert read(later) == numbered(0, 14) + ["shard set aside"] * 6 + numbered(20, 30)
    assert len(opened) < 20


def test_neighbours_that_are_damaged_or_empty(here: Path, short_waits: None) -> None:
    folder = here / "own" / "words"
    write_words(folder, files=5)
    for number in (1, 2):
        (folder / f"train-{number:05d}-of-00005.parquet").write_bytes(b"PAR1 nothing PAR1")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "train-00003-of-00005.parquet")
    source = documents(20, val_fraction=0.0)
    assert read(source) == numbered(0, 10) + numbered(40, 50)
    assert len(source.set_aside.reasons) == 2, "an empty file is no damaged one"


def test_trouble_that_passes_costs_nothing(here: Path, short_waits: None) -> None:
    write_words(here / "own" / "words")
    source = documents(30, val_fraction=0.0)
    assert source.streamed is not None
    whole, tries = source.streamed._files, []

    class Outage:
        """Nothing can be read the first four times that file 1 is asked for."""

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def rows(self, number: int) -> Any:
            tries.append(number)
            if number == 1 and tries.count(1) <= 4:
                raise ConnectionError("cut")
            return whole.rows(number)

    source.streamed.__dict__["_files"] = Outage()
    assert read(source) == numbered(0, 30) and not source.set_aside.reasons


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_other_kinds_of_files(here: Path, kind: str) -> None:
    lines = numbered(0, 5)
    (here / "own" / "words" / f"a.{kind}").write_text("\n".join(["text"] * (kind == "csv") + lines))
    assert read(documents(5, val_fraction=0.0)) == lines


def test_what_takes_any_order_reads_a_streamed_set_in_its_own(here: Path) -> None:
    write_words(here / "own" / "words")
    assert list(each_index(documents(20), seed=3, name="x")) == list(range(20))
    assert list(each_index(documents(0), seed=3, name="x")) != list(range(30))


def texts_of(stream: TokenStream) -> str:
    return str(TOKENIZER.decode(torch.from_numpy(stream.tokens.astype("int64")), skip_special_tokens=True))


def test_tokens_of_a_set_that_changed_are_made_anew(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_stream, "DOCUMENTS_AT_ONCE", 5)
    monkeypatch.setattr(token_stream, "SAVE_EVERY_S", -1.0)
    write_words(here / "own" / "words")
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "ids": IDS, "seq_len": 9, "cache": here / "run"}
    record = StreamedPart._record

    def stopped_at_17(part: StreamedPart, row: int) -> dict[str, Any]:
        if row == 17:
            raise KeyboardInterrupt
        return record(part, row)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StreamedPart, "_record", stopped_at_17)
        TokenStream(documents(25, val_fraction=0.0), **options)
    assert read_json(next((here / "run").glob("*.begun.json")))["documents"] == 15
    (here / "own" / "words" / "train-00000-of-00003.parquet").unlink()
    write_words(here / "own" / "words", files=1, rows=5)
    text = texts_of(TokenStream(documents(25, val_fraction=0.0), **options))
    assert "has changed since" in caplog.text
    found = [int(number) for number in re.findall(r"train document (\d+)", text)]
    assert found == [*range(5), *range(10, 30)]


def test_tokens_end_with_the_set(here: Path) -> None:
    write_words(here / "own" / "words")
    source = documents(10**9, val_fraction=0.0)
    stream = TokenStream(source, tokenizer=TOKENIZER, ids=IDS, seq_len=9, cache=here / "run")
    assert texts_of(stream).count("train document") == 30
    assert [file.suffix for file in (here / "run").iterdir()] == [".bin"]


def test_a_set_that_cannot_be_read_at_all_is_one_line(here: Path, short_waits: None) -> None:
    write_words(here / "own" / "words", files=2)
    source = documents(20, val_fraction=0.0)
    assert source[0] == "train document 0"
    for file in (here / "own" / "words").iterdir():
        file.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"cannot read .*00001.* at its row 0: .*run again to go on from it") as caught:
        read(source)
    assert "\n" not in str(caught.value)


def test_images(here: Path) -> None:
    pictures = [{"bytes": encoded(number), "path": None} for number in range(20)]
    table = {"image": pictures, "caption": [f"number {number}" for number in range(20)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet("own/words/train.parquet")
    config = ImageSourceConfig(name="i", kind="hub", path="own/words", stream=10, val_fraction=0.2)
    train, val = (open_image_source(config, split=split, size=12, seed=0) for split in ("train", "val"))
    assert isinstance(train, TableImages) and train[0].key == "own/words/train#2"
    assert numbers_of(val) == [0, 1] and numbers_of(train) == list(range(2, 12))
    train, val = (
        open_image_source(replace(config, stream=0), split=split, size=12, seed=0) for split in ("train", "val")
    )
    assert sorted(numbers_of(train) + numbers_of(val)) == list(range(20)) and len(val) > 0
    assert train[0].key.startswith("own/words/train#")


def test_images_of_tars(here: Path) -> None:
    write_shards(here / "own" / "words")
    config = ImageSourceConfig(name="i", kind="hub", path="own/words", stream=4, val_fraction=0.0)
    streamed = open_image_source(config, split="train", size=32, seed=0)
    config = ImageSourceConfig(name="i", path="own/words", val_fraction=0.0)
    mapped = open_image_source(config, split="train", size=32, seed=0)
    for index in range(4):
        assert np.array_equal(streamed[index].image_HWC, mapped[index].image_HWC)


@pytest.mark.parametrize("stream", [0, 4])
def test_images_that_are_files(here: Path, stream: int) -> None:
    folder = here / "own" / "words" / "train"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(number))
    rows = [json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}) for number in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    config = ImageSourceConfig(name="i", kind="hub", path="own/words", stream=stream, val_fraction=0.0)
    source = open_image_source(config, split="train", size=12, seed=0)
    assert numbers_of(source) == list(range(stream or 6))
    (folder / "1.png").unlink()
    with pytest.raises(BadSample, match=r"cannot be read|no image"):
        open_image_source(config, split="train", size=12, seed=0)[1]


@pytest.mark.parametrize("stream", [0, 2])
def test_paths_in_a_table_are_not_followed(here: Path, stream: int) -> None:
    """Whoever wrote it could name any file of this machine."""
    (here / "secret.png").write_bytes(encoded(0))
    images = [{"bytes": encoded(1), "path": None}, {"bytes": None, "path": str(here / "secret.png")}]
    features = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    table = pa.Table.from_pylist([{"image": image, "caption": "number 1"} for image in images], schema=features)
    pq.write_table(table, here / "own" / "words" / "train.parquet")
    config = ImageSourceConfig(name="i", kind="hub", path="own/words", stream=stream, val_fraction=0.0)
    source = open_image_source(config, split="train", size=12, seed=0)
    assert source[0].captions == ("number 1",)
    with pytest.raises(BadSample, match="no image"):
        source[1]


def test_mistakes_are_one_line(here: Path) -> None:
    write_words(here / "own" / "words")
    for path, stream, message in (
        (
            str(here / "own" / "words"),
            5,
            "stream=5 with kind=parquet; it is the number of samples to take of a hub",
        ),
        ("own/words", -1, "stream=-1"),
        ("own/absent", 5, r"hub set own/absent\): cannot be opened"),
        ("own/absent", 0, r"hub set own/absent\): cannot be opened"),
        ("own/words:german", 5, "BuilderConfig 'german' not found"),
    ):
        config = TextSourceConfig(name="h", kind="hub" if path.startswith("own") else "auto", path=path, stream=stream)
        with pytest.raises(UserError, match=message) as caught:
            open_text_source(config, split="train")[0]
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no column 'body' \(has: text\); set field"):
        documents(5, field="body")[0]
    with pytest.raises(ValueError, match="source 'i': images are drawn in any order here; stream=0 downloads the set"):
        ImageDataConfig(sources=[ImageSourceConfig(name="i", path="own/words", stream=5)])


# --- over HTTP


def write_lines(folder: Path, *, rows: int = 40_000) -> None:
    for number in range(3):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{number}-{row} {row**9 % 9973}"}) + "\n" for row in range(rows))


def client(hub: LocalHub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that knows no other hub, in an empty folder."""
    (folder / "empty").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder / "empty", env=hub.environment(folder), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_only_what_is_asked_for_is_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "own" / "words"
    folder.mkdir(parents=True)
    write_lines(folder)
    script = (
        "from data_mix.sources.text import TextSourceConfig, open_text_source\n"
        "config = TextSourceConfig(name='h', path='own/words@v2', stream=50_000, val_fraction=0.0)\n"
        "source = open_text_source(config, split='train')\n"
        "print(len(source), flush=True)\n"
        "for index in range(45_000): last = source[index]\n"
        "print(last)\n"
    )
    with local_hub(tmp_path / "hub") as hub:
        result = client(hub, tmp_path, "-c", script)
        assert result.stdout.splitlines()[0] == "50000" and result.stdout.splitlines()[1].startswith("1-4999 ")
        assert set(hub.fetched) == {"0.jsonl.gz", "1.jsonl.gz"} and "v2" in hub.revisions
        hub.fetched.clear()
        result = client(hub, tmp_path, "-c", script.replace("50_000", "0"))  # downloads the set
        assert result.stdout.splitlines()[0] == "120000" and result.stdout.splitlines()[1].startswith("1-4999 ")
        assert "2.jsonl.gz" in hub.fetched


def test_codes_of_a_streamed_set_go_on_after_the_network_was_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hub" / "own" / "pictures"
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for number in range(3):
        pictures = [{"bytes": encoded(number * 10 + row), "path": None} for row in range(10)]
        table = {"image": pictures, "caption": [f"number {number * 10 + row}" for row in range(10)]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"train-{number:05d}-of-00003.parquet")
    qlip = make_qlip(tmp_path / "qlip")
    config = tmp_path / "codes.yaml"
    config.write_text(
        f"visual_tokenizer: {qlip}\noutput_dir: {tmp_path / 'codes'}\nrows_per_shard: 4\nbatch_size: 2\n"
        "images: [{name: i, path: own/pictures, stream: 25, val_fraction: 0.1}]\n"
    )
    with local_hub(tmp_path / "hub") as hub:
        encode = ("-m", "data_mix.codes.encode", "--config", str(config))
        hub.ends_at = "train-00001-of-00003.parquet"
        stopped = client(hub, tmp_path, *encode)
        assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
        assert "cannot read" in stopped.stderr and "run again to go on from it" in stopped.stderr
        finished = shard_bytes(tmp_path / "codes")
        assert sorted(finished) == ["train-i-00000.parquet"], "rows 3 to 6; the next shard needs file 1"
        hub.ends_at, hub.has_ended = "", False
        assert client(hub, tmp_path, *encode).returncode == 0
        resumed = shard_bytes(tmp_path / "codes")
        assert resumed.items() >= finished.items()
        summary = json.loads((tmp_path / "codes" / "summary.json").read_text())["splits"]
        assert (summary["train"]["i"]["images"], summary["val"]["i"]["images"]) == (25, 3)
        (tmp_path / "codes" / "summary.json").unlink()
        hub.commit = "d" * 40
        again = client(hub, tmp_path, *encode)
        assert "8 shards of another tokenizer or config are made anew" in again.stderr, "a commit makes another set"
    shards = CodeShards(tmp_path / "codes", split="train")
    assert [shards[index].key for index in range(25)] == [f"own/pictures/train#{row}" for row in range(3, 28)]
    assert [shards[index].captions for index in range(25)] == [(f"number {row}",) for row in range(3, 28)]
    main(["--config", str(config)])
    assert "up to date" in capsys.readouterr().out, "without a hub"
