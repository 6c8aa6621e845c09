"""The QLIP model: visual encoder -> quantizer -> visual decoder, with a CLIP text tower.

State-dict names are those of the released checkpoints. Legend: B batch, T tokens, N patches, D width,
L dimensions of a quantized patch (BSQ: its bits), P projection, C channels, H, W pixels.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tokenizer.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig, read_qlip_config
from tokenizer.layers import Encoder, Linear, build_rope
from tokenizer.quantizer import QuantizerOutput, build_quantizer
from um3.core.errors import UserError
from um3.core.hub import load_pretrained, model_folder
from um3.core.text import printable

logger = logging.getLogger(__name__)

OLD_CLIP_END_ID = 2
"""With this eos id in its config, the text tower pools at the largest token id (the old CLIP convention)."""


@dataclass
class QLIPOutput(ModelOutput):
    """Result of `QLIPModel.forward`; text fields are None without `input_ids`."""

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    reconstructions: Tensor | None = None
    codes: Tensor | None = None
    quantized: Tensor | None = None
    quantizer_loss: Tensor | None = None
    sample_entropy: Tensor | None = None
    codebook_entropy: Tensor | None = None
    commitment: Tensor | None = None
    soft_code: Tensor | None = None
    quantizer_input: Tensor | None = None


class TextEmbeddings(nn.Module):
    """Token plus learned position embeddings."""

    def __init__(self, config: QLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        return self.token_embedding(input_ids_BT) + self.position_embedding.weight[: input_ids_BT.shape[1]]


class TextModel(nn.Module):
    """The CLIP text tower, pooled at the end-of-text token."""

    def __init__(self, config: QLIPTextConfig):
        super().__init__()
        if not isinstance(config.eos_token_id, int):
            raise ValueError(f"text_config.eos_token_id is {config.eos_token_id}; set it to a single id")
        self.max_tokens, self.end_id = config.max_position_embeddings, config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, input_ids_BT: Tensor) -> Tensor:
        """The normalised hidden states (B, T, D) of all tokens; each sees those before it."""
        if (length := input_ids_BT.shape[1]) > self.max_tokens:
            raise ValueError(f"{length} text tokens exceed the tower's {self.max_tokens} positions; truncate the text")
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids_BT)))

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        x_BTD = self.hidden_states(input_ids_BT)
        ends_BT = input_ids_BT if self.end_id == OLD_CLIP_END_ID else torch.eq(input_ids_BT, self.end_id).int()
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), ends_BT.argmax(-1)]


class VisionEmbeddings(nn.Module):
    """Patches, a class token in front, learned positions."""

    def __init__(self, config: QLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(num_patches + 1, config.hidden_size)

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        (height, width), size = pixel_values_BCHW.shape[-2:], self.image_size
        if not height == width == size:
            raise ValueError(f"images of {height}x{width} pixels; the model takes {size}x{size}: use its processor")
        pixel_values_BCHW = pixel_values_BCHW.to(self.class_embedding.dtype)
        patches_BND = self.patch_embedding(pixel_values_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(patches_BND), 1, -1)
        return torch.cat([class_B1D, patches_BND], dim=1) + self.position_embedding.weight


class QuantizerEmbed(nn.Module):
    """The bottleneck's two-layer MLP, down to L dims or back up."""

    def __init__(self, width_in: int, width_out: int, *, hidden: int):
        super().__init__()
        self.c_fc = Linear(width_in, hidden)
        self.c_proj = Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionModel(nn.Module):
    """Visual encoder, and the bottleneck: a quantizer without parameters between two MLPs."""

    def __init__(self, config: QLIPVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.rope = build_rope(config)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.quantizer = build_quantizer(config)
        narrow, width_post = self.quantizer.embed_dim, config.hidden_size_post_q or width
        self.quant_embed = QuantizerEmbed(width, narrow, hidden=width)
        self.quant_embed_post = QuantizerEmbed(narrow, width_post, hidden=width_post)

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Images -> last hidden states (B, 1 + N, D), class token first."""
        return self.encoder(self.embeddings(pixel_values_BCHW))

    def quantize(self, hidden_BTD: Tensor, *, entropy: bool) -> QuantizerOutput:
        """Last hidden states -> quantized patches."""
        return self.quantizer(self.quant_embed(hidden_BTD[:, 1:]), entropy=entropy)


class VisionDecoder(nn.Module):
    """Quantized patches, projected to the decoder's width -> pixels.

    With `overlap` O, the output of a patch of P pixels is a window of W = P + 2 O pixels, and the image is the weighted
    mean of the windows at each pixel: without overlap, plain areas show a grid of patches.
    """

    def __init__(self, config: QLIPDecoderConfig):
        super().__init__()
        self.patch_size, self.grid = config.patch_size, config.image_size // config.patch_size
        self.overlap, self.window = config.overlap, config.patch_size + 2 * config.overlap
        width, inner = config.hidden_size, config.intermediate_size
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid**2, width))
        self.encoder = Encoder(config)
        self.rope = build_rope(config)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(Linear(width, inner), nn.Tanh())
        self.conv_out = Linear(inner, config.num_channels * self.window**2)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = self.norm(self.encoder(x_BND + self.position_embeddings))
        patches_BNF = self.conv_out(self.ffn(x_BND))
        if self.overlap:
            return self._blend(patches_BNF)
        patches = patches_BNF.unflatten(1, (self.grid, self.grid)).unflatten(-1, (-1, self.patch_size, self.patch_size))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _blend(self, windows_BNF: Tensor) -> Tensor:
        """The images (B, C, H, W) of windows whose weights fall linearly to 0 over 2 O pixels at each side."""
        place_W = torch.arange(self.window, device=windows_BNF.device, dtype=windows_BNF.dtype) + 0.5
        ramp_W = (torch.minimum(place_W, self.window - place_W) / (2 * self.overlap)).clamp(max=1)
        weights_K = (ramp_W[:, None] * ramp_W).flatten()
        size = (self.grid * self.patch_size,) * 2
        place = {"kernel_size": self.window, "stride": self.patch_size, "padding": self.overlap}
        weighted_BNCK = windows_BNF.unflatten(-1, (-1, self.window**2)) * weights_K
        sums_BCHW = F.fold(weighted_BNCK.flatten(2).mT, size, **place)
        return sums_BCHW / F.fold(weights_K[None, :, None].expand(1, -1, self.grid**2), size, **place)


class QLIPModel(PreTrainedModel):
    """QLIP (SPEC section 1). Loads and saves the released checkpoints' layout."""

    config_class = QLIPConfig
    base_model_prefix = "qlip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: QLIPConfig):
        super().__init__(config)
        text, vision, decoder = config.text_tower, config.vision_tower, config.decoder_tower
        self.text_model = TextModel(text)
        self.vision_model = VisionModel(vision)
        self.vision_decoder = VisionDecoder(decoder)
        self.visual_projection = Linear(vision.hidden_size, config.projection_dim, bias=config.vision_projection_bias)
        self.text_projection = Linear(text.hidden_size, config.projection_dim, bias=config.text_projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, QuantizerEmbed):
            # With a small fixed std the decoder's input would be a tenth of its position embedding.
            for linear in (module.c_fc, module.c_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, VisionEmbeddings | VisionDecoder):
            for embedding in module.parameters(recurse=False):
                nn.init.normal_(embedding, std=std)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Load a QLIP folder or hub id, released or ours; warn if the licence of the weights restricts their use."""
        loaded = super().from_pretrained(*args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.weights_license:
            logger.warning("the weights in %s: %s", model.name_or_path, printable(model.config.weights_license))
        return loaded

    @property
    def num_bits(self) -> int:
        """Bits of one code."""
        return self.vision_model.quantizer.num_bits

    @property
    def num_patches(self) -> int:
        """Codes per image."""
        return self.vision_decoder.grid**2

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, C, H, W) -> last hidden states (B, 1 + N, D), class token first."""
        return self.vision_model(pixel_values)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, C, H, W) -> l2-normalised (B, P)."""
        return self._image_embeds(self.vision_model(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> l2-normalised (B, P). Padding after the end changes nothing; the mask is unused."""
        return F.normalize(self.text_projection(self.text_model(input_ids)), dim=-1)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Images (B, C, H, W) -> codes (B, N) int64."""
        return self.vision_model.quantize(self.vision_model(pixel_values), entropy=False).codes_BN

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) int64 -> images (B, C, H, W) in the processor's normalised space."""
        return self.decode_quantized(self.vision_model.quantizer.codes_to_quantized(codes).to(self.dtype))

    def decode_quantized(self, quantized_BNL: Tensor) -> Tensor:
        """Quantized patches (B, N, L) -> images (B, C, H, W)."""
        return self.vision_decoder(self.vision_model.quant_embed_post(quantized_BNL))

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, *, bottleneck: bool = True, **kwargs: Any
    ) -> QLIPOutput:
        """Embeddings, logits, reconstructions, codes and quantizer terms in one pass.

        Without `bottleneck` the decoder reads the encoder's output; the quantizer's terms are those of a single code.
        """
        hidden_BTD = self.vision_model(pixel_values)
        image_embeds_BP = self._image_embeds(hidden_BTD)
        output = QLIPOutput(image_embeds=image_embeds_BP)
        if bottleneck:
            quantizer = self.vision_model.quantize(hidden_BTD, entropy=True)
            output.reconstructions = self.decode_quantized(quantizer.quantized_BNL.to(hidden_BTD.dtype))
            output.codes, output.quantized = quantizer.codes_BN, quantizer.quantized_BNL
            output.quantizer_loss, output.commitment = quantizer.loss, quantizer.commitment
            output.sample_entropy, output.codebook_entropy = quantizer.sample_entropy, quantizer.codebook_entropy
            output.soft_code, output.quantizer_input = quantizer.mean_GK, quantizer.vectors_BNL
        else:
            output.reconstructions = self.vision_decoder(hidden_BTD[:, 1:])
            nothing = hidden_BTD.new_zeros((), dtype=torch.float32)
            output.quantizer_loss = output.commitment = output.sample_entropy = output.codebook_entropy = nothing
            output.soft_code = nothing.new_ones(1, 1)
        if input_ids is not None:
            output.text_embeds = text_embeds_BP = self.get_text_features(input_ids)
            output.logits_per_image = self.logit_scale.exp() * image_embeds_BP @ text_embeds_BP.T
        return output

    def fingerprint(self) -> str:
        """sha256 over the names, shapes and bytes of the weights; code shards and UM3 models record it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _image_embeds(self, hidden_BTD: Tensor) -> Tensor:
        pooled_BD = self.vision_model.post_layernorm(hidden_BTD[:, 0])
        return F.normalize(self.visual_projection(pooled_BD), dim=-1)


def load_qlip(path_or_hub_id: str | Path) -> QLIPModel:
    """Load a QLIP folder or hub id.

    UserError: another kind of model, an unknown option or invalid value, or damaged, not finite or unexpected weights.
    """
    folder = model_folder(path_or_hub_id, kind="QLIP tokenizer")
    config = read_qlip_config(folder)
    model = load_pretrained(QLIPModel, folder, config=config, kind="QLIP tokenizer", strict=True)
    with torch.inference_mode():
        size = config.vision_tower.image_size
        pixels_BCHW = torch.zeros(1, config.vision_tower.num_channels, size, size, device=model.device)
        if not model.eval().decode(model.encode(pixels_BCHW)).isfinite().all():
            raise UserError(f"{folder} gives images with NaN or infinity; fetch it or train it again")
    return model
