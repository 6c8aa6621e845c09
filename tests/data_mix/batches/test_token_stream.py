"""Token streams: the corpus once an epoch, made once, resumed after kills and a full disk with the same bytes."""

import copy
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import pre_tokenizers

from data_mix.batches import token_stream
from data_mix.batches.token_stream import TokenStream, scattered_sequences, sequences_of_sources
from data_mix.samples import BadSample
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source
from tests.data_mix.batches.test_mix import IDS, PROSE, TOKENIZER
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.model.text_tokenizer import train_text_tokenizer


def stream_of(documents: TextSource | list[str], cache: Path, **options: Any) -> TokenStream:
    source = TextSource("prose", documents) if isinstance(documents, list) else documents
    return TokenStream(source, cache=cache, **({"tokenizer": TOKENIZER, "ids": IDS, "seq_len": 24} | options))


def test_sequences_read_the_whole_corpus_once_an_epoch(tmp_path: Path) -> None:
    documents = [*PROSE, "", "the end"]
    stream = stream_of(documents, tmp_path)
    sequences = [stream[i] for i in range(len(stream))]
    assert all(len(sequence.input_ids) == 24 for sequence in sequences[:-1])
    ids = [token for sequence in sequences for token in sequence.input_ids[1:].tolist()]
    assert ids.count(IDS.eos_id) == ids.count(IDS.bos_id) == len(PROSE) + 1
    assert TOKENIZER.decode([i for i in ids if i not in (IDS.bos_id, IDS.eos_id)]) == "".join(documents)
    assert all(torch.equal(sequence.targets, sequence.input_ids != IDS.bos_id) for sequence in sequences)
    with pytest.raises(IndexError):
        stream[len(stream)]


def test_a_tokenizer_with_one_id_for_bos_and_eos_keeps_eos_a_target(tmp_path: Path) -> None:
    sequence = stream_of(PROSE, tmp_path, ids=replace(IDS, bos_id=IDS.eos_id), seq_len=5000)[0]
    assert (sequence.input_ids == IDS.eos_id).sum() == len(PROSE) + 1
    assert sequence.targets.sum() == len(sequence.targets) - 1


def test_a_stream_is_made_once_and_again_for_other_data(tmp_path: Path) -> None:
    def build(documents: list[str] = PROSE, **options: Any) -> Path:
        stream_of(documents, tmp_path, **options)
        return max(tmp_path.glob("*.bin"), key=lambda path: path.stat().st_mtime_ns)

    first = build()
    written = first.stat().st_mtime_ns
    assert build(seq_len=16) == first and first.stat().st_mtime_ns == written
    other = train_text_tokenizer(PROSE, vocab_size=290)
    assert len({first, build(origin="x"), build(PROSE[:5]), build(tokenizer=other)}) == 4
    with pytest.raises(UserError, match="'prose' holds no text"):
        build(["", ""])
    digits = copy.deepcopy(TOKENIZER)  # the same entries, but "2024" becomes four of them
    parts = [pre_tokenizers.Digits(individual_digits=True), digits.backend_tokenizer.pre_tokenizer]
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert build(tokenizer=digits) != first and build() == build(tokenizer=copy.deepcopy(TOKENIZER))


def test_every_text_gets_a_sequence(tmp_path: Path) -> None:
    texts = [TextSourceConfig("a", kind="python_docs"), TextSourceConfig("b", kind="python_docs")]
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "ids": IDS, "seq_len": 24, "seed": 0, "cache": tmp_path}
    assert [len(part) for part in sequences_of_sources(texts, split="train", num_sequences=3, **options)] == [2, 1]
    with pytest.raises(UserError, match="1 sequences for 2 texts; raise num_sequences"):
        sequences_of_sources(texts, split="train", num_sequences=1, **options)


class Interrupted(TextSource):
    """Documents of which two cannot be read; a kill interrupts the first reading of two others."""

    def __init__(self) -> None:
        super().__init__("d", [f"document {index} " * (index % 5) for index in range(100)])
        self.read: list[int] = []

    def __getitem__(self, index: int) -> str:
        self.read.append(index)
        if index in (37, 78) and self.read.count(index) == 1:
            raise KeyboardInterrupt
        if index in (3, 80):
            raise BadSample("gone")
        return super().__getitem__(index)


