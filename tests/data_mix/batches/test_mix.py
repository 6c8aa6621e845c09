"""UM3's batches: exact counts, the same batch for any number of ranks, resume, layouts, drop-out and truncation."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_mix.batches.config import DataConfig
from data_mix.batches.mix import SequenceBatch, SequenceBatches
from data_mix.batches.schedule import TASKS, MixConfig, Schedule
from data_mix.batches.statistics import MixStatistics
from data_mix.codes.shards import open_code_sources
from data_mix.sources.text import TextSourceConfig
from tests.helpers.code_shards import write_codes
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer

NUM_PATCHES, BITS, SEQ_LEN = 4, 12, 24
PROSE = [f"chapter {i}: the quick brown fox number {i * 37} jumps over {i} lazy dogs" for i in range(30)]
TOKENIZER = train_text_tokenizer([*PROSE, "a red circle above a blue square"], vocab_size=320)
IDS = make_vocabulary(TOKENIZER, subtokens=2, bits_per_subtoken=6, num_patches=NUM_PATCHES)
CODES: dict[str, Any] = {"num_patches": NUM_PATCHES, "bits": BITS, "fingerprint": "f"}
OPTIONS: dict[str, Any] = {"ids": IDS, "text_tokenizer": TOKENIZER, "batch_size": 16, "seed": 0, "fingerprint": "f"}
I2T_AND_T2I = MixConfig(start=[0, 1, 1], end=[0, 1, 1])

Make = Callable[..., SequenceBatches]


def captions_of(source: str, row: int) -> list[str]:
    return [f"a {source} of {row} red dots", f"{source} {row}"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    for source, num_images in (("photo", 17), ("drawing", 8)):
        captions = [captions_of(source, row) for row in range(num_images)]
        write_codes(folder, source=source, num_images=num_images, captions=captions.__getitem__, **CODES)
    return folder


@pytest.fixture(scope="module")
def make(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Opens batches over the codes and two text sources; keywords change the config, ranks, batch size or seed."""
    folder = tmp_path_factory.mktemp("texts")
    texts = []
    for name, weight, documents in (("prose", 2, PROSE), ("notes", 1, PROSE[:7])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        texts.append(TextSourceConfig(name, path=str(path), weight=weight, val_fraction=0))

    def _make(**changes: Any) -> SequenceBatches:
        options = {name: changes.pop(name) for name in [*OPTIONS, "rank", "world_size"] if name in changes}
        mix = MixConfig(start=[6, 1, 3], end=[2, 3, 5], calm_down_steps=20)
        values: dict[str, Any] = {"codes": str(codes), "texts": texts, "mix": mix, "seq_len": SEQ_LEN} | changes
        return SequenceBatches(DataConfig(**values), cache=folder, **(OPTIONS | options))

    return _make


def same(one: SequenceBatch, other: SequenceBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def is_task(batches: SequenceBatches, step: int, *tasks: str) -> torch.Tensor:
    """True for the samples of `tasks` in this rank's part of the batch."""
    plan = batches.plan(step)
    return torch.tensor([plan[position].task in tasks for position in batches.positions])


def lengths_of(batch: SequenceBatch) -> torch.Tensor:
    return (batch.input_ids_BT != IDS.pad_id).sum(1)


def text_between(sequence_T: torch.Tensor, after: int, before: int) -> str:
    ids = sequence_T.tolist()
    start = ids.index(after)
    return str(TOKENIZER.decode(ids[start + 1 : ids.index(before, start + 1)]))


@pytest.mark.parametrize("text_seq_len", [0, 8])
def test_a_batch_is_padded_to_its_longest_sequence(make: Make, text_seq_len: int) -> None:
    batches = make(mix=MixConfig(start=[1, 1, 2], end=[1, 1, 2]), text_seq_len=text_seq_len)
    batch, is_text = batches.batch(0), is_task(batches, 0, "text")
    assert batch.input_ids_BT.shape == batch.target_mask_BT.shape == (16, int(lengths_of(batch).max()))
    assert lengths_of(batch)[is_text].max() == (text_seq_len or SEQ_LEN) and lengths_of(batch)[~is_text].max() > 8
    assert (batch.input_ids_BT.dtype, batch.target_mask_BT.dtype) == (torch.int64, torch.bool)
    for ids_T, targets_T, length in zip(batch.input_ids_BT, batch.target_mask_BT, lengths_of(batch), strict=True):
        assert (ids_T[length:] == IDS.pad_id).all() and not targets_T[length:].any()
        assert ids_T[0] == IDS.bos_id and not targets_T[0] and targets_T.any()
        assert int(ids_T.max()) < IDS.vocab_size


@pytest.mark.parametrize("world_size", [2, 8])
def test_every_rank_slice_is_part_of_the_same_global_batch(make: Make, world_size: int) -> None:
    whole = make(caption_dropout=0.5)
    parts = [make(rank=rank, world_size=world_size, caption_dropout=0.5) for rank in range(world_size)]
    for step in (0, 1, 13, 29):
        batch, pieces = whole.batch(step), [part.batch(step) for part in parts]
        for name in ("input_ids_BT", "target_mask_BT"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
        assert [source for piece in pieces for source in piece.sources] == batch.sources
        assert all(piece.counts == batch.counts for piece in pieces)
        for task in TASKS:
            shares = [int(is_task(part, step, task).sum()) for part in parts]
            assert max(shares) - min(shares) <= 2


def test_resume_gives_the_batches_of_the_uninterrupted_run(make: Make) -> None:
    uninterrupted = make(caption_dropout=0.3)
    batches = [uninterrupted.batch(step) for step in range(25)]
    resumed = make(caption_dropout=0.3)
    resumed.check_state(uninterrupted.state(20))
    for step in range(20, 25):
        assert same(resumed.batch(step), batches[step])
    assert not same(batches[20], batches[21])
    assert not same(make(seed=1).batch(0), make().batch(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed 0, now 5"),
        ({"mix": MixConfig(start=[6, 1, 3], end=[2, 3, 6], calm_down_steps=20)}, "draws"),
        ({"image_weights": {"photo": 1.0}}, "sizes"),
        ({"seq_len": 30}, "sizes"),
        ({"batch_size": 8}, "batch_size 16, now 8"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"step 30 was trained on other data: {message}"):
        make(**change).check_state(make().state(30))


def test_other_codes_or_texts_of_the_same_size_are_refused(make: Make) -> None:
    batches = make()
    state = json.loads(json.dumps(batches.state(30)))
    batches.check_state(state)
    assert set(batches.fingerprints()) == {"text/prose", "text/notes", "images/photo", "images/drawing"}
    for name in batches.fingerprints():
        with pytest.raises(UserError, match=f"other data: fingerprints of {name} another, now"):
            batches.check_state(state | {"fingerprints": state["fingerprints"] | {name: "another"}})


def test_each_epoch_shows_every_image_once_to_each_task(make: Make) -> None:
    plan = make(mix=I2T_AND_T2I, batch_size=50).plan(0)
    shown = Counter((planned.task, planned.source, planned.sample) for planned in plan)
    sizes = {"photo": 17, "drawing": 8}
    assert shown == Counter((task, name, i) for task in ("i2t", "t2i") for name in sizes for i in range(sizes[name]))


def test_sequences_hold_the_codes_of_an_image_and_one_of_its_captions(make: Make, codes: Path) -> None:
    batches = make(mix=MixConfig(start=[0, 1, 2], end=[0, 1, 2]), caption_dropout=0.0, seq_len=40)
    shards = open_code_sources(codes, split="train")
    kinds: Counter[tuple[str, int]] = Counter()
    for step in range(10):
        batch = batches.batch(step)
        assert batch.truncated_captions == 0
        for planned, ids_T in zip(batches.plan(step), batch.input_ids_BT, strict=True):
            start = ids_T.tolist().index(IDS.begin_of_image_id) + 1
            assert ids_T[start + IDS.image_tokens] == IDS.end_of_image_id
            codes_N = IDS.ids_to_codes(ids_T[start : start + IDS.image_tokens])
            assert torch.equal(codes_N, shards[planned.source][planned.sample].codes_N)
            ends = (IDS.bos_id, IDS.begin_of_image_id) if planned.task == "t2i" else (IDS.end_of_image_id, IDS.eos_id)
            caption = text_between(ids_T, *ends)
            kinds[planned.task, captions_of(planned.source, planned.sample).index(caption)] += 1
    assert kinds["i2t", 1] == 0 and kinds["i2t", 0] > 40
    assert min(kinds["t2i", 0], kinds["t2i", 1]) > 30
    batch = make(mix=MixConfig(start=[0, 1, 0], end=[0, 1, 0]), i2t_caption="random", seq_len=40).batch(0)
    captions = [text_between(ids_T, IDS.end_of_image_id, IDS.eos_id) for ids_T in batch.input_ids_BT]
    assert {caption.startswith("a ") for caption in captions} == {True, False}


def test_caption_dropout_makes_unconditional_sequences_of_t2i_only(make: Make) -> None:
    mix = MixConfig(start=[0, 1, 3], end=[0, 1, 3])
    batches = make(mix=mix, caption_dropout=0.25, batch_size=64)
    dropped = 0
    for step in range(12):
        has_no_caption = batches.batch(step).input_ids_BT[:, 1] == IDS.begin_of_image_id
        dropped += int((has_no_caption & is_task(batches, step, "t2i")).sum())
    assert 0.15 < dropped / (12 * 48) < 0.35
    everything = make(mix=mix, caption_dropout=1.0)
    lengths = lengths_of(everything.batch(0))
    assert (lengths[is_task(everything, 0, "t2i")] == IDS.image_tokens + 4).all()
    assert (lengths[is_task(everything, 0, "i2t")] > IDS.image_tokens + 4).all()


def test_supervision_decides_whether_conditions_are_targets(make: Make) -> None:
    batches = make(mix=I2T_AND_T2I, supervision="target", caption_dropout=0.0)
    target = batches.batch(0)
    everything = make(mix=I2T_AND_T2I, supervision="all", caption_dropout=0.0).batch(0)
    assert torch.equal(target.input_ids_BT, everything.input_ids_BT)
    is_visual, is_i2t = target.input_ids_BT >= IDS.text_vocab_size, is_task(batches, 0, "i2t")[:, None]
    assert not (target.target_mask_BT & is_visual & is_i2t).any()
    assert (target.target_mask_BT | ~is_visual | is_i2t).all()
    assert torch.equal(everything.target_mask_BT.sum(1), lengths_of(everything) - 1)


def test_long_captions_are_cut_and_counted_images_never(make: Make) -> None:
    batch = make(mix=I2T_AND_T2I, seq_len=IDS.image_tokens + 5, caption_dropout=0.0).batch(0)
    assert batch.truncated_captions == 16
    assert (lengths_of(batch) == IDS.image_tokens + 5).all()
    assert ((batch.input_ids_BT >= IDS.text_vocab_size).sum(1) == IDS.image_tokens).all()


def test_counts_and_statistics_of_two_ranks_and_a_resume_keep_to_the_schedule(make: Make) -> None:
    whole, parts = make(), [make(rank=rank, world_size=2) for rank in range(2)]
    statistics, schedule = MixStatistics(whole.keys), Schedule(whole.config.mix)
    drawn, tokens = Counter[str](), Counter[str]()
    for step in range(40):
        batch = whole.batch(step)
        of_tasks = [int(is_task(whole, step, task).sum()) for task in TASKS]
        assert of_tasks == list(schedule.counts(step, batch_size=16).values())
        assert sorted(batch.sources) == sorted(key.partition("/")[2] for key in Counter(batch.counts).elements())
        drawn.update(batch.counts)
        statistics.add(sum(part.batch(step).seen_KC for part in parts).numpy())
        if step == 20:
            state, statistics = statistics.state(), MixStatistics(whole.keys)
            statistics.load(json.loads(json.dumps(state)))
        for ids_T, planned in zip(batch.input_ids_BT, whole.plan(step), strict=True):
            is_visual = ids_T >= IDS.text_vocab_size
            tokens[f"data/text_tokens/{planned.key}"] += int((~is_visual & (ids_T != IDS.pad_id)).sum())
            if planned.task != "text":
                tokens[f"data/visual_tokens/{planned.key}"] += int(is_visual.sum())
        values = statistics.metrics(scheduled=whole.scheduled(step + 1))
        for key in [*TASKS, *whole.keys]:
            assert abs(values[f"data/samples/{key}"] - values[f"data/scheduled/{key}"]) < 1
    state = whole.state(40)
    assert sum(drawn.values()) == 40 * 16 and make(rank=3, world_size=4).state(40) == state
    assert state["draws"] == dict(drawn) == {key: values[f"data/samples/{key}"] for key in whole.keys}
    assert {key: count for key, count in values.items() if "_tokens/" in key} == tokens
    assert values["data/samples/text"] == drawn["text/prose"] + drawn["text/notes"]


def test_samples_of_a_shard_that_vanishes_are_replaced_and_counted(make: Make, tmp_path: Path) -> None:
    """Batches depend on (seed, step) and on which shards can be read: on every rank, and after a resume."""
    common = CODES | {"source": "photo", "num_shards": 4, "num_images": 10}
    paths = [write_codes(tmp_path, shard=shard, **common) for shard in range(4)]
    mix = MixConfig(start=[0, 1, 2], end=[0, 1, 2])
    options: dict[str, Any] = {"codes": str(tmp_path), "mix": mix, "seq_len": 40, "batch_size": 12}
    before = [make(**options).batch(step) for step in range(8)]
    reader, late, fresh = (make(**options) for _ in range(3))
    parts = [make(rank=rank, world_size=2, **options) for rank in range(2)]
    paths[2].unlink()
    after = [reader.batch(step) for step in range(8)]
    num_replaced = 0
    for step, (batch, untouched) in enumerate(zip(after, before, strict=True)):
        plan = reader.plan(step)
        assert batch.counts == untouched.counts and batch.sources == untouched.sources
        for row, planned in enumerate(plan):
            if planned.task == "i2t":
                is_same = torch.equal(batch.input_ids_BT[row, :9], untouched.input_ids_BT[row, :9])
                assert is_same == (planned.sample // 10 != 2)
        expected = sum(planned.sample // 10 == 2 for planned in plan)
        assert int(batch.seen_KC[:, 3].sum()) == expected and int(batch.seen_KC[:, 0].sum()) == 12
        num_replaced += expected
    assert num_replaced > 10 and after[-1].bad_files == 1
    assert same(late.batch(7), after[7]), "a resumed run has the same substitutes"
    assert torch.equal(torch.cat([part.batch(5).input_ids_BT for part in parts]), after[5].input_ids_BT)
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(UserError, match="3 of the 4 shards of 'photo' cannot be read, more than half"):
        for step in range(8):
            fresh.batch(step)


def test_only_the_sources_that_the_mix_needs_are_opened(make: Make) -> None:
    mix = MixConfig(start=[60, 1, 3], end=[12, 1, 3])
    expected = {"text/prose": 40, "text/notes": 20, "i2t/photo": 1, "t2i/photo": 2, "t2i/drawing": 1}
    assert make(mix=mix, batch_size=64).batch(0).counts == expected
    assert make(mix=I2T_AND_T2I, image_weights={"drawing": 1.0}).batch(0).counts == {"i2t/drawing": 8, "t2i/drawing": 8}
    text_only = {"mix": MixConfig(start=[1, 0, 0], end=[1, 0, 0]), "codes": "absent"}
    assert set(make(**text_only).batch(0).counts) == {"text/prose", "text/notes"}
    assert make(**text_only, text_seq_len=9).batch(0).input_ids_BT.shape == (16, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_weights": {"film": 1.0}}, "unknown source 'film'"),
        ({"image_weights": {"photo": 0.0}}, r"weights \[0.0\] of i2t sources \['photo'\]"),
        ({"texts": []}, "has text samples, but no source"),
        ({"codes": "absent"}, "no train codes in absent; run make codes first"),
        ({"fingerprint": "e"}, "fingerprint f, this run uses e"),
        ({"ids": replace(IDS, bits_per_subtoken=7)}, "4 codes of 12 bits; the model takes 4 codes of 2 x 7 bits"),
        ({"seq_len": IDS.image_tokens + 4}, rf"seq_len={IDS.image_tokens + 4} .* set it to {IDS.image_tokens + 5} or"),
        ({"batch_size": 6, "world_size": 4}, "batch_size=6 does not divide among 4"),
    ],
)
def test_mistakes_are_one_line(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_seq_len=1", "data.text_seq_len=1"),
        ("text_seq_len=4097", "data.text_seq_len=4097: .* data.seq_len=4096"),
        ("texts=[{name: a}, {name: a}]", "data.texts have the names"),
        ("mix.end=[0,0,0]", "mix.end"),
        ("mix.start=[60,1]", "start has 2 values"),
        ("mix.mode=share", "mode"),
    ],
)
def test_invalid_configs_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DataConfig, overrides=[override])
