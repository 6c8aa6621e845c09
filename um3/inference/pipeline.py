"""The pipeline: prompts -> images, images -> captions, text -> text, chat, mixtures, images -> codes -> images.

Shapes: B samples, N patches, P visual ids of an image, H height, W width, C channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenizer.images import QLIPImages
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import inference_device
from um3.core.errors import UserError
from um3.core.hub import model_folder
from um3.core.progress import batches, track
from um3.core.seeds import torch_generator
from um3.core.text import valid_text
from um3.inference.chat import Messages, chat_prompts
from um3.inference.decoder import check_room
from um3.inference.generate import SampledImages, Sampler, uniforms
from um3.inference.image_io import Images
from um3.inference.image_pipeline import GenerateOptions, ImagePipeline, SampleImages, load_visual_tokenizer
from um3.inference.interleave import Answer, Conversation, Message
from um3.inference.outputs import Generated, PairScores, Part, Texts
from um3.inference.requests import check_counts, check_pairs, check_texts, resolve_seeds
from um3.inference.sampling_params import ImageOptions, Sampling, TextOptions
from um3.model import sequences
from um3.model.language_model import load_model, save_model, stored_texts
from um3.model.text_tokenizer import decode, encode_captions, encode_texts
from um3.model.visual_parts import DepthHead
from um3.model.vocabulary import UnifiedVocabulary


class WriteOptions(TextOptions, total=False):
    """The options of `UM3Pipeline.caption`, `complete` and `chat`; without `seeds` they come from `seed`."""

    max_new_tokens: int
    batch_size: int
    seed: int
    seeds: Sequence[int] | None


class UM3Pipeline(ImagePipeline):
    """A trained UM3 with its text tokenizer and its visual tokenizer; the same calls on a CPU and on a GPU.

    Seeds, images and errors are as in `ImagePipeline`.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        ids: UnifiedVocabulary,
        qlip: QLIPModel,
        processor: QLIPProcessor,
        depth: DepthHead | None = None,
        name: str = "",
        card: str = "",
    ):
        if (qlip.num_bits, qlip.num_patches) != (ids.num_bits, ids.num_patches):
            raise UserError(
                f"the visual tokenizer makes {qlip.num_patches} codes of {qlip.num_bits} bits, the model reads "
                f"{ids.num_patches} of {ids.num_bits}; use the tokenizer it was trained with"
            )
        super().__init__(visual_tokenizer=QLIPImages(qlip, processor), name=name)
        self.model, self.text_tokenizer, self.ids, self.depth, self.card = model, text_tokenizer, ids, depth, card
        self._sampler: Sampler | None = None

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder that `um3.model.language_model.save_model` wrote, or a hub id; UserError if it is incomplete.

        Without a `device`, `um3.core.distributed.inference_device` chooses it. `dtype` is that of the language model.
        The visual tokenizer must be the one of its training and keeps its dtype.
        """
        folder, device = model_folder(path_or_hub_id, kind="UM3 model"), device or inference_device()
        loaded = load_model(folder, device=device, dtype=dtype)
        qlip, processor = load_visual_tokenizer(folder, fingerprint=loaded.fingerprint)
        return cls(
            model=loaded.model,
            text_tokenizer=loaded.text_tokenizer,
            ids=loaded.ids,
            qlip=qlip.to(device),  # type: ignore[arg-type]
            processor=processor,
            depth=loaded.depth,
            name=valid_text(str(path_or_hub_id)),
            card=card.read_text(encoding="utf-8", errors="replace") if (card := folder / "README.md").is_file() else "",
        )

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the visual tokenizer, to which all codes belong."""
        return str(self.model.config.um3["tokenizer_fingerprint"])

    @property
    def trained_on(self) -> list[str]:
        """The names of the conversations that the model was trained on; empty if it never learnt to answer."""
        return stored_texts(self.model.config.um3, key="conversations")

    @property
    def examples(self) -> list[str]:
        """Some captions that the model was trained on, as prompts to try; empty if its folder names none."""
        return stored_texts(self.model.config.um3, key="examples")

    @property
    def sampler(self) -> Sampler:
        """The sampler over the model's weights: built on first use, and again after the weights changed or moved.

        It does not notice edits through `parameter.data`; set `pipeline.model` anew or use in-place operations.
        """
        if self._sampler is None or not self._sampler.decoder.is_current(self.model):
            self._sampler = None  # free the old weights first
            self._sampler = Sampler(self.model, ids=self.ids, depth=self.depth)
        return self._sampler

    @property
    def networks(self) -> list[nn.Module]:
        return [self.model] if self.depth is None else [self.model, self.depth]

    def save_pretrained(self, folder: str | Path) -> None:
        save_model(
            folder,
            model=self.model,
            text_tokenizer=self.text_tokenizer,
            ids=self.ids,
            visual_tokenizer=self._towers,
            depth=None if self.depth is None else self.depth.state_dict(),
            card=self.card,
        )

    @property
    def image_tokens(self) -> int:
        return self.ids.image_tokens

    @property
    def image_choices(self) -> int:
        return self.ids.image_subtokens

    def ids_of(self, codes_BN: Tensor) -> Tensor:
        return self.ids.codes_to_ids(codes_BN)

    def codes_of(self, ids_BP: Tensor) -> Tensor:
        return self.ids.ids_to_codes(ids_BP)

    def sampler_for(self, prompts: Sequence[str]) -> SampleImages:
        tokens = encode_captions(prompts, tokenizer=self.text_tokenizer)
        starts = [sequences.image_prompt(token_ids, ids=self.ids) for token_ids in tokens]
        check_room(starts, num_new=self.image_tokens, limit=self.model.config.max_position_embeddings)
        unconditional_prompt = sequences.image_prompt([], ids=self.ids)

        def sample(indices: Sequence[int], **options: Any) -> SampledImages:
            prompts_of = [starts[index] for index in indices]
            return self.sampler.images(prompts=prompts_of, unconditional_prompt=unconditional_prompt, **options)

        return sample

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
        batch_size = options.get("batch_size", 64)
        codes_BN = self.encode(images, batch_size=batch_size)
        if prompts is None:
            prompts = self.caption_codes(codes_BN, batch_size=batch_size)
        return self.vary_codes(codes_BN, prompts, strength=strength, **options)

    def vary_codes(
        self, codes_BN: Tensor, prompts: Sequence[str], *, strength: float = 0.5, **options: Unpack[GenerateOptions]
    ) -> Generated:
        """`vary` for images as their codes (B, N)."""
        if not 0 < strength <= 1:
            message = f"strength {strength} is outside (0, 1]; 1 generates every patch anew"
            raise UserError(message, parameter="strength")

        def free_of(seed: int) -> Tensor:
            return torch.rand(self.ids.num_patches, generator=torch_generator(seed, "patches")) < strength

        return self._redraw(codes_BN, prompts, free_of=free_of, **options).with_settings(strength=strength)

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
        """The model's log-probability of each text given its image and vice versa, and their `similarity`.

        A generated PIL image, also one that was read from its PNG, counts with the codes it was generated from.
        """
        texts, ids = check_texts(texts, kind="text"), self.ids
        codes_BN = self.known_codes(images, batch_size=batch_size)
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

    def prompt_log_ratio(self, prompt: str, *, codes_N: Tensor) -> float:
        """How much likelier the prompt is as the caption of its image than as the beginning of a text, nats per token.

        `codes_N` (N,) are the codes of an image that was generated for the prompt. Captions of the kind in the training
        data lie far above 0; below 0, the prompt is outside what the model was trained on (docs/sampling.md, "Prompts
        outside the training data", has figures).
        """
        token_ids = torch.tensor(encode_captions([prompt], tokenizer=self.text_tokenizer)[0])
        caption_prompt = sequences.caption_prompt(self.ids.codes_to_ids(codes_N), ids=self.ids)
        as_caption = self.sampler.text_logprob(caption_prompt, token_ids=token_ids)
        text_prompt = sequences.text_prompt([], ids=self.ids)
        as_text = self.sampler.text_logprob(text_prompt, token_ids=token_ids, ends=False)
        return (as_caption - as_text) / max(len(token_ids), 1)

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
            uniforms_BP = uniforms(seeds[batch], count=max_new_tokens)
            sampled = self.sampler.texts(prompts=prompts[batch], sampling=sampling, uniforms_BP=uniforms_BP)
            texts += [decode(token_ids, tokenizer=self.text_tokenizer) for token_ids in sampled.token_ids]
            logprobs += sampled.logprobs
        return Texts(texts, seeds=seeds, logprobs=logprobs)
