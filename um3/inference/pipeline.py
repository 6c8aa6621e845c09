"""The pipeline: prompts -> images, images -> captions, text -> text, chat, mixtures, images -> codes -> images.

Shapes: B samples, N patches, P visual ids of an image, H height, W width, C channels.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tokenizer
from tokenizer.images import QLIPImages, decode_codes, embed_images, embed_texts, encode_images
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError
from um3.core.hub import model_folder
from um3.core.progress import track
from um3.core.seeds import torch_generator
from um3.core.text import valid_text
from um3.inference.chat import Messages, chat_prompts
from um3.inference.decoder import check_room
from um3.inference.generate import FREE, Sampler, check_finite, uniforms
from um3.inference.inpainting import Region, region_patches
from um3.inference.interleave import Answer, Conversation, Message
from um3.inference.outputs import Generated, PairScores, Part, Reconstruction, Texts
from um3.inference.requests import Watch, batches, check_counts, check_pairs, check_texts, resolve_seeds
from um3.inference.sampling_params import ImageOptions, Sampling, TextOptions
from um3.model import sequences
from um3.model.language_model import QLIP_FOLDER, load_model, trained_on
from um3.model.text_tokenizer import decode, encode_captions, encode_texts
from um3.model.vocabulary import UnifiedVocabulary

Images = np.ndarray | Sequence[Image.Image]
MAX_IMAGES = 1_000_000
"""Upper limit per call, to catch typos."""


class WriteOptions(TextOptions, total=False):
    """The options of `UM3Pipeline.caption`, `complete` and `chat`; without `seeds` they come from `seed`."""

    max_new_tokens: int
    batch_size: int
    seed: int
    seeds: Sequence[int] | None


class GenerateOptions(ImageOptions, total=False):
    """The options of `UM3Pipeline.generate`."""

    num_images: int
    best_of: int
    seed: int
    seeds: Sequence[int] | None
    batch_size: int
    watch: Watch | None


class UM3Pipeline:
    """A trained UM3 with its text tokenizer and its visual tokenizer; the same calls on a CPU and on a GPU.

    The same seed, prompt and options give the same result, alone or with others, in batches of any size. Without
    `seeds`, each result's seed is derived from `seed` and the index in the call. `images` are uint8 (B, H, W, 3) at the
    tokenizer's size, or PIL images of any size. All calls raise UserError for an invalid value or too long a text.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        ids: UnifiedVocabulary,
        qlip: QLIPModel,
        processor: QLIPProcessor,
        name: str = "",
    ):
        if (qlip.num_bits, qlip.num_patches) != (ids.num_bits, ids.num_patches):
            raise UserError(
                f"the visual tokenizer makes {qlip.num_patches} codes of {qlip.num_bits} bits, the model reads "
                f"{ids.num_patches} of {ids.num_bits}; use the tokenizer it was trained with"
            )
        self.model, self.text_tokenizer, self.ids = model, text_tokenizer, ids
        self.qlip, self.processor, self.name = qlip, processor, name
        self._sampler: Sampler | None = None

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder that `um3.model.language_model.save_model` wrote, or a hub id; UserError if it is incomplete.

        `dtype` is that of the language model. The visual tokenizer must be the one of its training and keeps its dtype.
        """
        folder = model_folder(path_or_hub_id, kind="UM3 model")
        loaded = load_model(folder, device=device, dtype=dtype)
        if not (folder / QLIP_FOLDER / "config.json").is_file():
            raise UserError(f"{folder} lacks its visual tokenizer; put the QLIP of its training into {QLIP_FOLDER}/")
        qlip, processor = tokenizer.load(folder / QLIP_FOLDER)
        if qlip.fingerprint() != loaded.fingerprint:
            raise UserError(
                f"{folder} was trained with the visual tokenizer {loaded.fingerprint} but {QLIP_FOLDER}/ holds "
                f"{qlip.fingerprint()}; restore the right one"
            )
        return cls(
            model=loaded.model,
            text_tokenizer=loaded.text_tokenizer,
            ids=loaded.ids,
            qlip=qlip.to(device),  # type: ignore[arg-type]
            processor=processor,
            name=valid_text(str(path_or_hub_id)),
        )

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the visual tokenizer, to which all codes belong."""
        return str(self.model.config.um3["tokenizer_fingerprint"])

    @property
    def trained_on(self) -> list[str]:
        """The names of the conversations that the model was trained on; empty if it never learnt to answer."""
        return trained_on(self.model.config.um3)

    @property
    def sampler(self) -> Sampler:
        """The sampler over the model's weights: built on first use, and again after the weights changed or moved.

        It does not notice edits through `parameter.data`; set `pipeline.model` anew or use in-place operations.
        """
        if self._sampler is None or not self._sampler.decoder.is_current(self.model):
            self._sampler = None  # free the old weights first
            self._sampler = Sampler(self.model, ids=self.ids)
        return self._sampler

    def generate(
        self,
        prompts: Sequence[str],
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
        ids, sampling = self.ids, Sampling(**options)
        check_counts(batch_size=batch_size, num_images=num_images)
        if best_of and best_of < num_images:
            raise UserError(f"best_of={best_of} is less than num_images={num_images}; use more, or 0 for no ranking")
        copies = best_of or num_images
        if len(prompts) * copies > MAX_IMAGES:
            raise UserError(f"{len(prompts) * copies:,} images in one call; at most {MAX_IMAGES:,}")
        names = [("image", index, copy) for index in range(len(prompts)) for copy in range(copies)]
        seeds, prompt_of = resolve_seeds(seeds, names=names, seed=seed), [index for _, index, _ in names]
        tokens = encode_captions(prompts, tokenizer=self.text_tokenizer)
        starts = [sequences.image_prompt(token_ids, ids=ids) for token_ids in tokens]
        check_room(starts, num_new=ids.image_tokens, limit=self.model.config.max_position_embeddings)
        if best_of:
            _ = self.processor.text_tokenizer  # ranking needs it: raise before the work, not after it
        codes, logprobs = [torch.empty(0, ids.num_patches, dtype=torch.int64)], []
        for batch in batches(len(seeds), batch_size=batch_size, label="" if watch else "generate images"):
            sampled = self.sampler.images(
                prompts=[starts[prompt_of[index]] for index in batch],
                unconditional_prompt=sequences.image_prompt([], ids=ids),
                sampling=sampling,
                uniforms_BP=uniforms([seeds[index] for index in batch], count=ids.image_tokens),
                kept_BP=torch.stack([keep(prompt_of[index], seeds[index]) for index in batch]) if keep else None,
                watch=None if watch is None else functools.partial(watch, batch),
            )
            codes.append(ids.ids_to_codes(sampled.visual_ids).cpu())
            logprobs += sampled.logprobs.tolist()
        codes_BN = torch.cat(codes)
        images_BHWC = self.decode(codes_BN, batch_size=batch_size)
        settings = {**sampling.to_dict(), "model": self.name}
        generated = Generated(images_BHWC, codes_BN, [prompts[index] for index in prompt_of], seeds, logprobs, settings)
        if not best_of:
            return generated
        similarities = self.similarity(generated.images, generated.prompts)
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
        free_N = region_patches(redraw, num_patches=self.ids.num_patches)
        generated = self._redraw(images, prompts, free_of=lambda seed: free_N, **options)
        return generated.with_settings(redrawn_patches=free_N.nonzero().flatten().tolist())

    def vary(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        *,
        strength: float = 0.5,
        **options: Unpack[GenerateOptions],
    ) -> Generated:
        """Variations of each image: every patch is generated anew with probability `strength`, else it keeps its code.

        An image's seed chooses its patches. Without prompts the model captions the images. `options` are those of
        `generate`.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength} is outside (0, 1]; 1 generates every patch anew")

        def free_of(seed: int) -> Tensor:
            return torch.rand(self.ids.num_patches, generator=torch_generator(seed, "patches")) < strength

        return self._redraw(images, prompts, free_of=free_of, **options).with_settings(strength=strength)

    def caption(self, images: Images, **options: Unpack[WriteOptions]) -> Texts:
        """One caption per image; see `caption_codes`."""
        codes_BN = self.encode(images, batch_size=options.get("batch_size", 64))
        return self.caption_codes(codes_BN, **options)

    def caption_codes(self, codes_BN: Tensor, **options: Unpack[WriteOptions]) -> Texts:
        """A caption per image from its codes (B, N), white space collapsed; by default greedy and at most 32 tokens."""
        visual_BP = self.ids.codes_to_ids(codes_BN.cpu())
        prompts = [sequences.caption_prompt(visual_P, ids=self.ids) for visual_P in visual_BP]
        texts = self._write(prompts, kind="caption", **WriteOptions(temperature=0.0, max_new_tokens=32) | options)
        return Texts([" ".join(text.split()) for text in texts], seeds=texts.seeds, logprobs=texts.logprobs)

    def complete(self, texts: Sequence[str], **options: Unpack[WriteOptions]) -> Texts:
        """Continuations of `texts`, to be appended without a space; by default at most 64 tokens with top-p 0.95."""
        encoded = encode_texts(check_texts(texts, kind="text", may_be_empty=True), tokenizer=self.text_tokenizer)
        prompts = [sequences.text_prompt(tokens, ids=self.ids) for tokens in encoded]
        return self._write(prompts, kind="complete", **WriteOptions(top_p=0.95) | options)

    def chat(self, messages: Messages | Sequence[Messages], **options: Unpack[WriteOptions]) -> Texts:
        """The answer to each conversation; by default greedy and at most 64 tokens.

        `messages`: one conversation or a list of them, as lists of messages in Hugging Face's form
        (`um3.inference.chat`) or plain questions. A model learns to answer by `make um3-instruct`.
        """
        prompts = chat_prompts(messages, pipeline=self, batch_size=options.get("batch_size", 64))
        texts = self._write(prompts, kind="chat", **WriteOptions(temperature=0.0) | options)
        return Texts([text.strip() for text in texts], seeds=texts.seeds, logprobs=texts.logprobs)

    def interleave(
        self,
        messages: Sequence[Message],
        *,
        answer: Answer = "any",
        max_new_tokens: int = 64,
        max_images: int = 1,
        seed: int = 0,
        **options: Unpack[ImageOptions],
    ) -> list[Part]:
        """Continue texts and images in any order with texts and images, as the model chooses.

        `answer` "text" forbids images, "image" begins with one. All texts together have at most `max_new_tokens`; the
        room of an image that may still come is reserved in the context. UM3 is trained on single images with captions,
        so longer mixtures are outside its training data.
        """
        check_counts(max_new_tokens=max_new_tokens, max_images=max_images)
        conversation = Conversation(self, messages, seed=seed, sampling=Sampling(**options))
        return conversation.answer(answer, max_new_tokens=max_new_tokens, max_images=max_images)

    def score(self, images: Images, texts: Sequence[str], *, batch_size: int = 64) -> PairScores:
        """The model's log-probability of each text given its image and vice versa, and their `similarity`."""
        texts, ids = check_texts(texts, kind="text"), self.ids
        codes_BN = self.encode(images, batch_size=batch_size)
        check_pairs(codes_BN, texts)
        tokens = [torch.tensor(token_ids) for token_ids in encode_captions(texts, tokenizer=self.text_tokenizer)]
        prompts = [sequences.image_prompt(token_ids, ids=ids) for token_ids in tokens]
        check_room(prompts, num_new=ids.image_tokens + 1, limit=self.model.config.max_position_embeddings)
        sampler = self.sampler
        text_logprobs, image_logprobs = [], []
        pairs = zip(ids.codes_to_ids(codes_BN), tokens, prompts, strict=True)
        for visual_ids, token_ids, prompt in track(pairs, total=len(texts), label="score"):
            caption_prompt = sequences.caption_prompt(visual_ids, ids=ids)
            text_logprobs.append(sampler.text_logprob(caption_prompt, token_ids=token_ids))
            image_logprobs.append(sampler.image_logprob(prompt, visual_ids=visual_ids))
        similarities = self.similarity(images, texts) if self.can_rank else None
        return PairScores(text_logprobs, image_logprobs, similarities)

    @property
    def can_rank(self) -> bool:
        """Whether the QLIP has the text tokenizer that `similarity` needs."""
        try:
            return self.processor.text_tokenizer is not None
        except UserError:
            return False

    def similarity(self, images: Images, texts: Sequence[str]) -> list[float]:
        """Cosine of each image and its text in QLIP's towers (see `can_rank`); long texts are cut to its positions."""
        check_pairs(images, texts)
        if not texts:
            return []
        images_BP = embed_images(images, model=self.qlip, processor=self.processor)
        cosines_B = (images_BP * embed_texts(texts, model=self.qlip, processor=self.processor)).sum(-1)
        check_finite(cosines_B, what="the visual tokenizer's embeddings")
        return cosines_B.tolist()

    def reconstruct(self, images: Images, *, batch_size: int = 64) -> Reconstruction:
        """Images -> codes -> images."""
        codes_BN = self.encode(images, batch_size=batch_size)
        return Reconstruction(
            originals=self.processor.images(self.processor.pixels(images)),
            images=self.decode(codes_BN, batch_size=batch_size),
            codes=codes_BN,
        )

    def encode(self, images: Images, *, batch_size: int = 64) -> Tensor:
        """Images -> codes int64 (B, N) on the CPU."""
        return encode_images(QLIPImages(self.qlip, self.processor), images, batch_size=batch_size)

    def decode(self, codes_BN: Tensor, *, batch_size: int = 64) -> np.ndarray:
        """Codes (B, N) -> images uint8 (B, H, W, 3)."""
        return decode_codes(QLIPImages(self.qlip, self.processor), codes_BN, batch_size=batch_size)

    def _redraw(
        self,
        images: Images,
        prompts: Sequence[str] | None,
        *,
        free_of: Callable[[int], Tensor],
        **options: Unpack[GenerateOptions],
    ) -> Generated:
        """Generate the patches anew that are true in `free_of` (the image's seed), bool (N,)."""
        codes_BN = self.encode(images, batch_size=options.get("batch_size", 64))
        if prompts is None:
            prompts = self.caption_codes(codes_BN, batch_size=options.get("batch_size", 64))
        else:
            prompts = check_texts(prompts, kind="prompt")
        check_pairs(codes_BN, prompts)

        def keep(index: int, seed: int) -> Tensor:
            free_P = free_of(seed).repeat_interleave(self.ids.subtokens)
            return self.ids.codes_to_ids(codes_BN[index]).masked_fill(free_P, FREE)

        return self.generate(prompts, keep=keep, **options)

    def _write(
        self,
        prompts: list[Tensor],
        *,
        kind: str,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Unpack[TextOptions],
    ) -> Texts:
        seeds = resolve_seeds(seeds, names=[(kind, index) for index in range(len(prompts))], seed=seed)
        sampling = Sampling(**options)
        check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        if sampling.guided:
            raise UserError("guidance_scale is an option for images; remove it for text")
        check_room(prompts, num_new=max_new_tokens, limit=self.model.config.max_position_embeddings)
        texts: list[str] = []
        logprobs: list[float] = []
        for batch in batches(len(prompts), batch_size=batch_size, label="write"):
            sampled = self.sampler.texts(
                prompts=[prompts[index] for index in batch],
                sampling=sampling,
                uniforms_BP=uniforms([seeds[index] for index in batch], count=max_new_tokens),
            )
            texts += [decode(token_ids, tokenizer=self.text_tokenizer) for token_ids in sampled.token_ids]
            logprobs += sampled.logprobs
        return Texts(texts, seeds=seeds, logprobs=logprobs)
