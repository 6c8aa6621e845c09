"""LLaVA-1.5 on QLIP in two stages: `llava-align` trains the projector, `llava-instruct` also the language model.

    loss = sum of the cross entropies of the supervised tokens / their number in the global batch

The encoder is frozen in both stages and runs without gradient; checkpoints hold the trained parameters only. The
finished model is one folder for transformers (`downstream.llava.modeling`).

Legend: B conversations of a micro-batch, T tokens, C, H, W channels and sides of an image, N patches, D width, V rows.
"""

import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlavaForConditionalGeneration

from data_mix.batches.conversation_batches import ConversationBatch, ConversationBatches
from data_mix.conversations import MAX_UNUSABLE, MIN_COUNTED, open_conversations
from data_mix.prefetch import Prefetch
from downstream.llava.modeling import Llava, build_llava, load_llava, num_image_tokens, save_options, save_weights
from downstream.llava.template import Template, chat_template
from train.checkpoint import each_weight
from train.engine import autocast, precision_of, set_attention, step_engine
from train.loop import Task, check_finite
from train.settings.llava import LlavaAlignConfig, LlavaInstructConfig
from um3.core.distributed import device, is_main, rank, sum_over_ranks, wait_for_main, world_size
from um3.core.errors import UserError
from um3.core.files import atomic_folder
from um3.core.hub import load_pretrained
from um3.core.seeds import seed_everything
from um3.model.split_softmax import split_softmax_loss


class LlavaObjective(nn.Module):
    """LLaVA with the summed loss as output; logits exist only where there are targets."""

    def __init__(self, model: LlavaForConditionalGeneration, *, chunk_tokens: int):
        super().__init__()
        self.model, self.chunk_tokens = model, chunk_tokens
        self.config: Any = model.config

    def forward(self, input_ids_BT: Tensor, target_mask_BT: Tensor, pixels_BCHW: Tensor | None) -> Tensor:
        # Padding is on the right, so causal attention is enough to hide it from every real position.
        ids_BT = input_ids_BT[:, :-1]
        embeddings_BTD = self.model.get_input_embeddings()(ids_BT)
        features_BND = self._features(self._blank() if pixels_BCHW is None else pixels_BCHW).to(embeddings_BTD.dtype)
        if pixels_BCHW is None:
            # Every rank must use every trained parameter: without it ZeRO waits for gradients that never come.
            embeddings_BTD = embeddings_BTD + 0 * features_BND.sum()
        else:
            is_image_BT1 = (ids_BT == self.config.image_token_id)[..., None]
            embeddings_BTD = embeddings_BTD.masked_scatter(is_image_BT1, features_BND)
        outputs = self.model.model.language_model(inputs_embeds=embeddings_BTD, use_cache=False)
        head_VD = self.model.lm_head.weight
        is_trained = head_VD.requires_grad
        loss = split_softmax_loss(
            outputs.last_hidden_state,
            lm_head_weight_VD=head_VD if is_trained else head_VD[:0],
            frozen_rows_FD=None if is_trained else head_VD,
            target_ids_BT=input_ids_BT[:, 1:],
            supervised_BT=target_mask_BT[:, 1:],
            text_vocab_size=self.config.text_config.vocab_size,
            mode="joint",
            chunk_tokens=self.chunk_tokens,
        )
        return loss.text_sum

    def _features(self, pixels_BCHW: Tensor) -> Tensor:
        """The projected patches (B, N, D) of the configured layer, without the class token."""
        inner, layer = self.model.model, self.config.vision_feature_layer
        with torch.no_grad():
            states = inner.vision_tower(pixels_BCHW, output_hidden_states=layer).hidden_states
        return inner.multi_modal_projector(states[layer][:, 1:])

    def _blank(self) -> Tensor:
        vision = self.config.vision_config
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        return torch.zeros(size, device=self.model.device)


