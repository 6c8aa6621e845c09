"""UM3: a language model learns QLIP's codes on the scheduled mix of text, image-to-text and text-to-image.

The loss of each half of the vocabulary, text and visual, is the cross entropy summed over its targets and divided
by their number in the global batch; each target is under the softmax of its own half (paper, Eq 6;
um3/model/split_softmax.py).

Legend: B sequences of this rank, T tokens of a sequence, N = B * (T - 1) targets, D width, V entries, S sub-tokens of a
patch, M supervised patches, Y = M * S sub-tokens, X = N + Y, K pairs of task and source, C counted values.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from data_mix.batches.mix import SequenceBatch, SequenceBatches
from data_mix.batches.packing import micro_batches
from data_mix.batches.statistics import MixStatistics
from data_mix.codes.shards import CodeShards, open_code_sources
from data_mix.conversations import open_conversations
from data_mix.prefetch import Prefetch
from data_mix.samples import BadSample, usable
from data_mix.sources.text import open_text_source
from tokenizer.modeling import load_qlip
from train.checkpoint import each_weight
from train.engine import autocast, set_attention, step_engine
from train.loop import Task, check_finite
from train.recipes.evaluation import Evaluation
from train.recipes.text_validation import TextValidation
from train.recipes.um3_start import UM3Start
from train.settings.um3 import UM3Config, UM3LossConfig
from um3.core.distributed import device, is_main, rank, sum_over_ranks, world_size
from um3.core.metrics import NO_SAMPLES
from um3.core.seeds import seed_everything
from um3.model.language_model import save_model
from um3.model.lora import freeze_base, merge, save_adapter
from um3.model.sequences import document_positions
from um3.model.split_softmax import LossMode, SplitLoss, split_softmax_loss
from um3.model.text_tokenizer import turn_texts, vocabulary_digest
from um3.model.visual_parts import BitEmbeddings, DepthHead
from um3.model.vocabulary import UnifiedVocabulary

VOCABULARY_DOCUMENTS = 2000
VOCABULARY_CAPTIONS = 5000
VOCABULARY_CONVERSATIONS = 2000
"""Of each source, at most."""
TASK_NAMES = ("text", "i2t", "t2i")
NUM_EXAMPLES, MAX_EXAMPLE_CHARACTERS, MAX_TRIED = 4, 200, 100
"""Of the training captions that the model's config.json holds as prompts to try; images of a source that are read."""


