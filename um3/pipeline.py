"""UM3 in use: prompts -> pictures, pictures -> captions, text -> text, pictures -> codes -> pictures.

Shapes: B samples, N patches, P visual ids of an image, H height, W width, C channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tokenizer
from tokenizer.images import QLIPImages, decode_codes, encode_images
from um3 import rows
from um3.core.errors import UserError
from um3.core.progress import Progress
from um3.core.seeds import derive_seed
from um3.ids import IdSpace
from um3.model import QLIP_FOLDER, load_model
from um3.sampling import Sampling, draw_images, write_text
from um3.text_tokenizer import decode, encode_captions, encode_texts

if TYPE_CHECKING:
    from PIL import Image

    from tokenizer.modeling import QLIPModel
    from tokenizer.processor import QLIPProcessor


@dataclass(frozen=True)
class Generated:
    """Drawn images, prompt-major: the copies of prompt 0 first.

    images: uint8 (B, H, W, 3); codes: int64 (B, N); logprobs: (B,) in nats, see `um3.sampling.DrawnImages`;
    seeds: what each image's random numbers came from.
    """

    images: np.ndarray
    codes: Tensor
    prompts: list[str]
    seeds: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Reconstruction:
    """Pictures through the tokenizer and back: originals and images uint8 (B, H, W, 3), codes int64 (B, N)."""

    originals: np.ndarray
    images: np.ndarray
    codes: Tensor


class UM3Pipeline:
    """A trained UM3 with its text tokenizer and its visual tokenizer.

    The same seed gives the same image for a prompt at the same place in the list, whatever the batch size.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        ids: IdSpace,
        qlip: "QLIPModel",
        processor: "QLIPProcessor",
    ):
        if (qlip.num_bits, qlip.num_patches) != (ids.num_bits, ids.num_patches):
            raise UserError(
                f"the visual tokenizer makes {qlip.num_patches} codes of {qlip.num_bits} bits, the model reads "
                f"{ids.num_patches} of {ids.num_bits}; use the tokenizer it was trained with"
            )
        self.model, self.text_tokenizer, self.ids = model, text_tokenizer, ids
        self.qlip, self.processor = qlip, processor

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder written by `um3.model.save_model`; the visual tokenizer keeps its own precision.

        Raises:
            UserError: no such model, or its visual tokenizer is not the one it was trained with.
        """
        loaded = load_model(folder, device=device, dtype=dtype)
        qlip, processor = tokenizer.load(Path(folder) / QLIP_FOLDER)
        if qlip.fingerprint() != loaded.fingerprint:
            raise UserError(
                f"{folder} was trained on the visual tokenizer {loaded.fingerprint} but {QLIP_FOLDER}/ holds "
                f"{qlip.fingerprint()}; put the right one back"
            )
        return cls(
            model=loaded.model,
            text_tokenizer=loaded.text_tokenizer,
            ids=loaded.ids,
            qlip=qlip.to(device),  # type: ignore[arg-type]
            processor=processor,
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        guidance_scale: float = 1.0,
        batch_size: int = 64,
    ) -> Generated:
        """Draw `num_images` pictures of every prompt.

        Raises:
            UserError: an empty prompt, one longer than the context, or a sampling value out of its range.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, guidance_scale=guidance_scale)
        _check_counts(num_images=num_images, batch_size=batch_size)
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise UserError(f"prompt {index + 1} is empty; say what to draw")
        ids = self.ids
        starts = [rows.image_prompt(each, ids=ids) for each in encode_captions(prompts, tokenizer=self.text_tokenizer)]
        jobs = [(index, copy) for index in range(len(prompts)) for copy in range(num_images)]
        seeds = [derive_seed(seed, "image", index, copy) for index, copy in jobs]
        codes, logprobs = [torch.empty(0, ids.num_patches, dtype=torch.int64)], []
        for batch in _batches(len(jobs), batch_size=batch_size, label="draw images"):
            drawn = draw_images(
                self.model,
                prompts=[starts[jobs[job][0]] for job in batch],
                unconditional_prompt=rows.image_prompt([], ids=ids),
                ids=ids,
                sampling=sampling,
                uniforms_BP=_uniforms([seeds[job] for job in batch], count=ids.image_tokens),
            )
            codes.append(ids.ids_to_codes(drawn.visual_ids).cpu())
            logprobs += drawn.logprobs.tolist()
        codes_BN = torch.cat(codes)
        return Generated(
            images=self.decode(codes_BN, batch_size=batch_size),
            codes=codes_BN,
            prompts=[prompts[index] for index, _ in jobs],
            seeds=seeds,
            logprobs=logprobs,
        )

    def caption(
        self,
        images: "np.ndarray | Sequence[Image.Image]",
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 32,
        batch_size: int = 64,
        seed: int = 0,
    ) -> list[str]:
        """One caption per picture, white space collapsed; greedy unless a temperature is given."""
        return self.caption_codes(
            self.encode(images, batch_size=batch_size),
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
        )

    def caption_codes(
        self,
        codes_BN: Tensor,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 32,
        batch_size: int = 64,
        seed: int = 0,
    ) -> list[str]:
        """`caption` for pictures that are codes (B, N) already."""
        starts = [rows.caption_prompt(visual, ids=self.ids) for visual in self.ids.codes_to_ids(codes_BN.cpu())]
        sampling = Sampling(temperature=temperature, top_p=top_p)
        written = self._write(
            starts, name="caption", sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
        )
        return [" ".join(caption.split()) for caption in written]

    def complete(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 0.95,
        batch_size: int = 64,
        seed: int = 0,
    ) -> list[str]:
        """Continuations of `texts`, to be put right behind them."""
        encoded = encode_texts(texts, tokenizer=self.text_tokenizer)
        starts = [rows.text_prompt(each, ids=self.ids) for each in encoded]
        sampling = Sampling(temperature=temperature, top_p=top_p)
        return self._write(
            starts, name="complete", sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
        )

    def reconstruct(self, images: "np.ndarray | Sequence[Image.Image]", *, batch_size: int = 64) -> Reconstruction:
        """Pictures -> codes -> pictures."""
        codes_BN = self.encode(images, batch_size=batch_size)
        return Reconstruction(
            originals=self.processor.images(self.processor.pixels(images)),
            images=self.decode(codes_BN, batch_size=batch_size),
            codes=codes_BN,
        )

    def encode(self, images: "np.ndarray | Sequence[Image.Image]", *, batch_size: int = 64) -> Tensor:
        """Pictures (uint8 (B, H, W, 3) at the tokenizer's size, or PIL images of any) -> codes (B, N) on the CPU."""
        return encode_images(QLIPImages(self.qlip, self.processor), images, batch_size=batch_size)

    def decode(self, codes_BN: Tensor, *, batch_size: int = 64) -> np.ndarray:
        """Codes (B, N) -> pictures uint8 (B, H, W, 3)."""
        return decode_codes(QLIPImages(self.qlip, self.processor), codes_BN, batch_size=batch_size)

    def _write(
        self, starts: list[Tensor], *, name: str, sampling: Sampling, max_new_tokens: int, batch_size: int, seed: int
    ) -> list[str]:
        _check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        texts: list[str] = []
        for batch in _batches(len(starts), batch_size=batch_size, label=name):
            written = write_text(
                self.model,
                prompts=[starts[index] for index in batch],
                ids=self.ids,
                sampling=sampling,
                uniforms_BP=_uniforms([derive_seed(seed, name, index) for index in batch], count=max_new_tokens),
            )
            texts += [decode(token_ids, tokenizer=self.text_tokenizer) for token_ids in written]
        return texts


def _uniforms(seeds: Sequence[int], *, count: int) -> Tensor:
    """Uniform numbers (B, count), every row from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


def _batches(count: int, *, batch_size: int, label: str) -> Iterator[range]:
    progress = Progress(count, label=label)
    for start in range(0, count, batch_size):
        batch = range(start, min(start + batch_size, count))
        yield batch
        progress.advance(len(batch))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name.replace('_', ' ')} is {count}; use 1 or more")
