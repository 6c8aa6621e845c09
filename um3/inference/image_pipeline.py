"""Prompts -> images, and images -> codes -> images: what all generators on a visual tokenizer's codes share.

Shapes: B samples, N patches, P ids of an image, H height, W width, C channels.
"""

import functools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self, Unpack

import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor, nn

import tokenizer
from tokenizer.images import ExternalTokenizer, QLIPImages, decode_codes, embed_images, embed_texts, encode_images
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError
from um3.core.progress import batches
from um3.inference.generate import FREE, SampledImages, check_finite, uniforms
from um3.inference.image_io import Images, image_metadata, open_images
from um3.inference.inpainting import Region, region_patches
from um3.inference.outputs import Generated, Reconstruction
from um3.inference.requests import Watch, check_counts, check_pairs, check_texts, resolve_seeds
from um3.inference.sampling_params import ImageOptions, Sampling
from um3.model.language_model import QLIP_FOLDER

MAX_IMAGES = 1_000_000
"""Upper limit per call, to catch typos."""
SAME_IMAGE = 1.0
"""Mean difference in grey levels below which two images are one: devices round differently."""


class GenerateOptions(ImageOptions, total=False):
    """The options of `ImagePipeline.generate`."""

    num_images: int
    best_of: int
    seed: int
    seeds: Sequence[int] | None
    batch_size: int
    watch: Watch | None


def load_visual_tokenizer(folder: Path, *, fingerprint: str) -> tuple[QLIPModel, QLIPProcessor]:
    """The visual tokenizer in a model's folder; UserError unless it is that of the model's training."""
    if not (folder / QLIP_FOLDER / "config.json").is_file():
        raise UserError(f"{folder} lacks its visual tokenizer; put the QLIP of its training into {QLIP_FOLDER}/")
    qlip, processor = tokenizer.load(folder / QLIP_FOLDER)
    if qlip.fingerprint() != fingerprint:
        raise UserError(
            f"{folder} was trained with the visual tokenizer {fingerprint} but {QLIP_FOLDER}/ holds "
            f"{qlip.fingerprint()}; restore the right one"
        )
    return qlip, processor


class SampleImages(Protocol):
    """Samples one image for each index of a prompt; the arguments are those of `um3.inference.generate.Sampler`."""

    def __call__(
        self,
        indices: Sequence[int],
        *,
        sampling: Sampling,
        uniforms_BP: Tensor,
        kept_BP: Tensor | None,
        watch: Callable[[Tensor], None] | None,
    ) -> SampledImages: ...


