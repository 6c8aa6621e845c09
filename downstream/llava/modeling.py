"""LLaVA from its parts: a QLIP's encoder, a new projector and a language model, and its files.

Everything is stock transformers except the tower (`tokenizer.tower`), so that a folder loads with
`AutoModelForImageTextToText` and `AutoProcessor` once `tokenizer` is imported.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from downstream.llava.template import IMAGE, chat_template
from tokenizer import QLIPProcessor, QLIPVisionTower
from tokenizer.modeling import load_qlip
from um3.core.errors import UserError
from um3.core.files import write_json
from um3.core.hub import WEIGHTS_INDEX, load_pretrained, save_tokenizer

PAD = "<pad>"
ROWS_MULTIPLE = 64
"""The embedding has a multiple of this many rows, which matrix products prefer."""
SHARD_BYTES = 4 * 2**30
SAVED_NAMES = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.language_model\.": "language_model.model.",
    r"^model\.(vision_tower|multi_modal_projector)\.": r"\1.",
}
"""Names in a model -> in its files, as llava-hf's and transformers' own."""


class Llava(NamedTuple):
    """A model and its processor; `vision` and `language` are the configs of its two towers."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @property
    def vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def language(self) -> Any:
        return self.model.config.text_config


def load_llava(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> Llava:
    """Load a LLaVA folder; UserError if it is none, has another tower than a QLIP, or reads several layers."""
    model = load_pretrained(AutoModelForImageTextToText, folder, kind="LLaVA model", dtype=dtype)
    is_llava = isinstance(model, LlavaForConditionalGeneration)
    if not is_llava or not isinstance(model.model.vision_tower, QLIPVisionTower):
        name = f"{type(model.model.vision_tower).__name__} as its tower" if is_llava else type(model).__name__
        raise UserError(f"{folder} holds a {name}, not a LLaVA on QLIP; use a folder of make llava-align")
    layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy != "default":
        used = f"vision_feature_layer={layer} and vision_feature_select_strategy='{strategy}'"
        raise UserError(f"{folder} has {used}; only the patches (strategy 'default') of one layer are supported")
    processor = load_pretrained(AutoProcessor, folder, kind="LLaVA processor")
    return Llava(model.eval(), processor)


def build_llava(
    *,
    language_model: str | Path,
    visual_tokenizer: str | Path,
    layer: int = -2,
    quantized: bool = False,
    pad_to_square: bool = True,
    dtype: torch.dtype | str = "auto",
) -> Llava:
    """A LLaVA with a new projector, initialised from torch's random state as LLaVA's (`nn.Linear`'s default).

    layer: which hidden state the projector reads (0: the embeddings' output, -1: the last layer's). quantized: -1 is
    after the quantizer. dtype: of the language model; "auto" is that of its files. UserError: a folder that cannot be
    loaded, or a layer that the tower lacks.
    """
    qlip = load_qlip(visual_tokenizer)
    check_layer(layer, num_layers=qlip.config.vision_tower.num_hidden_layers, quantized=quantized)
    try:
        tower = QLIPVisionTower.from_qlip(qlip, quantized=quantized)
    except ValueError as error:
        raise UserError(f"{visual_tokenizer}: {error}") from None
    language = load_pretrained(AutoModelForCausalLM, language_model, kind="language model", dtype=dtype)
    if not (hasattr(language, "model") and hasattr(language, "lm_head")):
        raise UserError(f"{language_model} holds a {type(language).__name__}; use a Llama or Qwen as language model")
    tokenizer = load_pretrained(AutoTokenizer, language_model, kind="text tokenizer")
    add_tokens(tokenizer, language)
    options: dict[str, Any] = {
        "dtype": language.dtype,
        "pad_token_id": tokenizer.pad_token_id,
        "weights_license": qlip.config.weights_license,
    }
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=num_image_tokens(tower.config),
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
        **options,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    for parameter in tower.parameters():  # `tower.to` would round the rotary tables too, which are buffers
        parameter.data = parameter.data.to(language.dtype)
    model.model.vision_tower = tower
    model.model.language_model, model.lm_head = language.model, language.lm_head
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(language.dtype)
    model.generation_config = greedy_generation(tokenizer)
    processor = make_processor(
        QLIPProcessor.from_pretrained(visual_tokenizer),
        patch_size=tower.config.patch_size,
        tokenizer=tokenizer,
        pad_to_square=pad_to_square,
    )
    return Llava(model.eval(), processor)


def check_layer(layer: int, *, num_layers: int, quantized: bool) -> None:
    """UserError for a layer that transformers' LLaVA cannot select."""
    if layer == 0:
        raise UserError("vision_feature_layer=0 (the embeddings) is not supported by transformers' LLaVA; use another")
    if not -num_layers - 1 <= layer <= num_layers:
        raise UserError(f"vision_feature_layer={layer}: the tower has {num_layers} layers; use -1 to -{num_layers}")
    if quantized and layer not in (-1, num_layers):
        raise UserError(f"quantized features are those of the last layer; set vision_feature_layer=-1, not {layer}")


def num_image_tokens(vision_config: Any) -> int:
    """Tokens of an image in the language model's input: one a patch."""
    return int((vision_config.image_size // vision_config.patch_size) ** 2)


def add_tokens(tokenizer: PreTrainedTokenizerBase, language: PreTrainedModel) -> None:
    """Add `IMAGE`, and a padding token if there is none of its own, in place; new rows are the mean of the old ones.

    UserError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"the text tokenizer '{tokenizer.name_or_path}' has no end-of-text token; use one that has")
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, tokenizer.bos_token):
        tokenizer.add_special_tokens({"pad_token": PAD})
    old_rows, needed = language.config.vocab_size, max(tokenizer.get_vocab().values()) + 1
    if needed <= old_rows:
        return
    language.resize_token_embeddings(needed, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    layers: list[Any] = [language.get_input_embeddings(), language.get_output_embeddings()]
    with torch.no_grad():
        for layer in layers:
            layer.weight[old_rows:] = layer.weight[:old_rows].float().mean(0).to(layer.weight.dtype)


def make_processor(
    qlip: QLIPProcessor, *, patch_size: int, tokenizer: PreTrainedTokenizerBase, pad_to_square: bool
) -> LlavaProcessor:
    """Images padded to a square in the encoder's mean colour, or centre-cropped, at the size and scale of a QLIP.

    It pads texts on the left, for generation.
    """
    size = qlip.image_size
    images = LlavaImageProcessorPil(
        do_pad=pad_to_square,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(qlip.image_mean),
        image_std=list(qlip.image_std),
    )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=chat_template(tokenizer),
    )


def greedy_generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy decoding. A base's own settings may contradict each other, which fails when the model is saved."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(do_sample=False, **ids)


def save_options(folder: Path, llava: Llava, *, dtype: torch.dtype) -> None:
    """Write everything but the weights, which are of `dtype`: configs, chat template, processor and tokenizer."""
    model, processor = llava
    for config in (model.config, llava.language, llava.vision):
        config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_tokenizer(processor.tokenizer, folder)


def save_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype) -> None:
    """Write the named tensors of a model, in `dtype`, as shards of at most about `SHARD_BYTES`.

    One shard is in memory at a time. Buffers (`freqs_*`) stay float32: a rounded rotary table changes every feature.
    """
    files: list[Path] = []
    places: dict[str, int] = {}
    total = 0
    for shard in _shards(tensors, dtype=dtype):
        files.append(folder / f"model-{len(files) + 1:05d}.partial")
        save_file(shard, files[-1], metadata={"format": "pt"})
        places |= dict.fromkeys(shard, len(files))
        total += sum(tensor.nbytes for tensor in shard.values())
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
        index = {name: names[number - 1] for name, number in sorted(places.items())}
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)


def _shards(tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        for pattern, saved in SAVED_NAMES.items():
            name = re.sub(pattern, saved, name)
        kind = torch.float32 if ".freqs_" in name or ".quantizer." in name else dtype
        shard[name] = tensor.detach().to(device="cpu", dtype=kind, copy=True).contiguous()
        if sum(value.nbytes for value in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