class UM3Objective(nn.Module):
    """The stock language model, with the sums of the split softmax loss as output.

    If `packed`, sequences hold several documents, which must not attend to each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ids: UnifiedVocabulary,
        loss: UM3LossConfig,
        bits: BitEmbeddings | None = None,
        depth: DepthHead | None = None,
        packed: bool = False,
    ):
        super().__init__()
        self.model, self.ids, self.loss, self.packed = model, ids, loss, packed
        self.bits, self.depth = bits, depth
        self.joins_rows = "flash" in (model.config._attn_implementation or "")

    def forward(
        self, input_ids_BT: torch.Tensor, target_mask_BT: torch.Tensor, mode: LossMode | None = None
    ) -> SplitLoss:
        """`mode` overrides the configured loss mode."""
        # Sequences are padded on the right, so causal attention is enough to hide the padding from every real position.
        targets_BT, supervised_BT = input_ids_BT[:, 1:], target_mask_BT[:, 1:]
        # Embeddings, head, hidden states: gradients are ready, and so summed for their norm, in the reverse order.
        inputs = (
            self._rows(input_ids_BT[:, :-1]) if self.depth is None else self.depth.embed(input_ids_BT, table=self._rows)
        )
        head_VD = self.model.lm_head.weight
        if self.bits is not None:
            head_VD = self.bits.add_to_head(head_VD)
        if self.depth is None:
            hidden_BTD = self._hidden(inputs, input_ids_BT=input_ids_BT[:, :-1])
        else:
            hidden_BTD, targets_BT, supervised_BT = self._sub_tokens(inputs, input_ids_BT, supervised_BT)
        return split_softmax_loss(
            hidden_BTD,
            lm_head_weight_VD=head_VD,
            target_ids_BT=targets_BT,
            supervised_BT=supervised_BT,
            text_vocab_size=self.ids.text_vocab_size,
            mode=mode or self.loss.mode,
            z_loss=self.loss.z_loss,
            chunk_tokens=self.loss.chunk_tokens,
            frozen_rows_FD=getattr(self.model.lm_head, "frozen_FD", None),
        )

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Embeddings of entries of the vocabulary."""
        embeddings = self.model.get_input_embeddings()(rows)
        return embeddings if self.bits is None else self.bits.add_to_inputs(embeddings, ids_BT=rows)

    def _sub_tokens(
        self, embeddings_BTSD: torch.Tensor, input_ids_BT: torch.Tensor, supervised_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (1, X, D), targets and mask (1, X): every position, then sub-tokens of supervised patches."""
        states_BTD = self._hidden(embeddings_BTSD[:, :-1].sum(2), input_ids_BT=input_ids_BT[:, :-1])
        targets_N, supervised_N = input_ids_BT[:, 1:].flatten(), supervised_BT.flatten()
        is_text_N = targets_N < self.ids.text_vocab_size
        places_M = (supervised_N & ~is_text_N).nonzero().squeeze(-1)
        has_patches = len(places_M) > 0
        if not has_patches:
            places_M = places_M.new_zeros(1)  # the head is used in every batch, so that a sharded backward cannot hang
        states_ND, embeddings_NSD = states_BTD.flatten(0, 1), embeddings_BTSD[:, 1:].flatten(0, 1)
        patches_MSD = cast(DepthHead, self.depth)(states_ND[places_M], embeddings_NSD[places_M])
        rows_Y = self.ids.ids_to_rows(targets_N[places_M]).clamp(min=0).flatten()
        # A patch's id is no entry; at its own position it is no target.
        targets_X = torch.cat([targets_N.masked_fill(~is_text_N, 0), rows_Y])
        supervised_X = torch.cat([supervised_N & is_text_N, torch.full_like(rows_Y, has_patches, dtype=torch.bool)])
        hidden_XD = torch.cat([states_ND, patches_MSD.flatten(0, 1)])
        return hidden_XD[None], targets_X[None], supervised_X[None]

    def _hidden(self, embeddings_BTD: torch.Tensor, *, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """The last hidden states.

        In packed sequences the positions separate the documents: without an attention mask, transformers starts a
        document at each position 0. SDPA gets one mask of (B, T, T) booleans for all layers, or none if every
        sequence is one document. Flash attention gets the documents' lengths, which works for a batch of one only,
        so the sequences are joined.
        """
        if not self.packed:
            return self.model.model(inputs_embeds=embeddings_BTD, use_cache=False).last_hidden_state
        positions_BT = document_positions(input_ids_BT, bos_id=self.ids.bos_id)
        inputs_BTD = embeddings_BTD
        if self.joins_rows:
            positions_BT, inputs_BTD = positions_BT.reshape(1, -1), inputs_BTD.reshape(1, -1, inputs_BTD.shape[-1])
        outputs = self.model.model(inputs_embeds=inputs_BTD, position_ids=positions_BT, use_cache=False)
        return outputs.last_hidden_state.view_as(embeddings_BTD)


class UM3Task(Task[UM3Config]):
    """Sequences of the scheduled mix, accumulated to the global batch; every target of a half has the same weight."""

    objective: UM3Objective
    unit = "samples"
    batches_of: type[SequenceBatches] = SequenceBatches

    def __init__(self, config: UM3Config):
        self.config, self.tokens_per_sample = config, config.data.seq_len
        qlip = load_qlip(config.visual_tokenizer)
        self.fingerprint = qlip.fingerprint()
        start = UM3Start(config, qlip=qlip, texts=self._vocabulary_texts())
        self.text_tokenizer, self.ids = start.text_tokenizer, start.ids
        self.rows = self.batches_of(
            config.data,
            ids=self.ids,
            text_tokenizer=self.text_tokenizer,
            batch_size=config.loop.batch_size,
            seed=config.loop.seed,
            cache=Path(config.loop.output_dir) / "cache",
            fingerprint=self.fingerprint,
            rank=rank(),
            world_size=world_size(),
        )
        examples = example_captions(self.rows.images, weights=config.data.image_weights)
        self.batches: Prefetch[SequenceBatch] = Prefetch(self.rows, num_steps=config.loop.max_steps)
        seed_everything(config.loop.seed, "um3 weights")
        self.model = start.model(self.rows.texts)
        if config.freezes_base:
            seed_everything(config.loop.seed, "adapters")
            freeze_base(self.model, ids=self.ids, lora=config.lora)
        self.model.config.um3 = (getattr(self.model.config, "um3", None) or {}) | {"examples": examples}
        generation: Any = self.model.generation_config
        generation.image_sampling = {**getattr(generation, "image_sampling", {}), **config.image_sampling}
        set_attention(self.model, config.engine)
        if config.engine.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        bits = BitEmbeddings(self.ids, model_config=self.model.config) if config.vocabulary.bit_embeddings else None
        depth = start.depth_head(self.model)
        if depth is not None:
            depth.is_checkpointed = config.engine.activation_checkpointing
        parts: dict[str, Any] = {"bits": bits, "depth": depth, "packed": config.data.packing == "documents"}
        self.objective = UM3Objective(self.model, ids=self.ids, loss=config.loss, **parts)
        self.text_validation: TextValidation | None = None
        if config.text_validation.every_steps:
            self.text_validation = TextValidation(config, ids=self.ids, text_tokenizer=self.text_tokenizer)
        self.evaluation = Evaluation(config) if config.evaluate.every_steps else None
        self.account = MixStatistics(self.rows.keys)
        self.truncated_captions = 0

    def _vocabulary_texts(self) -> Iterator[str]:
        """Documents, captions and conversations that train a text vocabulary, if the config asks for one."""
        for text in self.config.data.texts:
            yield from _first_usable(open_text_source(text, split="train"), VOCABULARY_DOCUMENTS)
        for shards in open_code_sources(self.config.data.codes, split="train").values():
            for sample in _first_usable(shards, VOCABULARY_CAPTIONS):
                yield from sample.captions
        for source in self.config.vocabulary.conversations:
            for conversation in _first_usable(open_conversations(source, split="train"), VOCABULARY_CONVERSATIONS):
                yield from map("".join, turn_texts(conversation.turns))

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        if self.text_validation is not None and self.text_validation.start_loss is None:
            self.text_validation.start_loss = self.text_validation.loss(self.engine)
        batch = self.batches.batch(step)
        learning_rate = self.set_rate(self.engine, config.optimizer, step=step)
        supervised_BT = batch.target_mask_BT[:, 1:]
        is_text_BT = batch.input_ids_BT[:, 1:] < self.ids.text_vocab_size
        visual = (supervised_BT & ~is_text_BT).sum() * self.ids.subtokens_per_id
        counts_2 = torch.stack([(supervised_BT & is_text_BT).sum(), visual])
        counts_2 = sum_over_ranks(counts_2.to(device()).float())
        weights_2 = torch.tensor([config.loss.text_weight, config.loss.visual_weight], device=device())
        # DeepSpeed averages gradients over ranks and accumulation steps; a half's loss is its sum / its global count.
        scales_2 = weights_2 * world_size() * self.accumulation / counts_2.clamp(min=1)
        sums_4 = torch.zeros(4, device=device())
        ids_and_masks = micro_batches(
            batch.input_ids_BT, batch.target_mask_BT, parts=self.accumulation, pad_id=self.ids.pad_id
        )
        for input_ids_BT, target_mask_BT in ids_and_masks:
            with autocast(config.engine):
                loss = self.engine(input_ids_BT.to(device()), target_mask_BT.to(device()))
            parts_4 = torch.stack([loss.text_sum, loss.visual_sum, loss.text_z_sum, loss.visual_z_sum])
            total = (parts_4.view(2, 2) * scales_2).sum()
            check_finite({"loss": float(total.detach())}, source="samples of " + ", ".join(sorted(set(batch.sources))))
            self.engine.backward(total)
            norm = step_engine(self.engine)
            sums_4 += parts_4.detach()
        values = self._loss_metrics(batch, sums_4=sum_over_ranks(sums_4), counts_2=counts_2)
        values |= self._mix_metrics(batch, step=step)
        return values | {"optim/lr": learning_rate, "optim/grad_norm": norm}

    def _loss_metrics(self, batch: SequenceBatch, *, sums_4: torch.Tensor, counts_2: torch.Tensor) -> dict[str, float]:
        weights = {"text": self.config.loss.text_weight, "visual": self.config.loss.visual_weight}
        means_2 = sums_4.view(2, 2) / counts_2.clamp(min=1)
        values = {"train/loss": 0.0}
        for index, (half, weight) in enumerate(weights.items()):
            values["train/loss"] += weight * float(means_2[:, index].sum())
            values[f"data/targets_{half}"] = float(counts_2[index])
            if counts_2[index] > 0:
                values[f"train/loss_{half}"] = float(means_2[0, index])
        for name in TASK_NAMES:
            samples = sum(count for key, count in batch.counts.items() if key.startswith(name + "/"))
            values[f"data/rows_{name}"] = float(samples)
        return values

    def _mix_metrics(self, batch: SequenceBatch, *, step: int) -> dict[str, float]:
        """Samples and tokens of all ranks so far, with those of the schedule, and this step's share of padding."""
        own = [batch.truncated_captions, batch.bad_files, batch.input_ids_BT.numel()]
        sums = sum_over_ranks(torch.cat([batch.seen_KC.flatten(), torch.tensor(own)]).to(device())).cpu()
        seen_KC, (truncated, skipped_shards, positions) = sums[:-3].view(batch.seen_KC.shape), sums[-3:].tolist()
        self.account.add(seen_KC.numpy())
        self.truncated_captions += truncated
        return self.account.metrics(scheduled=self.rows.scheduled(step + 1)) | {
            "data/padding": 1 - int(seen_KC[:, 1:3].sum()) / positions,
            "data/truncated_captions": float(self.truncated_captions),
            "data/skipped_files": float(skipped_shards),
        }

    def evaluate(self, step: int) -> dict[str, float]:
        values: dict[str, float] = {}
        settings, is_last = self.config, step == self.config.loop.max_steps
        if self.text_validation is not None and (is_last or step % settings.text_validation.every_steps == 0):
            values |= self.text_validation.measure(self.engine, step=step)
        self.shown = NO_SAMPLES
        if self.evaluation is not None and step % settings.evaluate.every_steps == 0:
            values |= self.evaluation.measure(self._write_model, step=step)
            self.shown = self.evaluation.shown
        return values

    def fingerprints(self) -> dict[str, str]:
        return self.rows.fingerprints() | {"vocabulary": vocabulary_digest(self.text_tokenizer)}

    def state(self, step: int) -> dict[str, Any]:
        state = self.rows.state(step) | {"seen": self.account.state(), "truncated_captions": self.truncated_captions}
        if self.text_validation is not None:
            state["text_loss_at_start"] = self.text_validation.start_loss
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data; take over the counts of one that fits."""
        self.rows.check_state(state)
        self.account.load(state["seen"])
        self.truncated_captions = state["truncated_captions"]
        if self.text_validation is not None:
            self.text_validation.start_loss = state["text_loss_at_start"]

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        self._write_model(folder / "model", adapter=folder / "adapter" if self.config.lora.rank else None)
        return {"qlip_fingerprint": self.fingerprint, "truncated_captions": self.truncated_captions}

    def _write_model(self, folder: Path, *, adapter: Path | None = None) -> None:
        """Write the model with its current weights, and the folder of its `adapter` (a collective call)."""
        weights = {name.removeprefix("model."): tensor for name, tensor in each_weight(self.engine)}
        if self.objective.bits is not None:
            self.objective.bits.fold(weights)
        depth = {name.removeprefix("depth."): weights.pop(name) for name in list(weights) if name.startswith("depth.")}
        if is_main():
            lora = self.config.lora
            if adapter is not None:
                save_adapter(adapter, weights=weights, lora=lora, base_model=self.config.model.base_model)
            save_model(
                folder,
                model=self.model,
                text_tokenizer=self.text_tokenizer,
                ids=self.ids,
                visual_tokenizer=self.config.visual_tokenizer,
                state_dict=merge(weights, lora=lora),
                depth=depth or None,
            )


def _first_usable(source: Any, count: int) -> Iterator[Any]:
    """The first `count` items of a source, without those that cannot be used."""
    return usable(source.__getitem__, range(min(len(source), count)))


def example_captions(images: Mapping[str, CodeShards], *, weights: Mapping[str, float]) -> list[str]:
    """A few short captions of the first training images, of each source in turn; of those in `weights`, if any are."""
    used = [shards for name, shards in images.items() if not weights or name in weights]
    captions: dict[str, None] = {}
    for index, shards in itertools.product(range(MAX_TRIED), used):
        with contextlib.suppress(BadSample, IndexError):
            first = shards[index].captions[:1]
            captions |= dict.fromkeys(text for text in first if 0 < len(text) <= MAX_EXAMPLE_CHARACTERS)
        if len(captions) == NUM_EXAMPLES:
            break
    return list(captions)


build_task = UM3Task
