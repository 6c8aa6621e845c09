"""UM3's rows: exact counts, the same global batch for any number of ranks, resume, layouts, drop-out and truncation."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_mix.batches import token_stream
from data_mix.batches.mix import DataConfig, RowBatch, UM3Rows, open_rows
from data_mix.batches.schedule import TASKS, MixConfig, Schedule
from data_mix.batches.statistics import MixAccount
from data_mix.batches.token_stream import TokenStream, scattered_rows
from data_mix.codes.shards import CodeShards, ShardHeader, open_code_sources, shard_path, write_shard
from data_mix.samples import BadSample
from data_mix.sources.text import ListedDocuments, TextSourceConfig, open_text_source
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.model.sequences import Row
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer

NUM_PATCHES, BITS, SEQ_LEN = 4, 12, 24
PROSE = [f"chapter {i}: the quick brown fox number {i * 37} jumps over {i} lazy dogs" for i in range(30)]
TOKENIZER = train_text_tokenizer([*PROSE, "a red circle above a blue square"], vocab_size=320)
IDS = make_vocabulary(TOKENIZER, subtokens=2, bits_per_subtoken=6, num_patches=NUM_PATCHES)

Make = Callable[..., UM3Rows]


def captions_of(source: str, row: int) -> list[str]:
    return [f"a {source} of {row} red dots", f"{source} {row}"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    for source, rows in (("photo", 17), ("drawing", 8)):
        header = ShardHeader(fingerprint="f", bits=BITS, image_size=16, split="train", source=source)
        codes_BN = np.random.default_rng(rows).integers(0, 2**BITS, size=(rows, NUM_PATCHES))
        captions = [captions_of(source, row) for row in range(rows)]
        path = shard_path(folder, split="train", source=source, shard=0)
        keys = [f"{source}-{row}" for row in range(rows)]
        write_shard(path, header=header, keys=keys, codes_BN=codes_BN, captions=captions)
    return folder


@pytest.fixture
def make(codes: Path, tmp_path: Path) -> Make:
    def _make(*, rank: int = 0, world_size: int = 1, batch_size: int = 16, seed: int = 0, **values: Any) -> UM3Rows:
        config = DataConfig(
            texts=[TextSourceConfig(name="prose", weight=2), TextSourceConfig(name="notes", weight=1)],
            seq_len=values.pop("seq_len", SEQ_LEN),
            **({"mix": MixConfig(start=[6, 1, 3], end=[2, 3, 5], calm_down_steps=20)} | values),
        )
        texts = {
            name: TokenStream(
                ListedDocuments(name, documents),
                tokenizer=TOKENIZER,
                ids=IDS,
                seq_len=config.text_seq_len or config.seq_len,
                cache=tmp_path,
            )
            for name, documents in (("prose", PROSE), ("notes", PROSE[:7]))
        }
        return UM3Rows(
            config,
            images=open_code_sources(codes, split="train"),
            texts=texts,
            ids=IDS,
            text_tokenizer=TOKENIZER,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    return _make


def same(one: RowBatch, other: RowBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def caption(row_T: torch.Tensor, *, after: int, before: int) -> str:
    """The text between two marks of a row."""
    ids = row_T.tolist()
    start = ids.index(after)
    return str(TOKENIZER.decode(ids[start + 1 : ids.index(before, start + 1)]))


def test_shapes_and_padding(make: Make) -> None:
    batch = make().batch(0)
    assert batch.input_ids_BT.shape == batch.target_mask_BT.shape == (16, SEQ_LEN)
    assert (batch.input_ids_BT.dtype, batch.target_mask_BT.dtype) == (torch.int64, torch.bool)
    assert batch.task_S.dtype == torch.int8
    for row, targets, length in zip(batch.input_ids_BT, batch.target_mask_BT, batch.lengths_S, strict=True):
        assert (row[length:] == IDS.pad_id).all()
        assert not targets[length:].any()
        assert row[0] == IDS.bos_id
        assert not targets[0]
        assert targets.any()
        assert int(row.max()) < IDS.vocab_size


def test_counts_follow_the_schedule_exactly(make: Make) -> None:
    rows = make()
    schedule = Schedule(rows.config.mix)
    had: Counter[str] = Counter()
    num_text = 0
    for step in range(40):
        batch = rows.batch(step)
        expected = schedule.counts(step, batch_size=16)
        assert [int((batch.task_S == i).sum()) for i in range(3)] == list(expected.values())
        assert Counter(batch.sources) == Counter(
            {s: sum(n for k, n in batch.counts.items() if k.endswith(f"/{s}")) for s in set(batch.sources)}
        )
        had.update(batch.counts)
        num_text += expected["text"]
        assert abs(had["text/prose"] - num_text * 2 / 3) < 1
    for task in ("i2t", "t2i"):
        total = had[f"{task}/photo"] + had[f"{task}/drawing"]
        assert abs(had[f"{task}/photo"] - total * 17 / 25) < 1
    assert sum(had.values()) == 40 * 16


def test_every_rank_slice_is_part_of_the_same_global_batch(make: Make) -> None:
    whole = make(caption_dropout=0.5)
    for world_size in (2, 4, 8):
        parts = [make(rank=rank, world_size=world_size, caption_dropout=0.5) for rank in range(world_size)]
        for step in (0, 1, 13, 29):
            batch, pieces = whole.batch(step), [part.batch(step) for part in parts]
            for name in ("input_ids_BT", "target_mask_BT", "lengths_S", "task_S"):
                assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
            assert [source for piece in pieces for source in piece.sources] == batch.sources
            assert all(piece.counts == batch.counts for piece in pieces)
            for i in range(3):
                shares = [int((piece.task_S == i).sum()) for piece in pieces]
                assert max(shares) - min(shares) <= 2


def test_resume_gives_the_rows_of_the_undisturbed_run(make: Make) -> None:
    undisturbed = make(caption_dropout=0.3)
    batches = [undisturbed.batch(step) for step in range(25)]
    state = undisturbed.state(20)
    resumed = make(caption_dropout=0.3, rank=0, world_size=1)
    resumed.check_state(state)
    for step in range(20, 25):
        assert same(resumed.batch(step), batches[step])
    assert not same(batches[20], batches[21])
    assert not same(make(seed=1).batch(0), make().batch(0))


def test_state_counts_the_draws_and_is_the_same_on_every_rank(make: Make) -> None:
    rows = make()
    state = rows.state(30)
    had: Counter[str] = Counter()
    for step in range(30):
        had.update(rows.batch(step).counts)
    assert state["draws"] == dict(had)
    assert (state["seed"], state["step"]) == (0, 30)
    assert make(rank=3, world_size=4).state(30) == state


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed 0, now 5"),
        ({"mix": MixConfig(start=[6, 1, 3], end=[2, 3, 6], calm_down_steps=20)}, "draws"),
        ({"image_weights": {"photo": 1.0}}, "sizes"),
        ({"seq_len": 30}, "sizes"),
        ({"batch_size": 8}, "batch_size 16, now 8"),
    ],
)
def test_another_config_cannot_take_up_a_checkpoint(make: Make, change: dict[str, Any], named: str) -> None:
    state = make().state(30)
    with pytest.raises(UserError, match=f"step 30 was trained on other data: {named}"):
        make(**change).check_state(state)


def test_each_epoch_shows_every_image_once_to_each_task(make: Make) -> None:
    rows = make(mix=MixConfig(start=[0, 1, 1], end=[0, 1, 1]), batch_size=50)
    shown = Counter((row.task, row.source, row.sample) for row in rows.plan(0))
    assert shown == Counter(
        (t, s, i) for t in ("i2t", "t2i") for s, n in (("photo", 17), ("drawing", 8)) for i in range(n)
    )


def test_rows_hold_the_images_codes_and_one_of_its_captions(make: Make, codes: Path) -> None:
    rows = make(mix=MixConfig(start=[0, 1, 2], end=[0, 1, 2]), caption_dropout=0.0, seq_len=40)
    shards = open_code_sources(codes, split="train")
    kinds: Counter[tuple[str, int]] = Counter()
    for step in range(10):
        batch = rows.batch(step)
        assert batch.truncated_captions == 0
        for planned, row in zip(rows.plan(step), batch.input_ids_BT, strict=True):
            start = row.tolist().index(IDS.begin_of_image_id)
            assert row[start + IDS.image_tokens + 1] == IDS.end_of_image_id
            codes_N = IDS.ids_to_codes(row[start + 1 : start + 1 + IDS.image_tokens])
            assert torch.equal(codes_N, shards[planned.source][planned.sample].codes_N)
            ends = (IDS.bos_id, IDS.begin_of_image_id) if planned.task == "t2i" else (IDS.end_of_image_id, IDS.eos_id)
            text = caption(row, after=ends[0], before=ends[1])
            kinds[planned.task, captions_of(planned.source, planned.sample).index(text)] += 1
    assert kinds["i2t", 1] == 0
    assert kinds["i2t", 0] > 40
    assert min(kinds["t2i", 0], kinds["t2i", 1]) > 30


def test_i2t_rows_draw_any_caption_when_asked_to(make: Make) -> None:
    rows = make(mix=MixConfig(start=[0, 1, 0], end=[0, 1, 0]), i2t_caption="random", seq_len=40)
    texts = [caption(row, after=IDS.end_of_image_id, before=IDS.eos_id) for row in rows.batch(0).input_ids_BT]
    assert {text.startswith("a ") for text in texts} == {True, False}


def test_caption_dropout_makes_unconditional_rows_of_t2i_only(make: Make) -> None:
    mix = MixConfig(start=[0, 1, 3], end=[0, 1, 3])
    dropped = Counter[int]()
    rows = make(mix=mix, caption_dropout=0.25, batch_size=64)
    for step in range(12):
        batch = rows.batch(step)
        no_caption = batch.input_ids_BT[:, 1] == IDS.begin_of_image_id
        dropped[0] += int((no_caption & (batch.task_S == 2)).sum())
    assert 0.15 < dropped[0] / (12 * 48) < 0.35
    everything = make(mix=mix, caption_dropout=1.0).batch(0)
    assert (everything.lengths_S[everything.task_S == 2] == IDS.image_tokens + 4).all()
    assert (everything.lengths_S[everything.task_S == 1] > IDS.image_tokens + 4).all()


def test_a_batch_is_as_wide_as_its_longest_row(make: Make) -> None:
    mix = MixConfig(start=[1, 1, 2], end=[1, 1, 2])
    for texts in (0, 8):
        batch = make(mix=mix, text_seq_len=texts).batch(0)
        assert batch.input_ids_BT.shape == batch.target_mask_BT.shape == (16, int(batch.lengths_S.max()))
        assert batch.lengths_S[batch.task_S == 0].max() == (texts or SEQ_LEN)
    assert batch.lengths_S.max() == batch.lengths_S[batch.task_S > 0].max() > 8
    with pytest.raises(ValueError, match="text_seq_len=1"):
        DataConfig(text_seq_len=1)
    with pytest.raises(ValueError, match="seq_len=40"):
        DataConfig(seq_len=40, text_seq_len=41)


def test_supervision_decides_whether_conditions_are_targets(make: Make) -> None:
    mix = MixConfig(start=[0, 1, 1], end=[0, 1, 1])
    target = make(mix=mix, supervision="target", caption_dropout=0.0).batch(0)
    everything = make(mix=mix, supervision="all", caption_dropout=0.0).batch(0)
    assert torch.equal(target.input_ids_BT, everything.input_ids_BT)
    visual = target.input_ids_BT >= IDS.text_vocab_size
    is_i2t = target.task_S[:, None] == 1
    assert not (target.target_mask_BT & visual & is_i2t).any()
    assert (target.target_mask_BT | ~visual | is_i2t).all()
    assert torch.equal(everything.target_mask_BT.sum(1), everything.lengths_S - 1)


def test_long_captions_are_cut_and_counted_images_never(make: Make) -> None:
    mix = MixConfig(start=[0, 1, 1], end=[0, 1, 1])
    batch = make(mix=mix, seq_len=IDS.image_tokens + 5, caption_dropout=0.0).batch(0)
    assert batch.truncated_captions == 16
    assert (batch.lengths_S == IDS.image_tokens + 5).all()
    assert ((batch.input_ids_BT >= IDS.text_vocab_size).sum(1) == IDS.image_tokens).all()
    with pytest.raises(
        UserError, match=f"seq_len={IDS.image_tokens + 4} cannot hold an image .* {IDS.image_tokens + 5} or"
    ):
        make(mix=mix, seq_len=IDS.image_tokens + 4)


def test_text_rows_read_the_whole_corpus_once_an_epoch(tmp_path: Path) -> None:
    documents = [*PROSE, "", "the end"]
    stream = TokenStream(
        ListedDocuments("prose", documents), tokenizer=TOKENIZER, ids=IDS, seq_len=SEQ_LEN, cache=tmp_path
    )
    rows = [stream[i] for i in range(len(stream))]
    assert all(len(row.input_ids) == SEQ_LEN for row in rows[:-1])
    ids = [token for row in rows for token in row.input_ids[1:].tolist()]
    assert ids.count(IDS.eos_id) == ids.count(IDS.bos_id) == len(PROSE) + 1
    text = "".join(str(TOKENIZER.decode([i for i in ids if i not in (IDS.bos_id, IDS.eos_id)])))
    assert text == "".join(documents)
    for row in rows:
        assert torch.equal(row.targets, row.input_ids != IDS.bos_id)
    with pytest.raises(IndexError):
        stream[len(stream)]


def test_scattered_rows_are_pieces_of_different_documents(tmp_path: Path) -> None:
    documents = [*(f"{word} " * 50 for word in ("one", "two", "three")), "", "short"]

    def rows_with(seed: int) -> list[Row]:
        source = ListedDocuments("t", documents)
        return scattered_rows(
            source, tokenizer=TOKENIZER, ids=IDS, num_rows=7, seq_len=12, seed=seed, cache=tmp_path / f"{seed}"
        )

    rows = rows_with(0)
    texts = [str(TOKENIZER.decode(row.input_ids, skip_special_tokens=True)) for row in rows]
    found = [next(word for word in ("one", "two", "three", "short") if word in text) for text in texts]
    assert len(rows) == 7 and set(found) == {"one", "two", "three", "short"} and found[4:] == found[:3]
    for row in rows:
        assert row.input_ids[0] == IDS.bos_id and len(row.input_ids) <= 12
        assert torch.equal(row.targets, torch.arange(len(row.targets)) > 0)
    other = rows_with(1)
    documents[:] = [""] * len(documents)  # the rows are made once, and read from the cache after that
    again = rows_with(0)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rows, again, strict=True))
    assert not all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rows, other, strict=True))
    with pytest.raises(UserError, match="'blank' holds no text"):
        blank = ListedDocuments("blank", ["", " "])
        scattered_rows(blank, tokenizer=TOKENIZER, ids=IDS, num_rows=1, seq_len=8, seed=0, cache=tmp_path)


def test_tokenising_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "DOCUMENTS_AT_ONCE", 10)
    monkeypatch.setattr(token_stream, "SAVE_EVERY_S", -1.0)

    read: list[int] = []

    class Documents(ListedDocuments):
        """Interrupted twice."""

        def __getitem__(self, index: int) -> str:
            read.append(index)
            if index in (37, 78) and read.count(index) == 1:
                raise KeyboardInterrupt
            if index in (3, 80):
                raise BadSample("gone")
            return super().__getitem__(index)

    documents = Documents("d", [f"document {index} " * (index % 5) for index in range(100)])

    def tokens(cache: Path) -> bytes:
        TokenStream(documents, tokenizer=TOKENIZER, ids=IDS, seq_len=9, cache=cache)
        assert read_json(next(cache.glob("*.json")))["documents_left_out"] == 2
        assert len(list(cache.iterdir())) == 2, "the stream and what was left out of it"
        return next(cache.glob("*.bin")).read_bytes()

    begins = [0]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tokens(tmp_path / "a")
        begun = next((tmp_path / "a").glob("*.begun"))
        begun.write_bytes(begun.read_bytes() + bytes(6000))  # what a kill leaves that was not noted
        begins.append(len(read))
    resumed = tokens(tmp_path / "a")
    assert [read[begin] for begin in begins] == [0, 30, 70], "what was finished is not read again"
    assert resumed == tokens(tmp_path / "b")


def test_text_of_a_file_that_vanishes_is_left_out_and_named(
    tmp_path: Path, short_waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        lines = "".join(json.dumps({"text": f"document {number} {row}"}) + "\n" for row in range(4))
        (tmp_path / f"{number}.jsonl").write_text(lines)
    config = TextSourceConfig(name="prose", path=str(tmp_path), val_fraction=0.0)
    documents = open_text_source(config, split="train")
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(BadSample, match="shard set aside"):
        documents[5]

    def stream() -> TokenStream:
        return TokenStream(documents, tokenizer=TOKENIZER, ids=IDS, seq_len=5000, cache=tmp_path / "cache")

    text = str(TOKENIZER.decode(stream()[0].input_ids, skip_special_tokens=True))
    assert [f"document {number} 3" in text for number in range(3)] == [True, False, True]
    caplog.clear()
    assert list(stream().set_aside) == [str(tmp_path / "1.jsonl")], "a later run is told as well"
    assert "was made without" in caplog.text and "1.jsonl" in caplog.text
    assert read_json(next((tmp_path / "cache").glob("*.json")))["documents_left_out"] == 4
    with pa.output_stream(str(tmp_path / "3.jsonl.zst"), compression="zstd") as packed:
        packed.write(json.dumps({"text": "whole"}).encode() * 1)
    data = (tmp_path / "3.jsonl.zst").read_bytes()
    (tmp_path / "3.jsonl.zst").write_bytes(data[: len(data) // 2])
    source = open_text_source(config, split="train")
    assert len(source) == 8 and "3.jsonl.zst" in caplog.text


def test_a_tokenizer_with_one_entry_for_both_ends_keeps_eos_a_target(tmp_path: Path) -> None:
    ids = replace(IDS, bos_id=IDS.eos_id)
    stream = TokenStream(ListedDocuments("t", PROSE), tokenizer=TOKENIZER, ids=ids, seq_len=5000, cache=tmp_path)
    row = stream[0]
    assert (row.input_ids == IDS.eos_id).sum() == len(PROSE) + 1
    assert row.targets.sum() == len(row.targets) - 1


def test_the_stream_is_made_once_and_anew_for_other_data(tmp_path: Path) -> None:
    def build(**values: Any) -> Path:
        TokenStream(
            ListedDocuments("prose", values.pop("documents", PROSE)),
            tokenizer=values.pop("tokenizer", TOKENIZER),
            ids=IDS,
            seq_len=values.pop("seq_len", 8),
            cache=tmp_path,
            **values,
        )
        return max(tmp_path.glob("*.bin"), key=lambda path: path.stat().st_mtime_ns)

    first = build()
    made = first.stat().st_mtime_ns
    assert build(seq_len=16) == first
    assert first.stat().st_mtime_ns == made
    assert len({first, build(origin="x"), build(documents=PROSE[:5])}) == 3
    other = train_text_tokenizer(PROSE, vocab_size=290)
    assert build(tokenizer=other) != first
    assert len(list(tmp_path.glob("*.bin"))) == 4
    with pytest.raises(UserError, match="'prose' holds no text"):
        build(documents=["", ""])


def test_samples_and_tokens_are_counted_against_the_schedule(make: Make) -> None:
    """Over two ranks, with a stop between: the account of the whole run, and never a sample off the schedule."""
    whole, parts = make(), [make(rank=rank, world_size=2) for rank in range(2)]
    account = MixAccount(whole.keys)
    tokens: Counter[str] = Counter()
    for step in range(40):
        batch = whole.batch(step)
        account.add(sum(part.batch(step).seen_KC for part in parts).numpy())
        if step == 20:
            state, account = account.state(), MixAccount(whole.keys)
            account.load(json.loads(json.dumps(state)))
        for row, task, source in zip(batch.input_ids_BT, batch.task_S.tolist(), batch.sources, strict=True):
            tokens[f"text_tokens/{TASKS[task]}/{source}"] += int((row < IDS.text_vocab_size).sum())
            tokens[f"text_tokens/{TASKS[task]}/{source}"] -= int((row == IDS.pad_id).sum())
            tokens[f"visual_tokens/{TASKS[task]}/{source}"] += int((row >= IDS.text_vocab_size).sum())
        values = account.metrics(due=whole.due(step + 1))
        for key in [*TASKS, *whole.keys]:
            assert abs(values[f"data/samples/{key}"] - values[f"data/scheduled/{key}"]) < 1
    draws = whole.state(40)["draws"]
    assert {key: values[f"data/samples/{key}"] for key in whole.keys} == draws
    counted = {key.removeprefix("data/"): count for key, count in values.items() if "_tokens/" in key}
    assert counted == {key: count for key, count in tokens.items() if not key.startswith("visual_tokens/text/")}
    assert values["data/visual_tokens/i2t/photo"] == IDS.image_tokens * draws["i2t/photo"]
    assert values["data/samples/text"] == sum(
        Schedule(whole.config.mix).counts(s, batch_size=16)["text"] for s in range(40)
    )


def test_samples_of_a_shard_that_vanishes_are_replaced_and_counted(tmp_path: Path, short_waits: None) -> None:
    """The rows are a function of (seed, step) and of which shards can be read: on every rank, and after a resume."""

    def write(folder: Path) -> list[Path]:
        paths = [shard_path(folder, split="train", source="photo", shard=shard) for shard in range(4)]
        for shard, path in enumerate(paths):
            header = ShardHeader(
                fingerprint="f", bits=BITS, image_size=16, split="train", source="photo", shard=shard, num_shards=4
            )
            codes_BN = np.random.default_rng(shard).integers(0, 2**BITS, size=(10, NUM_PATCHES))
            texts = [[f"photo {shard} {row}"] for row in range(10)]
            write_shard(path, header=header, keys=list("abcdefghij"), codes_BN=codes_BN, captions=texts)
        return paths

    def rows(rank: int = 0, world_size: int = 1) -> UM3Rows:
        mix = MixConfig(start=[0, 1, 2], end=[0, 1, 2])
        return UM3Rows(
            DataConfig(mix=mix, seq_len=40), images=open_code_sources(tmp_path, split="train"), texts={}, ids=IDS,
            text_tokenizer=TOKENIZER, batch_size=12, seed=0, rank=rank, world_size=world_size,
        )  # fmt: skip

    paths = write(tmp_path)
    untouched = [rows().batch(step) for step in range(8)]
    reader, late = rows(), rows()
    lost = paths[2]
    lost.unlink()
    (tmp_path / ".arrow").rename(tmp_path / "elsewhere")
    batches = [reader.batch(step) for step in range(8)]
    replaced = 0
    for step, (batch, before) in enumerate(zip(batches, untouched, strict=True)):
        assert batch.counts == before.counts and torch.equal(batch.task_S, before.task_S)
        for row, planned in enumerate(reader.plan(step)):
            same_row = torch.equal(batch.input_ids_BT[row, :9], before.input_ids_BT[row, :9]) and planned.task == "i2t"
            assert same_row == (planned.task == "i2t" and planned.sample // 10 != 2)
        gone = sum(planned.sample // 10 == 2 for planned in reader.plan(step))
        assert int(batch.seen_KC[:, 3].sum()) == gone and int(batch.seen_KC[:, 0].sum()) == 12
        replaced += gone
    assert replaced > 10 and batches[-1].shards_set_aside == 1
    assert same(late.batch(7), batches[7]), "a resumed run replaces them by the same"
    parts = []
    for rank in range(2):
        write(tmp_path)
        parts.append(rows(rank=rank, world_size=2))
        lost.unlink()
    halves = [part.batch(5) for part in parts]
    assert torch.equal(torch.cat([half.input_ids_BT for half in halves]), batches[5].input_ids_BT)
    write(tmp_path)
    fresh = rows()
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match="3 of the 4 shards of 'photo' cannot be read, more than half"):
        for step in range(8):
            fresh.batch(step)


def test_open_rows_opens_what_the_config_names(codes: Path, tmp_path: Path) -> None:
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(f'{{"text": "{text}"}}\n' for text in PROSE))

    def open_with(*overrides: str, fingerprint: str = "f") -> UM3Rows:
        texts = f"texts=[{{name: prose, path: {prose}, val_fraction: 0.1}}]"
        config = load_config(DataConfig, overrides=[f"codes={codes}", texts, "seq_len=24", *overrides])
        return open_rows(
            config,
            ids=IDS,
            text_tokenizer=TOKENIZER,
            batch_size=64,
            seed=0,
            cache=tmp_path / "cache",
            fingerprint=fingerprint,
        )

    batch = open_with().batch(0)
    assert batch.counts == {"text/prose": 60, "i2t/photo": 1, "t2i/photo": 2, "t2i/drawing": 1}
    weighted = open_with("image_weights={drawing: 1}", "mix.start=[0,1,1]").batch(0)
    assert weighted.counts == {"i2t/drawing": 32, "t2i/drawing": 32}
    text_only = open_with("mix.start=[1,0,0]", "mix.end=[1,0,0]", "codes=absent")
    assert text_only.batch(0).counts == {"text/prose": 64}
    short = open_with("mix.start=[1,0,0]", "mix.end=[1,0,0]", "text_seq_len=9")
    assert (text_only.batch(0).input_ids_BT.shape[1], short.batch(0).input_ids_BT.shape[1]) == (24, 9)
    with pytest.raises(UserError, match="fingerprint f, this run uses e"):
        open_with(fingerprint="e")
    with pytest.raises(UserError, match="name 'film', which is no source; there are"):
        open_with("image_weights={film: 1}")
    with pytest.raises(UserError, match="no train codes in absent; run make codes first"):
        open_with("codes=absent")
    with pytest.raises(UserError, match=r"weights \[0.0\] of text sources \['prose'\]: .* one above 0"):
        open_with(f"texts=[{{name: prose, path: {prose}, weight: 0}}]")
    with pytest.raises(UserError, match=r"weights \[0.0\] of i2t sources \['photo'\]"):
        open_with("image_weights={photo: 0}")
    with pytest.raises(UserError, match="has text samples, but there is no source"):
        open_with("texts=[]")
    with pytest.raises(UserError, match=r"caption_dropout=1\.5"):
        open_with("caption_dropout=1.5")


def test_codes_of_another_cut_are_refused(codes: Path) -> None:
    with pytest.raises(UserError, match="4 a picture of 12 bits; the model takes 4 of 2 x 7 bits"):
        UM3Rows(
            DataConfig(mix=MixConfig(start=[0, 1, 1], end=[0, 1, 1])),
            images={"photo": CodeShards(codes, split="train", source="photo")},
            texts={},
            ids=replace(IDS, bits_per_subtoken=7),
            text_tokenizer=TOKENIZER,
            batch_size=4,
            seed=0,
        )


def test_tasks_are_numbered_as_documented() -> None:
    assert TASKS == ("text", "i2t", "t2i")
