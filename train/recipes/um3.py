"""UM3: a language model learns QLIP's codes on the scheduled mix of text, image-to-text and text-to-image.

Loss = for each half, text and visual, the cross entropy summed over its supervised tokens / their count in the
global batch; each target under the softmax of its own half (paper, Eq 6).

Legend: B rows of this rank, T tokens of a row, D width, V entries, K pairs of task and source, C what is counted.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_mix.batches.mix import RowBatch, open_rows
from data_mix.batches.packing import micro_batches
from data_mix.batches.statistics import MixAccount
from data_mix.codes.shards import open_code_sources
from data_mix.prefetch import Prefetch
from data_mix.samples import BadSample
from data_mix.sources.text import open_text_source
from tokenizer.modeling import load_qlip
from train.checkpoint import full_weights
from train.config import UM3Config, UM3LossConfig
from train.engine import autocast, build_engine, set_attention, split_batch, step_engine
from train.loop import check_finite
from train.optim import schedule_factor, set_learning_rate
from train.recipes.evaluation import Evaluation
from train.recipes.text_validation import ForgettingGuard
from train.recipes.um3_start import Start
from um3.core.distributed import device, is_main, rank, sum_over_ranks, world_size
from um3.core.errors import UserError
from um3.core.seeds import seed_everything
from um3.model.bit_embeddings import SharedBits
from um3.model.language_model import save_model
from um3.model.sequences import document_positions
from um3.model.split_softmax import LossMode, SplitLoss, split_softmax_loss
from um3.model.text_tokenizer import vocabulary_digest
from um3.model.vocabulary import UnifiedVocabulary

TOKENIZER_DOCUMENTS = 2000
TOKENIZER_CAPTIONS = 5000
TASK_NAMES = ("text", "i2t", "t2i")


def build_task(config: UM3Config) -> "UM3Task":
    """The recipe as the loop runs it."""
    return UM3Task(config)


class UM3Objective(nn.Module):
    """The stock language model with split-softmax sums as output; `bits` adds to its visual rows while it trains.

    packed: rows hold documents side by side, which must not see each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ids: UnifiedVocabulary,
        loss: UM3LossConfig,
        bits: SharedBits | None = None,
        packed: bool = False,
    ):
        super().__init__()
        self.model, self.ids, self.loss, self.bits, self.packed = model, ids, loss, bits, packed
        self.joins_rows = "flash" in (model.config._attn_implementation or "")

    def forward(
        self, input_ids_BT: torch.Tensor, target_mask_BT: torch.Tensor, mode: LossMode | None = None
    ) -> SplitLoss:
        """`mode`: other than the loss's own."""
        # Rows are padded on the right, so causal attention alone keeps padding out of every real position.
        embeddings_BTD = self.model.get_input_embeddings()(input_ids_BT[:, :-1])
        head_VD = self.model.lm_head.weight
        if self.bits is not None:
            embeddings_BTD = self.bits.add_to_inputs(embeddings_BTD, ids_BT=input_ids_BT[:, :-1])
            head_VD = self.bits.add_to_head(head_VD)
        hidden_BTD = self._hidden(embeddings_BTD, input_ids_BT=input_ids_BT[:, :-1])
        return split_softmax_loss(
            hidden_BTD,
            lm_head_weight_VD=head_VD,
            target_ids_BT=input_ids_BT[:, 1:],
            supervised_BT=target_mask_BT[:, 1:],
            text_vocab_size=self.ids.text_vocab_size,
            mode=mode or self.loss.mode,
            z_loss=self.loss.z_loss,
            chunk_tokens=self.loss.chunk_tokens,
        )

    def _hidden(self, embeddings_BTD: torch.Tensor, *, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """The last hidden states.

        Packed, the positions alone tell the documents apart: without an attention mask transformers takes each
        restart for a document. SDPA gets one mask of (B, T, T) booleans for all layers, and none where every row is
        one document; flash attention gets the documents' lengths, but from a batch of one row only, so its rows are
        joined to one (each begins at position 0).
        """
        if not self.packed:
            return self.model.model(inputs_embeds=embeddings_BTD, use_cache=False).last_hidden_state
        positions_BT = document_positions(input_ids_BT, bos_id=self.ids.bos_id)
        inputs_BTD = embeddings_BTD
        if self.joins_rows:
            positions_BT, inputs_BTD = positions_BT.reshape(1, -1), inputs_BTD.reshape(1, -1, inputs_BTD.shape[-1])
        outputs = self.model.model(inputs_embeds=inputs_BTD, position_ids=positions_BT, use_cache=False)
        return outputs.last_hidden_state.view_as(embeddings_BTD)


class UM3Task:
    """Rows of the schedule, accumulated to the global batch; every token of it counts the same."""

    unit = "rows"

    def __init__(self, config: UM3Config):
        self.config = config
        qlip = load_qlip(config.visual_tokenizer)
        self.fingerprint = qlip.fingerprint()
        start = Start(config, qlip=qlip, texts=self._texts())
        self.text_tokenizer, self.ids = start.text_tokenizer, start.ids
        self.vocabulary = vocabulary_digest(self.text_tokenizer)
        self.rows = open_rows(
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
        self.batches: Prefetch[RowBatch] = Prefetch(self.rows, num_steps=config.loop.max_steps)
        seed_everything(config.loop.seed, "um3 weights")
        self.model = start.model(self.rows.texts)
        set_attention(self.model, config.engine)
        if config.engine.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        bits = SharedBits(self.ids, model_config=self.model.config) if config.vocabulary.bit_embeddings else None
        packed = config.data.packing == "documents"
        self.objective = UM3Objective(self.model, ids=self.ids, loss=config.loss, bits=bits, packed=packed)
        self.guard = (
            ForgettingGuard(config, ids=self.ids, text_tokenizer=self.text_tokenizer)
            if config.text_validation.every_steps
            else None
        )
        self.evaluation = Evaluation(config) if config.evaluate.every_steps else None
        self.account = MixAccount(self.rows.keys)
        self.truncated_captions = 0

    def _texts(self) -> Any:
        """Documents and captions for a vocabulary of our own."""
        for text in self.config.data.texts:
            documents = open_text_source(text, split="train")
            for index in range(min(len(documents), TOKENIZER_DOCUMENTS)):
                with contextlib.suppress(BadSample):
                    yield documents[index]
        for shards in open_code_sources(self.config.data.codes, split="train").values():
            for index in range(min(len(shards), TOKENIZER_CAPTIONS)):
                with contextlib.suppress(BadSample):
                    yield from shards[index].captions

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.objective}

    def build_engines(self) -> dict[str, Any]:
        config = self.config
        self.micro_rows, self.accumulation = split_batch(config.loop)
        self.engine = build_engine(
            self.objective,
            optimizer=config.optimizer,
            engine=config.engine,
            micro_batch_size=self.micro_rows,
            accumulation_steps=self.accumulation,
        )
        return {"model": self.engine}

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        if self.guard is not None:
            self.guard.begin(self.engine)
        batch = self.batches.batch(step)
        factor = schedule_factor(step, max_steps=config.loop.max_steps, config=config.optimizer)
        set_learning_rate(self.engine.optimizer, factor=factor)
        supervised_BT = batch.target_mask_BT[:, 1:]
        is_text_BT = batch.input_ids_BT[:, 1:] < self.ids.text_vocab_size
        counts_2 = torch.stack([(supervised_BT & is_text_BT).sum(), (supervised_BT & ~is_text_BT).sum()])
        counts_2 = sum_over_ranks(counts_2.to(device()).float())
        weights_2 = torch.tensor([config.loss.text_weight, config.loss.visual_weight], device=device())
        # DeepSpeed averages gradients over ranks and accumulation steps; a half's loss is a sum over its global count.
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
            check_finite({"loss": float(total.detach())}, source="rows of " + ", ".join(sorted(set(batch.sources))))
            self.engine.backward(total)
            norm = step_engine(self.engine)
            sums_4 += parts_4.detach()
        values = self._report(batch, sums_4=sum_over_ranks(sums_4), counts_2=counts_2)
        return (
            values
            | self._mix_report(batch, step=step)
            | self._watch(step + 1)
            | self._evaluate(step + 1)
            | {
                "optim/lr": config.optimizer.lr * factor,
                "optim/grad_norm": norm,
            }
        )

    def _report(self, batch: RowBatch, *, sums_4: torch.Tensor, counts_2: torch.Tensor) -> dict[str, float]:
        weights = {"text": self.config.loss.text_weight, "visual": self.config.loss.visual_weight}
        means_2 = sums_4.view(2, 2) / counts_2.clamp(min=1)
        values = {"train/loss": 0.0}
        for index, (half, weight) in enumerate(weights.items()):
            values["train/loss"] += weight * float(means_2[:, index].sum())
            values[f"data/targets_{half}"] = float(counts_2[index])
            if counts_2[index] > 0:
                values[f"train/loss_{half}"] = float(means_2[0, index])
        for name in TASK_NAMES:
            rows = sum(count for key, count in batch.counts.items() if key.startswith(name + "/"))
            values[f"data/rows_{name}"] = float(rows)
        return values

    def _mix_report(self, batch: RowBatch, *, step: int) -> dict[str, float]:
        """What all ranks have had up to now, against the schedule; share of padding in this step's rows."""
        own = [batch.truncated_captions, batch.shards_set_aside, batch.input_ids_BT.numel()]
        sums = sum_over_ranks(torch.cat([batch.seen_KC.flatten(), torch.tensor(own)]).to(device())).cpu()
        seen_KC, (truncated, set_aside, places) = sums[:-3].view(batch.seen_KC.shape), sums[-3:].tolist()
        self.account.add(seen_KC.numpy())
        self.truncated_captions += truncated
        return self.account.metrics(due=self.rows.due(step + 1)) | {
            "data/padding": 1 - int(seen_KC[:, 1:3].sum()) / places,
            "data/truncated_captions": float(self.truncated_captions),
            "data/shards_set_aside": float(set_aside),
        }

    def _watch(self, done: int) -> dict[str, float]:
        """The guard's measurement after `done` steps, where one is due; what it asks for is done."""
        if self.guard is None or not self.guard.is_due(done):
            return {}
        values = self.guard.check(self.engine, step=done)
        restart = done + 1  # the batch of step `done` is under way already
        if self.guard.wants_more_text(values) and restart < self.config.loop.max_steps:
            self.rows.schedule.restart(restart)
            values["text_validation/restart"] = float(restart)
        return values

    def _evaluate(self, done: int) -> dict[str, float]:
        if self.evaluation is None or not self.evaluation.is_due(done):
            return {}
        return self.evaluation.measure(self._write_model, step=done)

    def state(self, step: int) -> dict[str, Any]:
        counted = {"seen": self.account.state(), "truncated_captions": self.truncated_captions}
        guard = {"guard_start": self.guard.start_loss} if self.guard is not None else {}
        made_with = {"fingerprint": self.fingerprint, "vocabulary": self.vocabulary}
        return self.rows.state(step) | counted | guard | made_with

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data, and go on counting from one that fits."""
        if state.get("vocabulary") not in (None, self.vocabulary):
            raise UserError(
                f"the checkpoint of step {state['step']} was trained with text vocabulary {state['vocabulary']}, now "
                f"it is {self.vocabulary}; bring back the tokenizer, or the texts that made it, or use another RUN="
            )
        self.rows.check_state(state)
        self.account.load(state.get("seen", {}))
        self.truncated_captions = state.get("truncated_captions", 0)
        if self.guard is not None:
            self.guard.start_loss = state["guard_start"]

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        self._write_model(folder / "model")
        return {"qlip_fingerprint": self.fingerprint, "truncated_captions": self.truncated_captions}

    def _write_model(self, folder: Path) -> None:
        """Write the model as it is now (a collective call)."""
        weights = {name.removeprefix("model."): tensor for name, tensor in full_weights(self.engine).items()}
        if self.objective.bits is not None:
            self.objective.bits.fold(weights)
        if is_main():
            save_model(
                folder,
                model=self.model,
                text_tokenizer=self.text_tokenizer,
                ids=self.ids,
                qlip_folder=self.config.visual_tokenizer,
                state_dict=weights,
            )
