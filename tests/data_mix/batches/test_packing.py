"""Packed sequences: the same samples in fewer sequences, and documents that do not attend to each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_mix.batches.config import DataConfig
from data_mix.batches.mix import SequenceBatches
from data_mix.batches.packing import first_fit, micro_batches
from data_mix.batches.schedule import MixConfig
from data_mix.sources.text import TextSourceConfig
from tests.data_mix.batches.test_mix import CODES, IDS, OPTIONS, PROSE
from tests.helpers.code_shards import write_codes
from tests.helpers.tiny_um3 import make_base
from train.recipes.um3 import UM3Objective
from train.settings.um3 import UM3LossConfig

SEQ_LEN = 40
MODEL = {"vocab_size": IDS.vocab_size, "initializer_range": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose, and codes with captions of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    captions = [["dogs" + " and a fox" * (row % 4)] for row in range(30)]
    write_codes(folder, source="photo", num_images=30, captions=captions.__getitem__, **CODES)
    (folder / "prose.txt").write_text("\n\n".join(PROSE))
    return folder


def batches_of(folder: Path, *, packing: Any, text: float = 1, **ranks: int) -> SequenceBatches:
    mix = MixConfig(start=[text, 2, 3], end=[text, 2, 3], calm_down_steps=0)
    texts = [TextSourceConfig("prose", path=str(folder / "prose.txt"), val_fraction=0)]
    config = DataConfig(str(folder), texts, mix=mix, seq_len=SEQ_LEN, packing=packing, caption_dropout=0.2)
    return SequenceBatches(config, cache=folder, **(OPTIONS | {"batch_size": 24} | ranks))


def test_first_fit_keeps_the_order_and_the_room() -> None:
    assert first_fit([6, 5, 4, 10, 3, 2], seq_len=10) == [0, 1, 0, 2, 1, 1]
    lengths = np.random.default_rng(0).integers(1, 50, size=200).tolist()
    numbers = first_fit(lengths, seq_len=50)
    used = np.bincount(numbers, weights=lengths)
    assert used.max() <= 50 and sorted(set(numbers)) == list(range(len(used)))
    assert used.mean() / 50 > 0.85


@pytest.mark.parametrize("ranks", [{}, *({"rank": rank, "world_size": 4} for rank in range(4))])
def test_a_packed_batch_holds_the_same_samples_in_fewer_sequences(folder: Path, ranks: dict[str, int]) -> None:
    plain, packed = (batches_of(folder, packing=packing, **ranks) for packing in ("none", "documents"))
    for step in range(8):
        one, other = plain.batch(step), packed.batch(step)
        assert len(other.input_ids_BT) < len(one.input_ids_BT) == 24 // ranks.get("world_size", 1)
        assert other.input_ids_BT.shape[1] <= SEQ_LEN
        lengths = (one.input_ids_BT != IDS.pad_id).sum(1).tolist()
        used = [0] * len(other.input_ids_BT)
        for sample, number in enumerate(first_fit(lengths, seq_len=SEQ_LEN)):
            place = slice(used[number], used[number] + lengths[sample])
            for name in ("input_ids_BT", "target_mask_BT"):
                expected = getattr(one, name)[sample, : lengths[sample]]
                assert torch.equal(getattr(other, name)[number, place], expected)
            used[number] += lengths[sample]
        assert all((ids_T[end:] == IDS.pad_id).all() for ids_T, end in zip(other.input_ids_BT, used, strict=True))
        assert int(other.target_mask_BT.sum()) == int(one.target_mask_BT.sum())
        assert one.counts == other.counts and one.sources == other.sources
        assert torch.equal(one.seen_KC, other.seen_KC)
    assert packed.state(5) == plain.state(5)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "joined"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_a_changed_neighbour_changes_no_logit(kind: str, attention: str, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling flex attention takes minutes on a CPU
    model = make_base(kind, **MODEL)
    model.set_attn_implementation("sdpa" if attention == "joined" else attention)
    objective = UM3Objective(model, ids=IDS, loss=UM3LossConfig(), packed=True)
    objective.joins_rows = attention == "joined"  # the layout for flash attention
    all_ids_BT, embed = batches_of(folder, packing="documents").batch(0).input_ids_BT, model.get_input_embeddings()
    most_documents = int((all_ids_BT == IDS.bos_id).sum(1).argmax())
    for ids_BT in (all_ids_BT, all_ids_BT[most_documents][None]):
        starts_BT = ids_BT == IDS.bos_id
        second_BT = starts_BT.cumsum(1) == 2  # the second document of each sequence that has one
        changed_BT = ~second_BT & ~starts_BT
        other_BT = ids_BT.clone()
        other_BT[changed_BT] = torch.randint(5, IDS.vocab_size, (int(changed_BT.sum()),))
        hidden, other = (objective._hidden(embed(ids), input_ids_BT=ids) for ids in (ids_BT, other_BT))
        logits, other_logits = model.lm_head(hidden), model.lm_head(other)
        assert second_BT.any() and torch.equal(logits[second_BT], other_logits[second_BT])
        assert not torch.allclose(logits[changed_BT], other_logits[changed_BT], atol=1e-3)
        for number in second_BT.any(1).nonzero().flatten().tolist():
            alone = model(input_ids=ids_BT[number, second_BT[number]][None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[number, second_BT[number]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [3, 24])
def test_losses_and_gradients_of_packed_and_unpacked_batches_agree(parts: int, folder: Path) -> None:
    """Without text, whose samples may hold several documents: those attend to each other unless they are packed."""
    sums, gradients = [], []
    for packing in ("none", "documents"):
        model = make_base("qwen3", **MODEL)
        objective = UM3Objective(model, ids=IDS, loss=UM3LossConfig(), packed=packing == "documents")
        ids_BT, mask_BT = batches_of(folder, packing=packing, text=0).batch(1)[:2]
        total = torch.zeros(2)
        for part in micro_batches(ids_BT, mask_BT, parts=parts, pad_id=IDS.pad_id):
            loss = objective(*part)
            (loss.text_sum + loss.visual_sum).backward()
            total += torch.stack([loss.text_sum, loss.visual_sum]).detach()
        sums.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_parts_are_equal_or_nearly_and_never_empty(folder: Path) -> None:
    batch = batches_of(folder, packing="documents").batch(0)
    num_sequences = len(batch.input_ids_BT)
    for parts in (1, 4, num_sequences, 24):
        pieces = list(micro_batches(batch.input_ids_BT, batch.target_mask_BT, parts=parts, pad_id=IDS.pad_id))
        sizes = [len(ids_BT) for ids_BT, _ in pieces]
        assert len(pieces) == parts and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        ids_BT, mask_BT = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        assert torch.equal(ids_BT[:num_sequences], batch.input_ids_BT)
        assert (ids_BT[num_sequences:] == IDS.pad_id).all() and not mask_BT[num_sequences:].any()
