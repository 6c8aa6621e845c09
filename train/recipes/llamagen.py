"""LlamaGen: text-to-image alone, on the code shards of `make codes` (paper, section 4.3; arXiv:2406.06525).

The loss is the cross entropy of all ids of all images, summed and divided by their number in the global batch. The
captions are encoded in the loop by a frozen text encoder (3 % of a step's FLOPs at LlamaGen-XL), or their features are
read from the folder of `make text-features`.

Legend: B images of this rank, N patches, S sub-tokens of a patch, P = N * S ids of an image, D width, V ids of a slot.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_mix.batches.code_batches import CodeBatch, CodeBatches
from data_mix.prefetch import Prefetch
from downstream.llamagen.captions import clean_caption
from downstream.llamagen.configuration import SIZES, LlamaGenConfig
from downstream.llamagen.modeling import LlamaGen
from downstream.llamagen.pipeline import save_llamagen
from downstream.llamagen.text_encoder import TextEncoder
from downstream.llamagen.text_features import CachedFeatures, FeaturesHeader
from tokenizer.bits import codes_to_subtokens
from tokenizer.images import ExternalTokenizer, open_external_tokenizer
from tokenizer.modeling import load_qlip
from train.checkpoint import full_weights
from train.engine import autocast, step_engine
from train.loop import Task, check_finite
from train.settings.llamagen import LlamaGenShapeConfig, LlamaGenTrainingConfig
from um3.core.distributed import device, is_main, rank, sum_over_ranks, world_size
from um3.core.errors import UserError
from um3.core.progress import batches
from um3.core.seeds import seed_everything
from um3.model.configuration import hugging_face_options
from um3.model.split_softmax import split_softmax_loss


def features_header(config: LlamaGenTrainingConfig) -> FeaturesHeader:
    """What decides the features of a caption in this config."""
    text = config.text_encoder
    layers = f", {text.num_layers} layers" if text.num_layers >= 0 else ""
    encoder = f"{text.kind} {config.inputs()['text_encoder']}{layers}"
    return FeaturesHeader(encoder, max_tokens=text.max_tokens, clean=config.clean)


def open_text_encoder(config: LlamaGenTrainingConfig) -> TextEncoder:
    """The configured text encoder on this process's device, in bf16 on a GPU."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    encoder = TextEncoder(config.resolved_text_encoder(), dtype=dtype)
    encoder.model.to(device())
    return encoder


class LlamaGenObjective(nn.Module):
    """The model, with the summed cross entropy of each sub-token's ids (S,) as output."""

    def __init__(self, model: LlamaGen, *, chunk_tokens: int):
        super().__init__()
        self.model, self.chunk_tokens = model, chunk_tokens

    def forward(
        self, features_BTC: torch.Tensor, caption_mask_BT: torch.Tensor, ids_BP: torch.Tensor, dropped_B: torch.Tensor
    ) -> torch.Tensor:
        hidden_BPD = self.model(
            features_BTC=features_BTC, caption_mask_BT=caption_mask_BT, ids_BP=ids_BP, dropped_B=dropped_B
        )
        config = self.model.config
        sums = []
        for slot in range(config.subtokens):
            ids_BN = ids_BP[:, slot :: config.subtokens]
            loss = split_softmax_loss(
                hidden_BPD[:, slot :: config.subtokens],
                lm_head_weight_VD=self.model.head(slot),
                target_ids_BT=ids_BN,
                supervised_BT=torch.ones_like(ids_BN, dtype=torch.bool),
                text_vocab_size=config.slot_size,
                chunk_tokens=self.chunk_tokens,
            )
            sums.append(loss.text_sum)
        return torch.stack(sums)


