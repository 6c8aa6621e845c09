"""Batches of conversations and the mix: exact counts, the same batch for any number of ranks, resume, missing codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_mix.batches.chat_batches import ChatBatches, join_codes
from data_mix.batches.config import ChatDataConfig
from data_mix.batches.mix import SequenceBatches
from data_mix.codes.shards import ShardHeader, open_code_sources, shard_path, write_shard
from data_mix.demo.scenes import ScenesSource
from data_mix.sources.config import ConversationSourceConfig
from tests.data_mix.batches.test_mix import CODES, I2T_AND_T2I, IDS, OPTIONS, TOKENIZER, same
from tests.helpers.code_shards import write_codes
from tests.helpers.llava_files import entry
from um3.core.errors import UserError
from um3.model.sequences import conversation_sequence
from um3.model.text_tokenizer import encode_turns

Make = Callable[..., ChatBatches]
SEQ_LEN = 90


IMAGES = [*(f"photo-0-{row}" for row in range(17)), *(f"other-0-{row}" for row in range(3))]
"""Images of the train and of the val shards."""
ABOUT_IMAGES = [entry(index, image, f"red {index}", "a dog") for index, image in enumerate(IMAGES)]
ABOUT_TEXT = [entry(index, None, f"the quick brown fox {index}") for index in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_codes(folder / "codes", source="photo", num_images=17, **CODES)
    write_codes(folder / "codes", source="other", split="val", num_images=3, **CODES)
    return folder


@pytest.fixture(scope="module")
def make(folder: Path) -> Make:
    """Opens batches of 12 samples, a third of them conversations; keywords change the config, ranks or batch size."""

    def _make(images: Any = ABOUT_IMAGES, texts: Any = ABOUT_TEXT, **changes: Any) -> ChatBatches:
        sources = []
        for name, rows, weight in (("pictures", images, 3.0), ("talk", texts, 1.0)):
            path = folder / f"{name}.json"
            path.write_text(json.dumps(rows))
            where = {"path": str(path), "images": str(folder)}
            sources.append(ConversationSourceConfig(name, weight=weight, val_fraction=0, **where))
        options = {name: changes.pop(name) for name in [*OPTIONS, "rank", "world_size"] if name in changes}
        values: dict[str, Any] = {"codes": str(folder / "codes"), "mix": I2T_AND_T2I, "seq_len": SEQ_LEN}
        values |= {"conversations": sources, "chat_share": 1 / 3} | changes
        return ChatBatches(ChatDataConfig(**values), cache=folder, **(OPTIONS | {"batch_size": 12} | options))

    return _make


def test_a_third_are_conversations_and_the_rest_is_the_mix(make: Make, folder: Path) -> None:
    batches = make()
    mix = SequenceBatches(batches.config, cache=folder, **(OPTIONS | {"batch_size": 8}))
    seen = torch.zeros(len(batches.keys), 4, dtype=torch.int64)
    for step in range(24):
        batch, of_mix = batches.batch(step), mix.batch(step)
        width = of_mix.input_ids_BT.shape[1]
        assert torch.equal(batch.input_ids_BT[:8, :width], of_mix.input_ids_BT)
        assert torch.equal(batch.target_mask_BT[:8, :width], of_mix.target_mask_BT)
        assert batch.sources[:8] == of_mix.sources and len(batch.sources) == 12
        assert batch.counts["chat/pictures"] == 3 and batch.counts["chat/talk"] == 1
        seen += batch.seen_KC
        for name, due in batches.scheduled(step + 1).items():
            mine = [row for key, row in zip(batches.keys, seen, strict=True) if f"{key}/".startswith(f"{name}/")]
            had = sum(int(row[0]) for row in mine)
            assert abs(had - due) < 1, name
    assert batches.scheduled(24)["chat"] == 96 and not seen[:, 3].any()


def test_a_conversation_has_the_codes_of_its_image_and_the_layout(make: Make, folder: Path) -> None:
    batches = make()
    opened = [open_code_sources(folder / "codes", split=split) for split in ("train", "val")]
    samples = [shards[row] for sources in opened for shards in sources.values() for row in range(len(shards))]
    visual = {sample.key: IDS.codes_to_ids(sample.codes_N) for sample in samples}
    expected = []
    for conversation in [*ABOUT_IMAGES, *ABOUT_TEXT]:
        answers = [message["value"] for message in conversation["conversations"][1::2]]
        turns = encode_turns([(f"question {i}?", answer) for i, answer in enumerate(answers)], tokenizer=TOKENIZER)
        image = conversation.get("image")
        expected.append(conversation_sequence(turns, image and visual[image], ids=IDS))
    found = set()
    for step in range(7):  # 21 draws of 20 conversations, 7 of 6
        batch = batches.batch(step)
        for ids_T, targets_T in zip(batch.input_ids_BT[8:], batch.target_mask_BT[8:], strict=True):
            length = int((ids_T != IDS.pad_id).sum())
            (index,) = [index for index, sample in enumerate(expected) if torch.equal(sample.input_ids, ids_T[:length])]
            assert torch.equal(expected[index].targets, targets_T[:length]) and not targets_T[length:].any()
            found.add(index)
    assert len(found) == 26


@pytest.mark.parametrize("packing", ["none", "documents"])
@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_ranks_share_the_batch(make: Make, world_size: int, packing: str) -> None:
    whole = make(packing=packing)
    parts = [make(packing=packing, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 5):
        batch, pieces = whole.batch(step), [part.batch(step) for part in parts]
        assert [len(piece.sources) for piece in pieces] == [12 // world_size] * world_size
        assert torch.equal(sum(piece.seen_KC for piece in pieces), batch.seen_KC)
        assert all(piece.counts == batch.counts for piece in pieces)
        rows = [ids_T[ids_T != IDS.pad_id].tolist() for piece in pieces for ids_T in piece.input_ids_BT]
        if packing == "none":
            assert sorted(rows) == sorted(ids_T[ids_T != IDS.pad_id].tolist() for ids_T in batch.input_ids_BT)
        assert sum(map(len, rows)) == int((batch.input_ids_BT != IDS.pad_id).sum())


def test_resume_and_other_conversations(make: Make) -> None:
    first, again = make(), make()
    state = json.loads(json.dumps(first.state(20)))
    for step in (20, 3):
        assert same(first.batch(step), again.batch(step))
    again.check_state(state)
    assert {"chat/pictures", "chat/talk", "chat codes", "images/photo"} == set(first.fingerprints())
    with pytest.raises(UserError, match="other data: fingerprints of chat/pictures"):
        make(images=[*ABOUT_IMAGES[1:], entry(0, None, "other")]).check_state(state)
    with pytest.raises(UserError, match="other data: sizes of chat/talk"):
        make(texts=ABOUT_TEXT[1:]).check_state(state)
    with pytest.raises(UserError, match="other data"):
        make(chat_share=0.5).check_state(state)


def test_long_conversations_are_cut_and_those_without_an_answer_replaced(make: Make) -> None:
    long = entry(90, "photo-0-1", "word " * 100)
    batches = make(images=[long, *ABOUT_IMAGES[:2]])
    batch = batches.batch(0)
    assert batch.input_ids_BT.shape[1] == SEQ_LEN and batch.truncated_captions == 1 and not batch.seen_KC[:, 3].any()
    silent = entry(91, "photo-0-1", "yes")
    silent["conversations"][0]["value"] = "<image>\n" + "why " * 100
    batches = make(images=[silent, *ABOUT_IMAGES[:2]])
    batch = batches.batch(0)
    assert batch.seen_KC[batches.keys.index("chat/pictures")].tolist()[0::3] == [3, 1]
    assert batch.target_mask_BT.any(1).all()
    with pytest.raises(UserError, match=r"chat/pictures: no conversation .* data.seq_len=90; raise it"):
        make(images=[silent]).batch(0)


def test_missing_codes_are_counted_and_more_than_a_hundredth_refused(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    many = [entry(index, f"photo-0-{index % 17}", "red") for index in range(200)]
    absent = entry(999, "coco/1.jpg", "red")
    batches = make(images=[*many, absent, absent])
    assert len(batches.chats["pictures"]) == 200
    assert "image without codes" in caplog.text and "2 (such as coco/1.jpg)" in caplog.text
    message = r"'pictures': only 200 of 203 .*image without codes in \S+codes: 3 \(such as coco/1.jpg\).*make codes"
    with pytest.raises(UserError, match=message):
        make(images=[*many, absent, absent, absent])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_share": 0.01}, "chat_share=0.01 of 12 samples is 0"),
        ({"chat_share": 0.99}, "chat_share=0.99 of 12 samples is 12"),
        ({"seq_len": 12}, "seq_len=12 cannot hold an image"),
        ({"world_size": 5}, "batch_size=12 does not divide among 5"),
        ({"fingerprint": "g"}, "tokenizer with fingerprint f"),
    ],
)
def test_mistakes_are_one_line(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_an_image_in_two_sources_and_one_without_caption_are_refused(make: Make, tmp_path: Path) -> None:
    write_codes(tmp_path, source="photo", num_images=17, captions=lambda row: [""], **CODES)
    with pytest.raises(UserError, match=r"photo-0-.* in .* has no caption; .* data.image_weights"):
        make(codes=str(tmp_path), images=ABOUT_IMAGES[:17]).batch(0)
    write_codes(tmp_path, source="photo", split="val", num_images=17, **CODES)
    with pytest.raises(UserError, match="image photo-0-0 has codes in the sources 'photo' and 'photo'"):
        make(codes=str(tmp_path))


@pytest.mark.parametrize("seed", [0, 1])
def test_scenes_have_the_seed_of_their_codes(seed: int, tmp_path: Path) -> None:
    scenes = ScenesSource(size=32, length=20, split="train", seed=seed)
    keys = [scenes.key(index) for index in range(20)]
    header = ShardHeader("f" * 64, bits=8, image_size=32, source="scenes")
    path = shard_path(tmp_path, split="train", source="scenes", shard=0)
    write_shard(path, header=header, keys=keys, codes_BN=np.zeros((20, 4), np.int64), captions=[["a"]] * 20)
    config = ConversationSourceConfig("scenes", kind="scenes", length=20)
    assert len(join_codes([config], codes=str(tmp_path), fingerprint="f" * 64)["scenes"]) == 20
