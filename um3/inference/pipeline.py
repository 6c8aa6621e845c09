"""UM3 in use: prompts -> pictures, pictures -> captions, text -> text, mixtures, pictures -> codes -> pictures.

Shapes: B samples, N patches, P visual ids of an image, H height, W width, C channels.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tokenizer
from tokenizer.images import QLIPImages, decode_codes, encode_images
from um3.core.errors import UserError
from um3.core.hub import model_folder
from um3.core.progress import track
from um3.inference import inpainting as regions
from um3.inference.decoder import Body, check_room
from um3.inference.generate import draw_images, image_logprob, text_logprob, uniforms, write_text
from um3.inference.interleave import Answer, interleave
from um3.inference.outputs import Generated, PairScores, Part, Reconstruction, Texts
from um3.inference.requests import Jobs, Watch, as_texts, batches, check_counts, check_pairs, own_seeds
from um3.inference.sampling_params import ImageOptions, Sampling, TextOptions
from um3.model import sequences as rows
from um3.model.language_model import QLIP_FOLDER, load_model
from um3.model.text_tokenizer import decode, encode_captions, encode_texts
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from PIL import Image

    from tokenizer.modeling import QLIPModel
    from tokenizer.processor import QLIPProcessor

    Pictures = np.ndarray | Sequence[Image.Image]


class UM3Pipeline:
    """A trained UM3 with its text tokenizer and its visual tokenizer; the same calls on a CPU and on a GPU.

    Every image and text has a seed of its own, which the results carry: with the same prompt and options it gives the
    same again, alone or beside others, in batches of any size. Without `seeds` they are derived from `seed` and the
    place in the call.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        ids: UnifiedVocabulary,
        qlip: "QLIPModel",
        processor: "QLIPProcessor",
        name: str = "",
    ):
        if (qlip.num_bits, qlip.num_patches) != (ids.num_bits, ids.num_patches):
            raise UserError(
                f"the visual tokenizer makes {qlip.num_patches} codes of {qlip.num_bits} bits, the model reads "
                f"{ids.num_patches} of {ids.num_bits}; use the tokenizer it was trained with"
            )
        self.model, self.text_tokenizer, self.ids = model, text_tokenizer, ids
        self.qlip, self.processor, self.name = qlip, processor, name

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Load what `um3.model.language_model.save_model` wrote, a folder or a hub id; the visual tokenizer keeps its own precision.

        Raises:
            UserError: no such model, a part of it missing, or its visual tokenizer is not the one it was trained with.
        """
        folder = model_folder(path_or_hub_id)
        loaded = load_model(folder, device=device, dtype=dtype)
        if not (folder / QLIP_FOLDER / "config.json").is_file():
            raise UserError(
                f"{folder} lacks its visual tokenizer; put the QLIP it was trained with into {QLIP_FOLDER}/"
            )
        qlip, processor = tokenizer.load(folder / QLIP_FOLDER)
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
            name=str(path_or_hub_id),
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        best_of: int = 0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        watch: Watch | None = None,
        **options: Unpack[ImageOptions],
    ) -> Generated:
        """Draw `num_images` pictures of every prompt; `options` are those of `um3.inference.sampling_params.Sampling`.

        With `best_of` that many are drawn of each prompt, and those returned that fit it best by QLIP's own towers, the
        best first. `seeds` gives each drawn image its own, prompt-major. `watch` takes the place of the progress line.

        Raises:
            UserError: an empty prompt, one longer than the context, or a value out of its range.
        """
        prompts = as_texts(prompts, what="prompt")
        jobs = Jobs(prompts, num_images=num_images, best_of=best_of, seed=seed, seeds=seeds)
        return self._draw(jobs, sampling=Sampling(**options), batch_size=batch_size, watch=watch)

    def inpaint(
        self,
        images: "Pictures",
        prompts: Sequence[str],
        *,
        redraw: "regions.Region",
        num_images: int = 1,
        best_of: int = 0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        **options: Unpack[ImageOptions],
    ) -> Generated:
        """Draw a region of each picture anew for its prompt; the patches outside keep their codes.

        `redraw` is (left, top, right, bottom) in shares of the picture, or true where to draw on the grid of patches.
        Patches are drawn in reading order: one knows what stays above and left of it, not what stays right and below.
        """
        prompts = as_texts(prompts, what="prompt")
        free_N = regions.patches(redraw, num_patches=self.ids.num_patches)
        codes_BN = self.encode(images, batch_size=batch_size)
        check_pairs(codes_BN, prompts)
        jobs = Jobs(prompts, num_images=num_images, best_of=best_of, seed=seed, seeds=seeds)
        kept = [regions.keep(codes_BN[index], free_N=free_N, ids=self.ids) for index in jobs.prompt_of]
        settings = {"redrawn_patches": free_N.nonzero().flatten().tolist()}
        return self._draw(jobs, sampling=Sampling(**options), batch_size=batch_size, kept=kept, settings=settings)

    def vary(
        self,
        images: "Pictures",
        prompts: Sequence[str] | None = None,
        *,
        strength: float = 0.5,
        num_images: int = 1,
        best_of: int = 0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        **options: Unpack[ImageOptions],
    ) -> Generated:
        """Variations of each picture: a patch is drawn anew with probability `strength`, or keeps its code.

        Which patches, the image's seed says. Without prompts the model's own captions take their place.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength} is outside (0, 1]; 1 draws every patch anew")
        codes_BN = self.encode(images, batch_size=batch_size)
        if prompts is None:
            prompts = self.caption_codes(codes_BN, batch_size=batch_size)
        else:
            prompts = as_texts(prompts, what="prompt")
        check_pairs(codes_BN, prompts)
        jobs = Jobs(prompts, num_images=num_images, best_of=best_of, seed=seed, seeds=seeds)
        frees = [regions.scattered(strength, seed=each, num_patches=self.ids.num_patches) for each in jobs.seeds]
        kept = [
            regions.keep(codes_BN[index], free_N=free_N, ids=self.ids)
            for index, free_N in zip(jobs.prompt_of, frees, strict=True)
        ]
        settings = {"strength": strength}
        return self._draw(jobs, sampling=Sampling(**options), batch_size=batch_size, kept=kept, settings=settings)

    def caption(
        self,
        images: "Pictures",
        *,
        max_new_tokens: int = 32,
        batch_size: int = 64,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Unpack[TextOptions],
    ) -> Texts:
        """One caption per picture, white space collapsed; greedy unless a temperature is given."""
        return self.caption_codes(
            self.encode(images, batch_size=batch_size),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            seeds=seeds,
            **options,
        )

    def caption_codes(
        self,
        codes_BN: Tensor,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 64,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Unpack[TextOptions],
    ) -> Texts:
        """`caption` for pictures that are codes (B, N) already."""
        starts = [rows.caption_prompt(visual, ids=self.ids) for visual in self.ids.codes_to_ids(codes_BN.cpu())]
        seeds = own_seeds(seeds, names=[("caption", index) for index in range(len(starts))], seed=seed)
        sampling = Sampling(**{"temperature": 0.0, **options})  # type: ignore[arg-type]
        written = self._write(starts, seeds, sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size)
        captions = [" ".join(caption.split()) for caption in written]
        return Texts(captions, seeds=written.seeds, logprobs=written.logprobs)

    def complete(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Unpack[TextOptions],
    ) -> Texts:
        """Continuations of `texts`, to be put right behind them; top-p is 0.95 unless given."""
        encoded = encode_texts(as_texts(texts, what="text", may_be_empty=True), tokenizer=self.text_tokenizer)
        starts = [rows.text_prompt(each, ids=self.ids) for each in encoded]
        seeds = own_seeds(seeds, names=[("complete", index) for index in range(len(starts))], seed=seed)
        sampling = Sampling(**{"top_p": 0.95, **options})  # type: ignore[arg-type]
        return self._write(starts, seeds, sampling=sampling, max_new_tokens=max_new_tokens, batch_size=batch_size)

    def interleave(
        self,
        messages: "Sequence[str | Image.Image | np.ndarray]",
        *,
        answer: Answer = "any",
        max_new_tokens: int = 64,
        max_images: int = 1,
        seed: int = 0,
        **options: Unpack[ImageOptions],
    ) -> list[Part]:
        """Go on after texts and pictures in any order, with texts and pictures as the model chooses.

        `answer` "text" forbids pictures, "image" begins with one. All texts together have at most `max_new_tokens`;
        while a picture may still come, the room it takes in the context is kept free.

        Raises:
            UserError: messages that fill the context, a message of another kind, or a value out of its range.
        """
        check_counts(max_new_tokens=max_new_tokens, max_images=max_images)
        return interleave(
            self,
            messages,
            answer=answer,
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            seed=seed,
            sampling=Sampling(**options),
        )

    def score(self, images: "Pictures", texts: Sequence[str], *, batch_size: int = 64) -> PairScores:
        """How likely the model finds each text given its picture and the other way round, and QLIP's cosine of the two.

        Raises:
            UserError: as many texts as pictures are needed; a text too long for the context.
        """
        texts, ids = as_texts(texts, what="text"), self.ids
        codes_BN = self.encode(images, batch_size=batch_size)
        check_pairs(codes_BN, texts)
        tokens = [torch.tensor(each) for each in encode_captions(texts, tokenizer=self.text_tokenizer)]
        starts = [rows.image_prompt(each, ids=ids) for each in tokens]
        check_room(starts, num_new=ids.image_tokens + 1, limit=self.model.config.max_position_embeddings)
        body = Body(self.model)
        text_logprobs, image_logprobs = [], []
        pairs = zip(ids.codes_to_ids(codes_BN), tokens, starts, strict=True)
        for visual_ids, token_ids, start in track(pairs, total=len(texts), label="score"):
            described = rows.caption_prompt(visual_ids, ids=ids)
            text_logprobs.append(text_logprob(body, prompt=described, token_ids=token_ids, ids=ids))
            image_logprobs.append(image_logprob(body, prompt=start, visual_ids=visual_ids, ids=ids))
        try:
            fits = self.fits(images, texts, batch_size=batch_size)
        except UserError:
            fits = None
        return PairScores(text_logprobs=text_logprobs, image_logprobs=image_logprobs, fits=fits)

    @torch.inference_mode()
    def fits(self, images: "Pictures", texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """Cosine of each picture and its text in QLIP's own towers; long texts are cut to the tower's positions.

        Raises:
            UserError: this QLIP came without a text tokenizer.
        """
        check_pairs(images, texts)
        found: list[float] = []
        for start in range(0, len(texts), batch_size):
            batch = slice(start, start + batch_size)
            pixels_BCHW = self.processor.pixels(images[batch]).to(self.qlip.device, self.qlip.dtype)
            words = {name: each.to(self.qlip.device) for name, each in self.processor.text(texts[batch]).items()}
            cosines_B = (self.qlip.get_image_features(pixels_BCHW) * self.qlip.get_text_features(**words)).sum(-1)
            found += cosines_B.float().tolist()
        return found

    def reconstruct(self, images: "Pictures", *, batch_size: int = 64) -> Reconstruction:
        """Pictures -> codes -> pictures."""
        codes_BN = self.encode(images, batch_size=batch_size)
        return Reconstruction(
            originals=self.processor.images(self.processor.pixels(images)),
            images=self.decode(codes_BN, batch_size=batch_size),
            codes=codes_BN,
        )

    def encode(self, images: "Pictures", *, batch_size: int = 64) -> Tensor:
        """Pictures (uint8 (B, H, W, 3) at the tokenizer's size, or PIL images of any) -> codes (B, N) on the CPU."""
        return encode_images(QLIPImages(self.qlip, self.processor), images, batch_size=batch_size)

    def decode(self, codes_BN: Tensor, *, batch_size: int = 64) -> np.ndarray:
        """Codes (B, N) -> pictures uint8 (B, H, W, 3)."""
        return decode_codes(QLIPImages(self.qlip, self.processor), codes_BN, batch_size=batch_size)

    def _draw(
        self,
        jobs: Jobs,
        *,
        sampling: Sampling,
        batch_size: int,
        kept: Sequence[Tensor] | None = None,
        settings: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> Generated:
        check_counts(batch_size=batch_size)
        ids = self.ids
        tokens = encode_captions(jobs.prompts, tokenizer=self.text_tokenizer)
        starts = [rows.image_prompt(each, ids=ids) for each in tokens]
        check_room(starts, num_new=ids.image_tokens, limit=self.model.config.max_position_embeddings)
        if jobs.best_of:
            _ = self.processor.text_tokenizer  # without one nothing can be ranked: said before the work, not after it
        codes, logprobs = [torch.empty(0, ids.num_patches, dtype=torch.int64)], []
        for batch in batches(len(jobs.seeds), batch_size=batch_size, label="" if watch else "draw images"):
            drawn = draw_images(
                self.model,
                prompts=[starts[jobs.prompt_of[job]] for job in batch],
                unconditional_prompt=rows.image_prompt([], ids=ids),
                ids=ids,
                sampling=sampling,
                uniforms_BP=uniforms([jobs.seeds[job] for job in batch], count=ids.image_tokens),
                kept_BP=None if kept is None else torch.stack([kept[job] for job in batch]),
                watch=None if watch is None else functools.partial(watch, batch),
            )
            codes.append(ids.ids_to_codes(drawn.visual_ids).cpu())
            logprobs += drawn.logprobs.tolist()
        codes_BN = torch.cat(codes)
        generated = Generated(
            images=self.decode(codes_BN, batch_size=batch_size),
            codes=codes_BN,
            prompts=[jobs.prompts[index] for index in jobs.prompt_of],
            seeds=jobs.seeds,
            logprobs=logprobs,
            settings={**sampling.to_dict(), **(settings or {}), "model": self.name},
        )
        return self._best(generated, jobs=jobs, batch_size=batch_size) if jobs.best_of else generated

    def _best(self, generated: Generated, *, jobs: Jobs, batch_size: int) -> Generated:
        """Of each prompt's images the `num_images` that fit it best."""
        fits = self.fits(generated.images, generated.prompts, batch_size=batch_size)
        chosen: list[int] = []
        for start in range(0, len(fits), jobs.best_of):
            ranked = sorted(range(start, start + jobs.best_of), key=lambda index: -fits[index])
            chosen += ranked[: jobs.num_images]
        best = generated.take(chosen, fits=[fits[index] for index in chosen])
        return dataclasses.replace(best, settings={**best.settings, "best_of": jobs.best_of})

    def _write(
        self, starts: list[Tensor], seeds: list[int], *, sampling: Sampling, max_new_tokens: int, batch_size: int
    ) -> Texts:
        check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        if sampling.guided:
            raise UserError("guidance is for drawing images; leave guidance_scale out for text")
        check_room(starts, num_new=max_new_tokens, limit=self.model.config.max_position_embeddings)
        texts: list[str] = []
        logprobs: list[float] = []
        for batch in batches(len(starts), batch_size=batch_size, label="write"):
            written = write_text(
                self.model,
                prompts=[starts[index] for index in batch],
                ids=self.ids,
                sampling=sampling,
                uniforms_BP=uniforms([seeds[index] for index in batch], count=max_new_tokens),
            )
            texts += [decode(token_ids, tokenizer=self.text_tokenizer) for token_ids in written.token_ids]
            logprobs += written.logprobs
        return Texts(texts, seeds=seeds, logprobs=logprobs)