class LlamaGenTask(Task[LlamaGenTrainingConfig]):
    """Images of the configured sources in exact shares; every id has the same weight."""

    unit = "images"

    def __init__(self, config: LlamaGenTrainingConfig):
        self.config = config
        self.external: ExternalTokenizer | None = None
        if config.external_tokenizer:
            self.external = open_external_tokenizer(config.external_tokenizer, setting="external_tokenizer")
            self.fingerprint = self.external.fingerprint
        else:
            self.fingerprint = load_qlip(config.visual_tokenizer).fingerprint()
        self.rows = CodeBatches(
            config.data,
            batch_size=config.loop.batch_size,
            seed=config.loop.seed,
            fingerprint=self.fingerprint,
            rank=rank(),
            world_size=world_size(),
        )
        self.batches: Prefetch[CodeBatch] = Prefetch(self.rows, num_steps=config.loop.max_steps)
        self.text_encoder: TextEncoder | CachedFeatures
        if config.text_features:
            self.text_encoder = CachedFeatures(config.text_features, header=features_header(config))
        else:
            self.text_encoder = open_text_encoder(config)
        seed_everything(config.loop.seed, "llamagen weights")
        shape = model_config(
            config.model,
            bits=self.rows.bits,
            num_patches=self.rows.num_patches,
            caption_width=self.text_encoder.width,
            max_caption_tokens=self.text_encoder.max_tokens,
        )
        self.model = LlamaGen(shape).train()
        if config.engine.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.objective = LlamaGenObjective(self.model, chunk_tokens=config.chunk_tokens)
        self.tokens_per_sample = shape.image_tokens

    def train_step(self, step: int) -> dict[str, float]:
        config, shape = self.config, self.model.config
        batch = self.batches.batch(step)
        learning_rate = self.set_rate(self.engine, config.optimizer, step=step)
        subtokens_BNS = codes_to_subtokens(
            batch.codes_BN, subtokens=shape.subtokens, bits_per_subtoken=shape.bits_per_subtoken
        )
        ids_BP = subtokens_BNS.flatten(1).to(device())
        dropped_B = batch.dropped_B.to(device())
        num_ids = config.loop.batch_size * shape.num_patches  # of one sub-token
        sums_S = torch.zeros(shape.subtokens, device=device())
        for part in batches(len(ids_BP), batch_size=self.micro_batch_size):
            cleans = config.clean and not config.text_features
            captions = [clean_caption(text) if cleans else text for text in batch.captions[part]]
            features, mask = self.text_encoder(captions).to(device())
            with autocast(config.engine):
                parts_S = self.engine(features.to(self.model.dtype), mask, ids_BP[part], dropped_B[part])
            # DeepSpeed averages gradients over ranks and accumulation steps.
            loss = parts_S.sum() * world_size() * self.accumulation / (num_ids * shape.subtokens)
            check_finite({"loss": float(loss.detach())}, source="images of " + ", ".join(sorted(set(batch.sources))))
            self.engine.backward(loss)
            norm = step_engine(self.engine)
            sums_S += parts_S.detach()
        means = (sum_over_ranks(sums_S) / num_ids).tolist()
        values = {"train/loss": sum(means) / len(means)}
        values |= {f"train/loss_subtoken_{slot}": mean for slot, mean in enumerate(means)}
        values["train/nats_per_image"] = sum(means) * shape.num_patches
        return values | {"optim/lr": learning_rate, "optim/grad_norm": norm}

    def fingerprints(self) -> dict[str, str]:
        hashes = self.rows.fingerprints()
        if isinstance(self.text_encoder, CachedFeatures):
            hashes["text_features"] = self.text_encoder.digest
        return hashes

    def state(self, step: int) -> dict[str, Any]:
        return self.rows.state(step)

    def load_state(self, state: dict[str, Any]) -> None:
        self.rows.check_state(state)

    def finish(self, folder: Path) -> dict[str, Any]:
        self.batches.close()
        weights = {name.removeprefix("model."): tensor for name, tensor in full_weights(self.engine).items()}
        buffers = dict(self.model.named_buffers())
        if is_main():
            save_llamagen(
                folder / "model",
                model=self.model,
                state_dict=weights | {name: tensor for name, tensor in buffers.items() if name not in weights},
                visual_tokenizer=self.external or self.config.visual_tokenizer,
                text_encoder=self.config.resolved_text_encoder(),
                clean=self.config.clean,
            )
        return {"qlip_fingerprint": self.fingerprint}


def model_config(
    shape: LlamaGenShapeConfig, *, bits: int, num_patches: int, caption_width: int, max_caption_tokens: int
) -> LlamaGenConfig:
    """The model's config for codes of `bits` bits; UserError if they cannot be cut into the shape's sub-tokens."""
    if bits % shape.subtokens:
        raise UserError(f"model.subtokens={shape.subtokens} does not divide codes of {bits} bits; change it")
    if shape.prediction == "depth" and shape.subtokens < 2:
        raise UserError("model.prediction=depth needs model.subtokens of 2 or more; set it, or use flat")
    names = ("hidden_size", "num_layers", "num_heads", "intermediate_size")
    sizes: dict[str, Any] = dict(SIZES[shape.size]) if shape.size else hugging_face_options(shape, *names)
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % (4 * heads):
        raise UserError(
            f"model.hidden_size={width} is not a multiple of 4 x model.num_heads={heads}; change one of them"
        )
    return LlamaGenConfig(
        **sizes,
        caption_width=caption_width,
        max_caption_tokens=max_caption_tokens,
        num_patches=num_patches,
        subtokens=shape.subtokens,
        bits_per_subtoken=bits // shape.subtokens,
        prediction=shape.prediction,
        depth_layers=shape.depth_layers,
        prefix_rotation=shape.prefix_rotation,
        dropout=shape.dropout,
        initializer_range=shape.initializer_range,
    )


build_task = LlamaGenTask
