"""Models that answer questions about images: a UM3, or any vision-language model of transformers.

lm-eval's `hf-multimodal` loads the same folders by the same two Auto classes. It is not used to generate: it answers
tasks, not prompts, cannot leave out bos where a template has it, does not resume, and has no UM3.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tokenizer  # noqa: F401 (registers QLIP's tower for LLaVA folders)
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.hub import load_pretrained

if TYPE_CHECKING:
    from PIL import Image

SUFFIX = "Answer yes or no."
MAX_NEW_TOKENS = 8
SETTINGS = f"'{SUFFIX}' after the question to a chat model, its template with bos, greedy, yes = begins with yes"


def open_model(path: str) -> "UM3Model | VisionLanguageModel":
    """Load a UM3 or a vision-language model from a folder or the hub."""
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, path, kind="vision-language model", remedy="set model= to a folder of one")
    return UM3Model(path) if getattr(config, "um3", None) else VisionLanguageModel(path)


class UM3Model:
    """A UM3 that was trained on conversations."""

    def __init__(self, path: str) -> None:
        from um3.inference.pipeline import UM3Pipeline

        self.pipeline: Any = UM3Pipeline.from_pretrained(path, device=device())

    def answer(
        self, images: "Sequence[Image.Image | None]", prompts: Sequence[str], *, max_new_tokens: int
    ) -> list[str]:
        """The greedy answer to each prompt about its image, stripped."""
        chats = [_messages(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        texts = self.pipeline.chat(chats, max_new_tokens=max_new_tokens, batch_size=len(chats))
        return [text.strip() for text in texts]


class VisionLanguageModel:
    """A chat model (LLaVA, Qwen-VL), one without a chat template, or one for visual question answering (BLIP)."""

    def __init__(self, path: str, *, setting: str = "model") -> None:
        """Load the model from a folder or the hub, without remote code; `setting` names it in errors."""
        import transformers

        # By hand: transformers 5 has no pipeline for models of visual question answering.
        options: Any = {"kind": "VQA model", "remedy": f"set {setting}= to a folder or hub id of one"}
        names = load_pretrained(transformers.AutoConfig, path, **options).architectures or []
        self.answers_only = any(name.endswith("ForQuestionAnswering") for name in names)
        kind = "VisualQuestionAnswering" if self.answers_only else "ImageTextToText"
        loader: Any = getattr(transformers, f"AutoModelFor{kind}")
        self.model: Any = load_pretrained(loader, path, **options).eval().to(device())
        self.processor: Any = load_pretrained(transformers.AutoProcessor, path, **options)
        self.processor.tokenizer.padding_side = "left"  # so that answers follow the questions directly
        self.chats = bool(getattr(self.processor, "chat_template", None)) and not self.answers_only
        self.image_token = str(getattr(self.processor, "image_token", ""))

    def answer(
        self, images: "Sequence[Image.Image | None]", prompts: Sequence[str], *, max_new_tokens: int
    ) -> list[str]:
        """The greedy answer to each prompt about its image, stripped. Questions without an image form their own batch.

        UserError for a question without an image to a model that only answers about images.
        """
        places = [[i for i, image in enumerate(images) if (image is None) == is_text] for is_text in (False, True)]
        if self.answers_only:  # one at a time: BLIP's decoder attends to the padding of shorter questions of a batch
            if places[1]:
                raise UserError("the model answers questions about images only; use a chat model for this set")
            places = [[place] for place in places[0]]
        texts = [""] * len(prompts)
        for batch in filter(None, places):
            inputs = self.inputs([images[i] for i in batch], [prompts[i] for i in batch])
            tokens = self.model.generate(
                **inputs.to(self.model.device), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
            )
            if not self.answers_only and not self.model.config.is_encoder_decoder:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the output repeats the question
            decoded = self.processor.batch_decode(tokens, skip_special_tokens=True)
            for place, text in zip(batch, decoded, strict=True):
                texts[place] = text.strip()
        return texts

    def inputs(self, images: "Sequence[Image.Image | None]", prompts: Sequence[str]) -> Any:
        """The model's input for a batch, padded on the left, with bos once if the tokenizer adds one.

        The processor adds bos where the chat template does not. An image token in a prompt is removed: the model would
        look for an image there.
        """
        prompts = [prompt.replace(self.image_token, "") if self.image_token else prompt for prompt in prompts]
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.chats:
            chats = [_messages(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
            settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return self.processor.apply_chat_template(chats, **settings, processor_kwargs=options)
        if images[0] is None:
            return self.processor(text=list(prompts), **options)
        mark = "" if self.answers_only else f"{self.image_token} "
        return self.processor(images=list(images), text=[f"{mark}{prompt}".strip() for prompt in prompts], **options)

    def ask(self, image: "Image.Image", questions: Sequence[str]) -> list[bool]:
        """Whether the answer to each question begins with yes; a chat model is also asked to answer yes or no."""
        prompts = [question if self.answers_only else f"{question} {SUFFIX}" for question in questions]
        answers = self.answer([image] * len(prompts), prompts, max_new_tokens=MAX_NEW_TOKENS)
        return [starts_with_yes(answer) for answer in answers]


def starts_with_yes(answer: str) -> bool:
    """Whether the first word is yes, as in `Yes, it is.`."""
    words = "".join(letter if letter.isalpha() else " " for letter in answer.lower()).split()
    return words[:1] == ["yes"]


def _messages(image: "Image.Image | None", prompt: str) -> list[dict[str, Any]]:
    """A conversation of one question, in Hugging Face's form."""
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
