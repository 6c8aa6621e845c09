"""Yes-or-no questions about images, answered by a vision-language model of transformers."""

from typing import TYPE_CHECKING, Any

from um3.core.distributed import device
from um3.core.hub import load_pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

SUFFIX = "Answer yes or no."
MAX_NEW_TOKENS = 8
SETTINGS = f"'{SUFFIX}' after the question to a chat model, greedy, yes = begins with yes"


class YesNoModel:
    """A model that answers questions about images.

    It is a model for visual question answering (BLIP), which gets the question alone, or a chat model (LLaVA, Qwen-VL),
    which is also asked to answer yes or no.
    """

    def __init__(self, path: str) -> None:
        """Load the model from a folder or the hub, without remote code."""
        import transformers

        # By hand: transformers 5 has no pipeline for models of visual question answering.
        options: Any = {"kind": "VQA model", "remedy": "set vqa= to a folder or hub id of one"}
        names = load_pretrained(transformers.AutoConfig, path, **options).architectures or []
        self.answers_only = any(name.endswith("ForQuestionAnswering") for name in names)
        kind = "VisualQuestionAnswering" if self.answers_only else "ImageTextToText"
        loader: Any = getattr(transformers, f"AutoModelFor{kind}")
        self.model: Any = load_pretrained(loader, path, **options).eval().to(device())
        self.processor: Any = load_pretrained(transformers.AutoProcessor, path, **options)
        self.processor.tokenizer.padding_side = "left"  # so that answers follow the questions directly
        self.chats = bool(getattr(self.processor, "chat_template", None)) and not self.answers_only

    def ask(self, image: "Image.Image", questions: "Sequence[str]") -> list[bool]:
        """Whether the answer to each question begins with yes."""
        if not self.answers_only:
            return self._ask(image, [self._prompt(question) for question in questions])
        # One at a time: BLIP's decoder attends to the padding of the shorter questions of a batch.
        return [is_yes for question in questions for is_yes in self._ask(image, [question])]

    def _ask(self, image: "Image.Image", texts: list[str]) -> list[bool]:
        # A chat template contains its own bos.
        options = {"padding": True, "add_special_tokens": not self.chats, "return_tensors": "pt"}
        inputs = self.processor(images=[image] * len(texts), text=texts, **options).to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        if not self.answers_only and not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the output repeats the question
        return [starts_with_yes(answer) for answer in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _prompt(self, question: str) -> str:
        text = f"{question} {SUFFIX}"
        if self.chats:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            chat = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))
        return f"{getattr(self.processor, 'image_token', '')} {text}".strip()


def starts_with_yes(answer: str) -> bool:
    """Whether the first word is yes, as in `Yes, it is.`."""
    words = "".join(letter if letter.isalpha() else " " for letter in answer.lower()).split()
    return words[:1] == ["yes"]
