"""Train a UM3 without changing its base: the rows that the base lacks, and LoRA adapters in its layers.

The new rows of embedding and head (image tokens and visual entries) are parameters of their own, so the base's rows get
no gradient, no weight decay and no optimizer state. The adapters are those of peft (LoRA: arXiv 2106.09685).

Shapes: B batch, T positions, V entries, F frozen rows, R new rows, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from um3.core.errors import UserError
from um3.core.files import atomic_folder
from um3.model.configuration import LoRAConfig
from um3.model.extend import EMBEDDING, HEAD
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = ".default"
"""What peft adds to the names of its parameters; a stored adapter does not have it."""


class NewRows(nn.Module):
    """An embedding or output head of which only the new rows train: `weight` (R, D), after `frozen_FD`."""

    def __init__(self, weight_VD: Tensor, *, first: int):
        super().__init__()
        self.first = first
        self.frozen_FD = nn.Parameter(weight_VD.detach()[:first].clone(), requires_grad=False)
        self.weight = nn.Parameter(weight_VD.detach()[first:].clone())

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embeddings (B, T, D); they have a gradient even if no id is new, so that a sharded backward cannot hang."""
        base_BTD = F.embedding(ids_BT.clamp(max=self.first - 1), self.frozen_FD)
        new_BTD = F.embedding((ids_BT - self.first).clamp(min=0), self.weight)
        return torch.where((ids_BT < self.first).unsqueeze(-1), base_BTD, new_BTD)


def freeze_base(model: PreTrainedModel, *, ids: UnifiedVocabulary, lora: LoRAConfig) -> None:
    """Freeze a UM3 in place, except for the rows that its base lacks; if `lora.rank` is above 0, add trained adapters.

    They draw from torch's global generator. UserError: the head is tied; `lora.target_modules` do not exist.
    """
    embedding: Any = model.get_input_embeddings()
    if embedding.weight is model.lm_head.weight:
        raise UserError("the base model has a tied head, which cannot be frozen in part; set lora.rank=0 trainable=all")
    base: dict[str, Any] = (getattr(model.config, "um3", None) or {}).get("base") or {}
    first = base.get("entries", ids.text_vocab_size)
    model.requires_grad_(False)
    if lora.rank:
        _add_adapters(model, lora)
    model.set_input_embeddings(NewRows(embedding.weight, first=first))
    model.lm_head = NewRows(model.lm_head.weight, first=first)


def merge(weights: Mapping[str, Tensor], *, lora: LoRAConfig) -> dict[str, Tensor]:
    """The tensors of a model that `freeze_base` changed -> those of its stock class, with the adapters merged."""
    merged = {}
    for name, tensor in weights.items():
        layer, part = name.rsplit(".", 1)
        if part == "frozen_FD":
            merged[f"{layer}.weight"] = torch.cat([tensor, weights[f"{layer}.weight"]])
        elif f"{layer}.frozen_FD" not in weights and ".lora_" not in name:
            layer = layer.removesuffix(".base_layer")
            if part == "weight" and (low := weights.get(f"{layer}.lora_A{ADAPTER}.weight")) is not None:
                tensor = tensor + lora.alpha / lora.rank * (weights[f"{layer}.lora_B{ADAPTER}.weight"] @ low)
            merged[f"{layer}.{part}"] = tensor
    return merged


def save_adapter(folder: Path, *, weights: Mapping[str, Tensor], lora: LoRAConfig, base_model: str) -> None:
    """Write adapters and new rows as a plain peft folder for the UM3 folder `base_model`, atomically."""
    stored = {name.replace(ADAPTER, ""): tensor for name, tensor in weights.items() if ".lora_" in name}
    rows = {}
    for name in (EMBEDDING, HEAD):
        layer = name.removesuffix(".weight")
        first = len(weights[f"{layer}.frozen_FD"])
        rows[layer.rpartition(".")[2]] = list(range(first, first + len(weights[name])))
        stored[f"{layer}.token_adapter.trainable_tokens_delta"] = weights[name]
    with atomic_folder(folder) as partial:
        peft_config = _peft_config(lora, base_model_name_or_path=base_model, trainable_token_indices=rows)
        peft_config.save_pretrained(str(partial))
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in stored.items()}
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def _add_adapters(model: PreTrainedModel, lora: LoRAConfig) -> None:
    from peft import inject_adapter_in_model

    linear = [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if unknown := [name for name in lora.target_modules if name not in names]:
        remedy = f"choose from {', '.join(names)}"
        raise UserError(f"lora.target_modules: the model's layers have no linear module '{unknown[0]}'; {remedy}")
    inject_adapter_in_model(_peft_config(lora), model)


def _peft_config(lora: LoRAConfig, **options: Any) -> "LoraConfig":
    from peft import LoraConfig

    sizes: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return LoraConfig(**sizes, target_modules=list(lora.target_modules), task_type="CAUSAL_LM", **options)