class ImagePipeline(ABC):
    """A generator with its visual tokenizer; a model adds `image_tokens`, `sampler_for` and the meaning of its ids.

    The same seed, prompt and options give the same result, alone or with others, in batches of any size. Without
    `seeds`, each result's seed is derived from `seed` and the index in the call. `images` are uint8 (B, H, W, 3) at the
    tokenizer's size, or PIL images of any size. All calls raise UserError for an invalid value or too long a text.
    """

    def __init__(self, *, visual_tokenizer: QLIPImages | ExternalTokenizer, name: str = ""):
        self.visual_tokenizer, self.name = visual_tokenizer, name

    @property
    def qlip(self) -> QLIPModel:
        """The QLIP; UserError if the visual tokenizer is another one."""
        return self._towers.model

    @property
    def processor(self) -> QLIPProcessor:
        """The QLIP's processor; UserError if the visual tokenizer is another one."""
        return self._towers.processor

    @property
    def _towers(self) -> QLIPImages:
        if not isinstance(self.visual_tokenizer, QLIPImages):
            raise UserError(f"{self.name}: this needs QLIP's own towers; the model has an external tokenizer")
        return self.visual_tokenizer

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The fingerprint of the visual tokenizer, to which all codes belong."""

    @property
    @abstractmethod
    def image_tokens(self) -> int:
        """Ids of an image, P."""

    @property
    def image_choices(self) -> int:
        """Random choices of an image, of which each needs a number: one an id, unless a model says otherwise."""
        return self.image_tokens

    @property
    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """What generates: all modules except the visual tokenizer."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads, with a model card; it replaces one that exists."""

    @abstractmethod
    def sampler_for(self, prompts: Sequence[str]) -> SampleImages:
        """Prepare the prompts, and check that they fit."""

    @abstractmethod
    def ids_of(self, codes_BN: Tensor) -> Tensor:
        """Codes (..., N) -> the model's ids (..., P)."""

    @abstractmethod
    def codes_of(self, ids_BP: Tensor) -> Tensor:
        """The model's ids (..., P) -> codes (..., N)."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.networks[0].parameters()).device

    def to(self, device: str | torch.device | torch.dtype | None = None, *, dtype: torch.dtype | None = None) -> Self:
        """Move the pipeline to a device, and convert all but the visual tokenizer, whose codes would change."""
        device, dtype = (None, device) if isinstance(device, torch.dtype) else (device, dtype)
        for network in self.networks:
            network.to(device, dtype)
        if device is not None and isinstance(self.visual_tokenizer, QLIPImages):
            self.visual_tokenizer.model.to(device)  # type: ignore[arg-type]
        return self

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, which is made; its address.

        UserError if the hub refuses, for example without `hf auth login` or a `token`.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(model := Path(folder) / "model")
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo.repo_id, folder_path=model, commit_message="Upload model")
            except Exception as error:  # those of the client, and of whatever HTTP library it uses
                reason, remedy = " ".join(str(error).split())[:200], "check its name, `hf auth login` and the network"
                raise UserError(f"cannot upload to '{repo_id}' ({reason}); {remedy}") from None
        return str(repo)

    def __call__(self, prompts: Sequence[str] | str, **options: Unpack[GenerateOptions]) -> Generated:
        """`generate`."""
        return self.generate(prompts, **options)

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        num_images: int = 1,
        best_of: int = 0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        keep: Callable[[int, int], Tensor] | None = None,
        watch: Watch | None = None,
        **options: Unpack[ImageOptions],
    ) -> Generated:
        """Generate `num_images` images of every prompt; `options` are those of `Sampling`.

        Args:
            best_of: generate that many per prompt and return the `num_images` that match it best by QLIP's own towers,
                the best first; 0 for no ranking.
            seeds: one seed per generated image, prompt-major.
            keep: (index of the prompt, seed of the image) -> visual ids (P,) to keep, FREE where to sample.
            watch: called at every position; replaces the progress line.
        """
        prompts = check_texts(prompts, kind="prompt", may_be_empty=bool(keep))
        sampling = Sampling(**options)
        check_counts(batch_size=batch_size, num_images=num_images)
        if best_of and best_of < num_images:
            message = f"best_of={best_of} is less than num_images={num_images}; use more, or 0 for no ranking"
            raise UserError(message, parameter="best_of")
        copies = best_of or num_images
        if len(prompts) * copies > MAX_IMAGES:
            raise UserError(f"{len(prompts) * copies:,} images in one call; at most {MAX_IMAGES:,}")
        names = [("image", index, copy) for index in range(len(prompts)) for copy in range(copies)]
        seeds, prompt_of = resolve_seeds(seeds, names=names, seed=seed), [index for _, index, _ in names]
        sample = self.sampler_for(prompts)
        if best_of:
            _ = self.processor.text_tokenizer  # ranking needs it: raise before the work, not after it
        codes, logprobs = [torch.empty(0, self.visual_tokenizer.num_codes, dtype=torch.int64)], []
        for batch in batches(len(seeds), batch_size=batch_size, label="" if watch else "generate images"):
            sampled = sample(
                prompt_of[batch],
                sampling=sampling,
                uniforms_BP=uniforms(seeds[batch], count=self.image_choices),
                kept_BP=torch.stack([*map(keep, prompt_of[batch], seeds[batch])]) if keep else None,
                watch=None if watch is None else functools.partial(watch, range(batch.start, batch.stop)),
            )
            codes.append(self.codes_of(sampled.visual_ids).cpu())
            logprobs += sampled.logprobs.tolist()
        codes_BN = torch.cat(codes)
        images_BHWC = self.decode(codes_BN, batch_size=batch_size)
        settings = {**sampling.to_dict(), "model": self.name}
        generated = Generated(images_BHWC, codes_BN, [prompts[index] for index in prompt_of], seeds, logprobs, settings)
        if not best_of:
            return generated
        similarities = self.similarity(generated.arrays, generated.prompts)
        chosen: list[int] = []
        for start in range(0, len(similarities), best_of):
            ranked = sorted(range(start, start + best_of), key=lambda index: -similarities[index])
            chosen += ranked[:num_images]
        return replace(generated, similarities=similarities).take(chosen).with_settings(best_of=best_of)

    def inpaint(
        self, images: Images, prompts: Sequence[str], *, redraw: Region, **options: Unpack[GenerateOptions]
    ) -> Generated:
        """Generate a region of each image anew for its prompt; patches outside the region keep their codes.

        `redraw` is (left, top, right, bottom) as shares of the image, or a bool array over the grid of patches. Patches
        are generated in reading order: each depends on what is kept above and left of it, not right of or below it.
        `options` are those of `generate`.
        """
        codes_BN = self.encode(images, batch_size=options.get("batch_size", 64))
        return self.inpaint_codes(codes_BN, prompts, redraw=redraw, **options)

    def inpaint_codes(
        self, codes_BN: Tensor, prompts: Sequence[str], *, redraw: Region, **options: Unpack[GenerateOptions]
    ) -> Generated:
        """`inpaint` for images as their codes (B, N)."""
        free_N = region_patches(redraw, num_patches=self.visual_tokenizer.num_codes)
        generated = self._redraw(codes_BN, prompts, free_of=lambda seed: free_N, **options)
        return generated.with_settings(redrawn_patches=free_N.nonzero().flatten().tolist())

    @property
    def can_rank(self) -> bool:
        """Whether the QLIP has the text tokenizer that `similarity` needs."""
        try:
            return self.processor.text_tokenizer is not None
        except UserError:
            return False

    def similarity(self, images: Images, texts: Sequence[str]) -> list[float]:
        """Cosine of each image and its text in QLIP's towers (see `can_rank`); long texts are cut to its positions."""
        images = open_images(images)
        check_pairs(images, texts)
        if not texts:
            return []
        images_BP = embed_images(images, model=self.qlip, processor=self.processor)
        cosines_B = (images_BP * embed_texts(texts, model=self.qlip, processor=self.processor)).sum(-1)
        check_finite(cosines_B, what="the visual tokenizer's embeddings")
        return cosines_B.tolist()

    def reconstruct(self, images: Images, *, batch_size: int = 64) -> Reconstruction:
        """Images -> codes -> images."""
        images = open_images(images)
        codes_BN = self.encode(images, batch_size=batch_size)
        return Reconstruction(
            originals=self.processor.images(self.processor.pixels(images)),
            arrays=self.decode(codes_BN, batch_size=batch_size),
            codes=codes_BN,
        )

    def encode(self, images: Images, *, batch_size: int = 64) -> Tensor:
        """Images -> codes int64 (B, N) on the CPU."""
        return encode_images(self.visual_tokenizer, open_images(images), batch_size=batch_size)

    def known_codes(self, images: Images, *, batch_size: int = 64) -> Tensor:
        """Codes int64 (B, N): of an image that was generated with this tokenizer those of its metadata, else `encode`.

        Encoding a generated image gives other codes in places. Metadata is believed if its codes decode to the image.
        """
        images = open_images(images)
        codes_BN, size = self.encode(images, batch_size=batch_size), self.visual_tokenizer.image_size
        for index, image in enumerate(images):
            if not isinstance(image, Image.Image) or image.size != (size, size):
                continue
            codes = image_metadata(image).get("codes")
            if not isinstance(codes, list) or len(codes) != codes_BN.shape[1]:
                continue
            if all(type(code) is int and 0 <= code < 1 << self.visual_tokenizer.num_bits for code in codes):
                array_HW3 = self.decode(torch.tensor([codes]))[0].astype(np.float32)
                if np.abs(array_HW3 - np.asarray(image.convert("RGB"))).mean() < SAME_IMAGE:
                    codes_BN[index] = torch.tensor(codes)
        return codes_BN

    def decode(self, codes_BN: Tensor, *, batch_size: int = 64) -> np.ndarray:
        """Codes (B, N) -> images uint8 (B, H, W, 3)."""
        return decode_codes(self.visual_tokenizer, codes_BN, batch_size=batch_size)

    def _redraw(
        self,
        codes_BN: Tensor,
        prompts: Sequence[str],
        *,
        free_of: Callable[[int], Tensor],
        **options: Unpack[GenerateOptions],
    ) -> Generated:
        """Generate the patches anew that are true in `free_of` (the image's seed), bool (N,)."""
        prompts = check_texts(prompts, kind="prompt")
        check_pairs(codes_BN, prompts)

        def keep(index: int, seed: int) -> Tensor:
            free_P = free_of(seed).repeat_interleave(self.image_tokens // self.visual_tokenizer.num_codes)
            return self.ids_of(codes_BN[index]).masked_fill(free_P, FREE)

        return self.generate(prompts, keep=keep, **options)
