"""The pipeline of LlamaGen: prompts -> images, with the same calls and options as UM3's.

Legend: B samples, N patches, P ids of an image.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import tokenizer
from downstream.llamagen.captions import clean_caption
from downstream.llamagen.decoding import Decoder
from downstream.llamagen.modeling import LlamaGen, load_llamagen
from downstream.llamagen.settings import TextEncoderConfig
from downstream.llamagen.text_encoder import TextEncoder
from tokenizer.bits import codes_to_subtokens, subtokens_to_codes
from tokenizer.images import ExternalTokenizer, QLIPImages, external_target, open_external_tokenizer
from um3.core.config import build_config
from um3.core.distributed import inference_device
from um3.core.errors import UserError
from um3.core.files import atomic_folder, write_text
from um3.core.hub import model_folder, write_checksums
from um3.core.text import valid_text
from um3.inference.generate import SampledImages, widest_float
from um3.inference.image_pipeline import ImagePipeline, SampleImages, load_visual_tokenizer
from um3.model.language_model import QLIP_FOLDER, render_card


class LlamaGenPipeline(ImagePipeline):
    """A LlamaGen with its text encoder and its visual tokenizer."""

    def __init__(
        self,
        *,
        model: LlamaGen,
        text_encoder: TextEncoder,
        clean: bool,
        visual_tokenizer: QLIPImages | ExternalTokenizer,
        name: str = "",
    ):
        super().__init__(visual_tokenizer=visual_tokenizer, name=name)
        self.model, self.text_encoder, self.clean = model, text_encoder, clean
        self._decoder: Decoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        external_tokenizer: str = "",
    ) -> Self:
        """Load a folder that `save_llamagen` wrote, or a hub id; UserError if it is incomplete.

        Without a `device`, `um3.core.distributed.inference_device` chooses it. `dtype` is that of the transformer and
        the text encoder. A model of an external tokenizer's codes needs its name, package.module:function: a folder
        must not decide which code runs.
        """
        folder, device = model_folder(path_or_hub_id, kind="LlamaGen"), device or inference_device()
        model = load_llamagen(folder, dtype=dtype)
        stored = getattr(model.config, "text_encoder", None)
        if not isinstance(stored, dict):
            raise UserError(f"{folder}/config.json names no text_encoder; use a folder of make llamagen")
        fingerprint = model.config.tokenizer_fingerprint
        visual_tokenizer: QLIPImages | ExternalTokenizer
        if external_tokenizer:
            visual_tokenizer = open_external_tokenizer(external_tokenizer, setting="external_tokenizer")
            if visual_tokenizer.fingerprint != fingerprint:
                raise UserError(f"{folder} was trained with {fingerprint}, not {visual_tokenizer.fingerprint}")
        elif name := external_target(fingerprint):
            raise UserError(
                f"{folder} generates codes of an external tokenizer; use LlamaGenPipeline or `python -m eval "
                f"generate-images` with external_tokenizer='{name}'"
            )
        else:
            qlip, processor = load_visual_tokenizer(folder, fingerprint=fingerprint)
            visual_tokenizer = QLIPImages(qlip.to(device), processor)  # type: ignore[arg-type]
        origin = f"{folder}/config.json, 'text_encoder'"
        if not_plain := [text for text in stored.values() if isinstance(text, str) and ("${" in text or text == "???")]:
            raise UserError(f"{origin}: '{not_plain[0]}' is not a plain value; restore that file")
        encoder_config = build_config(TextEncoderConfig, [(origin, stored)], origin=origin)
        encoder_config.name = encoder_config.name or str(folder / QLIP_FOLDER)
        text_encoder = TextEncoder(encoder_config, dtype=model.dtype)
        text_encoder.model.to(device)
        config, visual = model.config, visual_tokenizer
        fits = {
            "num_patches": (config.num_patches, visual.num_codes),
            "subtokens x bits_per_subtoken": (config.subtokens * config.bits_per_subtoken, visual.num_bits),
            "caption_width": (config.caption_width, text_encoder.width),
        }
        for key, (value, needed) in fits.items():
            if value != needed:
                problem = f"{key} is {value}, but its tokenizer and text encoder need {needed}"
                raise UserError(f"{folder}/config.json: {problem}; restore the files that were saved together")
        return cls(
            model=model.to(device),  # type: ignore[arg-type]
            text_encoder=text_encoder,
            clean=bool(model.config.clean_captions),
            visual_tokenizer=visual_tokenizer,
            name=valid_text(str(path_or_hub_id)),
        )

    @property
    def fingerprint(self) -> str:
        return self.model.config.tokenizer_fingerprint

    @property
    def image_tokens(self) -> int:
        return self.model.config.image_tokens

    @property
    def networks(self) -> list[nn.Module]:
        return [self.model, self.text_encoder.model]

    def save_pretrained(self, folder: str | Path) -> None:
        text_encoder = TextEncoderConfig(**self.model.config.text_encoder or {})
        options: dict[str, Any] = {"visual_tokenizer": self.visual_tokenizer, "text_encoder": text_encoder}
        save_llamagen(folder, model=self.model, clean=self.clean, **options)

    def ids_of(self, codes_BN: Tensor) -> Tensor:
        config = self.model.config
        ids_BNS = codes_to_subtokens(codes_BN, subtokens=config.subtokens, bits_per_subtoken=config.bits_per_subtoken)
        return ids_BNS.flatten(-2)

    def codes_of(self, ids_BP: Tensor) -> Tensor:
        config = self.model.config
        ids_BNS = ids_BP.unflatten(-1, (-1, config.subtokens))
        return subtokens_to_codes(ids_BNS, bits_per_subtoken=config.bits_per_subtoken)

    def sampler_for(self, prompts: Sequence[str]) -> SampleImages:
        texts = [clean_caption(prompt) if self.clean else prompt for prompt in prompts]
        device = self.model.device
        if self._decoder is None or not self._decoder.is_current:
            self._decoder = Decoder(self.model)
        decoder = self._decoder

        def sample(indices: Sequence[int], *, uniforms_BP: Tensor, **options: Any) -> SampledImages:
            features, mask = self.text_encoder([texts[index] for index in indices])
            return decoder.images(
                features_BTC=features,
                caption_mask_BT=mask,
                uniforms_BP=uniforms_BP.to(device, widest_float(device)),
                **options,
            )

        return sample


def save_llamagen(
    folder: str | Path,
    *,
    model: LlamaGen,
    state_dict: dict[str, Tensor] | None = None,
    visual_tokenizer: str | Path | QLIPImages | ExternalTokenizer,
    text_encoder: TextEncoderConfig,
    clean: bool = False,
) -> None:
    """Write the model atomically with a model card, and with its visual tokenizer in `qlip/` if that is a QLIP (also
    its folder or hub id); a T5 and an external tokenizer stay where their names say."""
    encoder = asdict(text_encoder)
    qlip: QLIPImages | ExternalTokenizer
    if isinstance(visual_tokenizer, QLIPImages | ExternalTokenizer):
        qlip = visual_tokenizer
    else:
        qlip = QLIPImages(*tokenizer.load(visual_tokenizer))
        if text_encoder.kind == "qlip" and Path(text_encoder.name) == Path(visual_tokenizer):
            encoder["name"] = ""
    with atomic_folder(folder) as partial:
        model.config.update(
            {"text_encoder": encoder, "clean_captions": clean, "tokenizer_fingerprint": qlip.fingerprint}
        )
        model.save_pretrained(partial, state_dict=state_dict)
        write_checksums(partial)
        if isinstance(qlip, QLIPImages):
            qlip.model.save_pretrained(partial / QLIP_FOLDER)
            qlip.processor.save_pretrained(partial / QLIP_FOLDER)
        facts: dict[str, Any] = {"fingerprint": qlip.fingerprint, "encoder": encoder, "config": model.config}
        facts["qlip_license"] = qlip.model.config.weights_license if isinstance(qlip, QLIPImages) else ""
        template = Path(__file__).with_name("model_card.md")
        card = render_card(template, pipeline_tag="text-to-image", library_name=None, **facts)
        write_text(partial / "README.md", card)