class LlavaTask(Task[LlavaAlignConfig | LlavaInstructConfig]):
    """Batches of one modality, accumulated to the global batch; every supervised token has the same weight."""

    unit = "conversations"

    def __init__(self, config: LlavaAlignConfig | LlavaInstructConfig):
        self.config, self.tokens_per_sample = config, config.data.max_tokens
        seed_everything(config.loop.seed, "llava weights")
        self.llava, self.dtype = _start(config)
        model, processor = self.llava
        processor.image_processor.do_pad = config.data.pad_to_square
        processor.chat_template = chat_template(processor.tokenizer, kind=config.data.template)
        window, limit = config.data.max_tokens, self.llava.language.max_position_embeddings
        if window > limit:
            raise UserError(
                f"data.max_tokens={window}: the language model has {limit} positions; set it to that or less"
            )
        if is_main():  # what cannot be saved must not fail after hours of training
            with tempfile.TemporaryDirectory() as folder:
                save_options(Path(folder), self.llava, dtype=self.dtype)
        self.rows = self._open_batches()
        self.batches: Prefetch[ConversationBatch] = Prefetch(self.rows, num_steps=config.loop.max_steps)
        inner = model.model
        model.requires_grad_(False)
        inner.multi_modal_projector.requires_grad_(True)
        if isinstance(config, LlavaInstructConfig):
            inner.language_model.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        set_attention(inner.language_model, config.engine)
        if config.engine.activation_checkpointing:
            inner.language_model.gradient_checkpointing_enable()
        self.objective = LlavaObjective(model, chunk_tokens=config.chunk_tokens)
        self.objective.train()
        self.seen, self.skipped = 0, 0

    def _open_batches(self) -> ConversationBatches:
        config, processor = self.config, self.llava.processor
        vision = self.llava.vision

        def pixels(image: Any) -> Tensor:
            return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

        options: dict[str, Any] = {"image_size": vision.image_size, "seed": config.loop.seed, "check_images": True}
        return ConversationBatches(
            {source.name: open_conversations(source, split="train", **options) for source in config.data.conversations},
            weights=[source.weight for source in config.data.conversations],
            template=Template(
                processor.tokenizer,
                kind=config.data.template,
                num_image_tokens=num_image_tokens(vision),
                max_tokens=config.data.max_tokens,
            ),
            pixels=pixels,
            batch_size=config.loop.batch_size,
            seed=config.loop.seed,
            cache=Path(config.loop.output_dir) / "cache",
            rank=rank(),
            world_size=world_size(),
        )

    def build_engines(self) -> dict[str, Any]:
        self.buffers = {name: buffer.clone() for name, buffer in self.objective.named_buffers()}
        engines = super().build_engines()
        for name, buffer in self.objective.named_buffers():  # bf16 would round the tables of rotary embeddings
            buffer.data = self.buffers[name].to(buffer.device)
        return engines

    def train_step(self, step: int) -> dict[str, float]:
        config, batch = self.config, self.batches.batch(step)
        learning_rate = self.set_rate(self.engine, config.schedule, step=step)
        own = [batch.target_mask_BT[:, 1:].sum(), batch.num_tokens, batch.input_ids_BT.numel(), batch.skipped.total()]
        count, num_tokens, positions, skipped = sum_over_ranks(torch.tensor(own, device=device()).float()).tolist()
        # DeepSpeed averages gradients over ranks and accumulation steps; the loss is the sum / the global count.
        scale = world_size() * self.accumulation / count
        total = torch.zeros((), device=device())
        for input_ids_BT, target_mask_BT, pixels_BCHW in self._micro_batches(batch):
            with autocast(config.engine):
                loss = self.engine(input_ids_BT, target_mask_BT, pixels_BCHW)
            check_finite({"loss": float(loss.detach())}, source="conversations " + ", ".join(batch.keys[:3]))
            self.engine.backward(loss * scale)
            norm = step_engine(self.engine)
            total += loss.detach()
        self._count_skipped(batch.skipped, skipped=int(skipped))
        return {
            "train/loss": float(sum_over_ranks(total)) / count,
            "data/targets": count,
            "data/padding": 1 - num_tokens / positions,
            "data/has_image": float(batch.pixels_BCHW is not None),
            "data/skipped": float(self.skipped),
            "optim/lr": learning_rate,
            "optim/grad_norm": norm,
        }

    def _micro_batches(self, batch: ConversationBatch) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        parts = self.accumulation
        pixels = [None] * parts if batch.pixels_BCHW is None else batch.pixels_BCHW.tensor_split(parts)
        tensors = zip(batch.input_ids_BT.tensor_split(parts), batch.target_mask_BT.tensor_split(parts), strict=True)
        place = device()
        return [
            (ids_BT.to(place), mask_BT.to(place), None if images is None else images.to(place))
            for (ids_BT, mask_BT), images in zip(tensors, pixels, strict=True)
        ]

    def _count_skipped(self, own: Counter[str], *, skipped: int) -> None:
        """Count the conversations that were replaced; UserError on every rank if they are more than 1 %."""
        self.seen += self.config.loop.batch_size
        self.skipped += skipped
        if self.seen >= MIN_COUNTED and self.skipped > MAX_UNUSABLE * self.seen:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in own.most_common()) or "see the log"
            raise UserError(
                f"{self.skipped:,} of {self.seen:,} conversations could not be used ({reasons}); repair them, or raise "
                f"data.max_tokens={self.config.data.max_tokens} if their answers do not fit"
            )

    def fingerprints(self) -> dict[str, str]:
        return self.rows.fingerprints()

    def state(self, step: int) -> dict[str, Any]:
        return {"seen": self.seen, "skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen, self.skipped = state["seen"], state["skipped"]

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        stored = self.llava.model.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in self.buffers.items() if name.removeprefix("model.") in stored)
        tensors = (
            (name.removeprefix("model."), tensor) for name, tensor in itertools.chain(each_weight(self.engine), buffers)
        )
        if is_main():
            with atomic_folder(folder / "model") as partial:
                save_options(partial, self.llava, dtype=self.dtype)
                save_weights(partial, tensors, dtype=self.dtype)
        else:
            for _ in tensors:
                pass
        wait_for_main()
        return {"skipped_conversations": self.skipped}


def _start(config: LlavaAlignConfig | LlavaInstructConfig) -> tuple[Llava, torch.dtype]:
    """The model before the first step, on the CPU, and the type of its saved weights."""
    dtype = torch.bfloat16 if precision_of(config.engine) == "bf16-true" else torch.float32
    if isinstance(config, LlavaInstructConfig):
        source, kind = config.init_from, "LLaVA model"
        llava = load_llava(source, dtype=dtype)
    else:
        source, kind = config.language_model, "language model"
        llava = build_llava(
            language_model=source,
            visual_tokenizer=config.visual_tokenizer,
            layer=config.vision_feature_layer,
            quantized=config.quantized_features,
            pad_to_square=config.data.pad_to_square,
            dtype=dtype,
        )
    if config.dtype != "base":
        return llava, getattr(torch, config.dtype)
    return llava, load_pretrained(AutoConfig, source, kind=kind).dtype or torch.float32


build_task = LlavaTask
