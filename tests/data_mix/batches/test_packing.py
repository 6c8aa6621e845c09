"""Packed rows: the same samples in fewer rows, and documents that do not see each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data_mix.batches.config import DataConfig
from data_mix.batches.mix import RowBatch, UM3Rows
from data_mix.batches.packing import first_fit, lay_out, micro_batches
from data_mix.batches.schedule import MixConfig
from data_mix.batches.token_stream import TokenStream
from data_mix.codes.shards import ShardHeader, open_code_sources, shard_path, write_shard
from data_mix.sources.text import ListedDocuments
from train.config import UM3LossConfig
from train.recipes.um3 import UM3Objective
from um3.core.errors import UserError
from um3.model.sequences import Row
from um3.model.text_tokenizer import make_vocabulary, train_text_tokenizer

BITS, NUM_PATCHES, SEQ_LEN = 8, 4, 40
PROSE = [f"chapter {i}: the quick brown fox number {i * 37} jumps over {i} lazy dogs" for i in range(20)]
TOKENIZER = train_text_tokenizer(PROSE, vocab_size=300)
IDS = make_vocabulary(TOKENIZER, subtokens=2, bits_per_subtoken=4, num_patches=NUM_PATCHES)
SIZES: dict[str, Any] = dict(
    vocab_size=IDS.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    header = ShardHeader(fingerprint="f", bits=BITS, image_size=16, split="train", source="photo")
    codes_BN = np.random.default_rng(0).integers(0, 2**BITS, size=(30, NUM_PATCHES))
    captions = [["dogs" + " and a fox" * (row % 4)] for row in range(30)]
    path = shard_path(folder, split="train", source="photo", shard=0)
    write_shard(path, header=header, keys=[str(row) for row in range(30)], codes_BN=codes_BN, captions=captions)
    return folder


def rows_of(codes: Path, cache: Path, *, packing: Any, rank: int = 0, world_size: int = 1, text: float = 1) -> UM3Rows:
    mix = MixConfig(start=[text, 2, 3], end=[text, 2, 3], calm_down_steps=0)
    documents = ListedDocuments("prose", PROSE)
    stream = TokenStream(documents, tokenizer=TOKENIZER, ids=IDS, seq_len=SEQ_LEN, cache=cache)
    return UM3Rows(
        DataConfig(seq_len=SEQ_LEN, packing=packing, mix=mix, caption_dropout=0.2),
        images=open_code_sources(codes, split="train"), texts={"prose": stream}, ids=IDS, text_tokenizer=TOKENIZER,
        batch_size=24, seed=0, rank=rank, world_size=world_size,
    )  # fmt: skip


def sample_of(batch: RowBatch, number: int) -> tuple[list[int], list[bool]]:
    """Ids and targets of one sample of a batch, wherever it lies."""
    row, start, length = (int(places[number]) for places in (batch.row_S, batch.start_S, batch.lengths_S))
    place = slice(start, start + length)
    return batch.input_ids_BT[row, place].tolist(), batch.target_mask_BT[row, place].tolist()


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**SIZES))
    return model


def test_first_fit_keeps_the_order_and_the_room() -> None:
    assert first_fit([6, 5, 4, 10, 3, 2], seq_len=10) == [0, 1, 0, 2, 1, 1]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, size=200).tolist()
    rows = first_fit(lengths, seq_len=50)
    used = [sum(length for length, other in zip(lengths, rows, strict=True) if other == row) for row in set(rows)]
    assert max(used) <= 50 and sorted(set(rows)) == list(range(max(rows) + 1))
    assert sum(used) / (50 * len(used)) > 0.85


def test_a_packed_batch_holds_the_same_samples_in_fewer_rows(codes: Path, tmp_path: Path) -> None:
    plain, packed = (rows_of(codes, tmp_path, packing=packing) for packing in ("none", "documents"))
    for step in range(8):
        one, other = plain.batch(step), packed.batch(step)
        assert len(one.input_ids_BT) == 24 and len(other.input_ids_BT) < 20
        assert other.input_ids_BT.shape[1] <= SEQ_LEN
        assert [sample_of(one, number) for number in range(24)] == [sample_of(other, number) for number in range(24)]
        assert one.counts == other.counts and torch.equal(one.task_S, other.task_S)
        assert torch.equal(one.seen_KC, other.seen_KC) and one.sources == other.sources
        assert int(other.target_mask_BT.sum()) == int(one.target_mask_BT.sum())
        full = {int(row) for row, length in zip(other.row_S, other.lengths_S, strict=True) if length == SEQ_LEN}
        assert all(other.row_S.tolist().count(row) == 1 for row in full)
    assert packed.state(5) == plain.state(5)


def test_every_rank_packs_its_own_samples(codes: Path, tmp_path: Path) -> None:
    whole = rows_of(codes, tmp_path, packing="documents").batch(3)
    parts = [rows_of(codes, tmp_path, packing="documents", rank=rank, world_size=4).batch(3) for rank in range(4)]
    samples = [sample_of(part, number) for part in parts for number in range(6)]
    assert samples == [sample_of(whole, number) for number in range(24)]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "joined"])
def test_a_changed_neighbour_changes_no_logit(kind: str, attention: str, codes: Path, tmp_path: Path) -> None:
    model = model_of(kind)
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    objective = UM3Objective(model, ids=IDS, loss=UM3LossConfig(), packed=True)
    objective.joins_rows = attention == "joined"  # what flash attention is given
    batch = rows_of(codes, tmp_path, packing="documents").batch(0)
    embed, starts_BT = model.get_input_embeddings(), batch.input_ids_BT == IDS.bos_id
    shared = int(starts_BT.sum(1).argmax())  # the row of the most documents
    for rows in (slice(None), slice(shared, shared + 1)):
        ids_BT = batch.input_ids_BT[rows]
        second_BT = starts_BT[rows].cumsum(1) == 2  # the second document of each row that has one
        changed_BT = ~second_BT & ~starts_BT[rows]
        other_BT = ids_BT.clone()
        other_BT[changed_BT] = torch.randint(5, IDS.vocab_size, (int(changed_BT.sum()),))
        hidden, other = (objective._hidden(embed(ids), input_ids_BT=ids) for ids in (ids_BT, other_BT))
        logits, other_logits = model.lm_head(hidden), model.lm_head(other)
        assert second_BT.any() and torch.equal(logits[second_BT], other_logits[second_BT])
        assert not torch.allclose(logits[changed_BT], other_logits[changed_BT], atol=1e-3)
        for row in second_BT.any(1).nonzero().flatten().tolist():
            alone = model(input_ids=ids_BT[row, second_BT[row]][None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, second_BT[row]], alone, atol=1e-5, rtol=1e-5)


def test_without_the_restarts_the_neighbour_leaks(codes: Path, tmp_path: Path) -> None:
    """The test above can fail: with the positions of an unpacked row, the neighbour is seen."""
    model = model_of("qwen3")
    objective = UM3Objective(model, ids=IDS, loss=UM3LossConfig(), packed=False)
    ids_BT = rows_of(codes, tmp_path, packing="documents").batch(0).input_ids_BT
    last_BT = (ids_BT == IDS.bos_id).cumsum(1) > 1
    other_BT = torch.where(last_BT | (ids_BT == IDS.bos_id), ids_BT, 7)
    one, other = (objective._hidden(model.get_input_embeddings()(ids), input_ids_BT=ids) for ids in (ids_BT, other_BT))
    assert not torch.allclose(one[last_BT], other[last_BT], atol=1e-3)


@pytest.mark.parametrize("parts", [3, 24])
def test_losses_and_gradients_of_packed_and_unpacked_batches_agree(parts: int, codes: Path, tmp_path: Path) -> None:
    """Without text, whose samples may hold several documents: those see each other where they are not packed."""
    sums, gradients = [], []
    for packing in ("none", "documents"):
        model = model_of("qwen3")
        objective = UM3Objective(model, ids=IDS, loss=UM3LossConfig(), packed=packing == "documents")
        batch = rows_of(codes, tmp_path, packing=packing, text=0).batch(1)
        total = torch.zeros(2)
        for ids_BT, targets_BT in micro_batches(
            batch.input_ids_BT, batch.target_mask_BT, parts=parts, pad_id=IDS.pad_id
        ):
            assert len(ids_BT)
            loss = objective(ids_BT, targets_BT)
            (loss.text_sum + loss.visual_sum).backward()
            total += torch.stack([loss.text_sum, loss.visual_sum]).detach()
        sums.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_parts_are_equal_or_nearly_and_never_empty(codes: Path, tmp_path: Path) -> None:
    batch = rows_of(codes, tmp_path, packing="documents").batch(0)
    rows = len(batch.input_ids_BT)
    for parts in (1, 4, rows, 24):
        pieces = list(micro_batches(batch.input_ids_BT, batch.target_mask_BT, parts=parts, pad_id=IDS.pad_id))
        sizes = [len(ids_BT) for ids_BT, _ in pieces]
        assert len(pieces) == parts and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        joined = torch.cat([ids_BT for ids_BT, _ in pieces])
        assert torch.equal(joined[:rows], batch.input_ids_BT)
        assert (joined[rows:] == IDS.pad_id).all() and not torch.cat([mask for _, mask in pieces])[rows:].any()


def test_a_sample_longer_than_the_row_is_one_line() -> None:
    sample = Row(torch.arange(9), torch.ones(9, dtype=torch.bool))
    for packed in (False, True):
        with pytest.raises(UserError, match=r"a sample of 9 ids is longer than a row of 8; raise data\.seq_len"):
            lay_out([sample], seq_len=8, packed=packed, pad_id=0)
