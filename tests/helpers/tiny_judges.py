"""Tiny judges with random weights, saved as folders in the layout of the published ones."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)
from transformers.models.blip import BlipImageProcessorPil
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.mask2former import Mask2FormerImageProcessorPil

from eval.metrics.inception import Inception2015

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>"]
WORDS = ["is", "there", "a", "an", "the", "photo", "of", "dog", "cat", "red", "blue", "yes", "no", "Answer", "or", "?"]
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 16}
SIZE = {"height": 32, "width": 32}


def save_clip(folder: Path) -> Path:
    """A CLIP of 32 pixels; texts get a bos and an eos."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**TOWER, "vocab_size": len(SPECIAL + WORDS), "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**TOWER, **IMAGE},
        projection_dim=8,
    )
    tokenizer = _tokenizer(single="<bos> $A <eos>")
    processor = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)
    return _save(folder, CLIPModel(config), tokenizer, processor)


def save_mask2former(folder: Path, *, num_labels: int = 80, sharpness: float = 1.0) -> Path:
    """A Mask2Former of 5 queries over a Swin of width 8; `sharpness` scales its class scores."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64, out_features=stages)
    widths = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 16}
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 16}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=5, num_labels=num_labels, **widths, **sizes)
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= sharpness
    return _save(folder, model, Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}))


def save_llava(folder: Path, *, chat_template: str | None = None, adds_bos: bool = False) -> Path:
    """A LLaVA of 32 pixels: four patches and a one-layer Llama."""
    torch.manual_seed(0)
    text = LlamaConfig(**TOWER, num_key_value_heads=2, vocab_size=len(SPECIAL + WORDS), eos_token_id=2, pad_token_id=0)
    vision = CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 2}, **IMAGE)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=SIZE, crop_size=SIZE),
        tokenizer=_tokenizer(single="<bos> $A" if adds_bos else ""),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
    )
    return _save(folder, model, processor)


def save_blip(folder: Path) -> Path:
    """A BLIP for visual question answering."""
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(SPECIAL + WORDS), "encoder_hidden_size": 16, "projection_dim": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2}
    config = BlipConfig(text_config=text, vision_config={**TOWER, **IMAGE}, projection_dim=8, image_text_hidden_size=8)
    processor = BlipProcessor(image_processor=BlipImageProcessorPil(size=SIZE), tokenizer=_tokenizer())
    return _save(folder, BlipForQuestionAnswering(config), processor)


def save_inception(file: Path) -> Path:
    """Inception's weights, seeded, as a file of the published layout; its features tell images apart."""
    torch.manual_seed(0)
    network = Inception2015()
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), file)
    return file


def write_lines(file: Path, rows: list[object]) -> Path:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _tokenizer(*, single: str = "") -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **names)


def _save(folder: Path, *parts: object) -> Path:
    for part in parts:
        part.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