def test_tokenising_resumes_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "DOCUMENTS_AT_ONCE", 10)
    monkeypatch.setattr(token_stream, "SAVE_EVERY_S", -1.0)
    documents = Interrupted()
    begins = [0]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stream_of(documents, tmp_path / "a")
        unfinished = next((tmp_path / "a").glob("*.unfinished"))
        unfinished.write_bytes(unfinished.read_bytes() + bytes(6000))  # written after the last save
        begins.append(len(documents.read))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fsync = os.fsync

        def full_disk(descriptor: int) -> None:
            if documents.read[-1] > 85:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        patch.setattr(os, "fsync", full_disk)
        stream_of(documents, tmp_path / "a")
    begins.append(len(documents.read))
    resumed = stream_of(documents, tmp_path / "a")
    assert [documents.read[begin] for begin in begins] == [0, 30, 70, 80], "finished documents are not read again"
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".bin", ".json"]
    assert read_json(next((tmp_path / "a").glob("*.json")))["skipped"] == 2
    assert np.array_equal(resumed.tokens[:], stream_of(documents, tmp_path / "b").tokens[:])


def test_a_damaged_stream_is_made_again_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = PROSE * 40
    stream = stream_of(documents, tmp_path)
    path, record, expected = stream.tokens.path, stream.tokens.path.with_suffix(".json"), stream.tokens[:]
    data, text = path.read_bytes(), record.read_text()
    assert len(data) > 3 * token_stream.CHUNK_BYTES
    for bytes_, json_ in ((data[:-900], text), (data[:-1] + b"x", text), (data, "{}"), (data, "[" + text), (data, "")):
        path.write_bytes(bytes_)
        record.write_text(json_)
        again = stream_of(documents, tmp_path).tokens
        assert np.array_equal(again[:], expected) and again.fingerprint == stream.tokens.fingerprint
        assert "making the tokens of 'prose' again" in caplog.text
        caplog.clear()
    place = 5 * token_stream.CHUNK_BYTES // 4
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    flipped = stream_of(documents, tmp_path)
    assert np.array_equal(flipped.tokens[:4096], expected[:4096])
    for damaged in (lambda: flipped.tokens[place // 4 :], flipped.tokens.check, lambda: stream[len(stream) - 1]):
        with pytest.raises(UserError, match=rf"{path.name} is damaged .*; delete it"):
            damaged()
        if damaged == flipped.tokens.check:
            os.truncate(path, 100)  # while it is open


def test_documents_of_a_file_that_vanishes_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        lines = [json.dumps({"text": f"document {number} {row}"}) + "\n" for row in range(4)]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    config = TextSourceConfig("prose", path=str(tmp_path), val_fraction=0.0)
    documents = open_text_source(config, split="train")
    (tmp_path / "1.jsonl").unlink()
    sequence = stream_of(documents, tmp_path / "cache", seq_len=5000)[0]
    text = str(TOKENIZER.decode(sequence.input_ids, skip_special_tokens=True))
    assert [f"document {number} 3" in text for number in range(3)] == [True, False, True]
    caplog.clear()
    assert list(stream_of(documents, tmp_path / "cache").tokens.bad_files) == [str(tmp_path / "1.jsonl")]
    assert "1.jsonl" in caplog.text, "a later run warns as well"
    assert read_json(next((tmp_path / "cache").glob("*.json")))["skipped"] == 4
    packed = pa.compress(b'{"text": "whole"}', codec="zstd", asbytes=True)
    (tmp_path / "3.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    assert len(open_text_source(config, split="train")) == 8 and "3.jsonl.zst" in caplog.text


def test_scattered_sequences_are_pieces_of_different_documents(tmp_path: Path) -> None:
    words = ("one", "two", "three", "short")
    documents = [*(f"{word} " * 50 for word in words[:3]), "", "short"]

    def scattered(seed: int, texts: list[str] = documents) -> list[Any]:
        options: dict[str, Any] = {"tokenizer": TOKENIZER, "ids": IDS, "cache": tmp_path / f"{seed}"}
        source = TextSource("t", texts)
        return scattered_sequences(source, num_sequences=7, seq_len=12, seed=seed, **options)

    sequences = scattered(0)
    texts = [str(TOKENIZER.decode(sequence.input_ids, skip_special_tokens=True)) for sequence in sequences]
    chosen = [next(word for word in words if word in text) for text in texts]
    assert len(sequences) == 7 and set(chosen) == set(words) and chosen[4:] == chosen[:3]
    for sequence in sequences:
        assert sequence.input_ids[0] == IDS.bos_id and len(sequence.input_ids) <= 12
        assert torch.equal(sequence.targets, torch.arange(len(sequence.targets)) > 0)
    again, other = scattered(0, [""] * len(documents)), scattered(1)  # the first are read from the cache
    for sequences_b, is_same in ((again, True), (other, False)):
        pairs = zip(sequences, sequences_b, strict=True)
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in pairs) == is_same
    with pytest.raises(UserError, match="'t' holds no text"):
        scattered(2, ["", " "])
    path = next((tmp_path / "0").iterdir())
    for text in (path.read_text().replace("1", "2", 1), "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path.name} is damaged; delete it"):
            scattered(0)
