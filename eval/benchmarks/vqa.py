"""Yes-or-no questions about images, answered by any vision-language model of transformers."""

from typing import TYPE_CHECKING, Any

from um3.core.distributed import device
from um3.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

SUFFIX = "Answer yes or no."
MAX_NEW_TOKENS = 8
SETTINGS = f"'{SUFFIX}' behind the question of a chat model, greedy, yes = begins with yes"


class YesNo:
    """A model that answers questions about images: one for visual question answering (BLIP, which is asked the bare
    question), or one that chats about images (LLaVA, Qwen-VL, ..., asked to answer yes or no)."""

    def __init__(self, path: str) -> None:
        """Load it from a folder or the hub, without remote code.

        Raises:
            UserError: no such model, or one that reads no images.
        """
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            AutoModelForVisualQuestionAnswering,
            AutoProcessor,
        )

        try:
            names = AutoConfig.from_pretrained(path).architectures or []
            self.answers_only = any(name.endswith("ForQuestionAnswering") for name in names)
            loader: Any = AutoModelForVisualQuestionAnswering if self.answers_only else AutoModelForImageTextToText
            self.model: Any = loader.from_pretrained(path).eval().to(device())
            self.processor: Any = AutoProcessor.from_pretrained(path)
            self.processor.tokenizer.padding_side = "left"  # answers begin where the questions end
            self.chats = bool(getattr(self.processor, "chat_template", None)) and not self.answers_only
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"no model that answers questions about images at '{path}' ({reason})") from None

    def ask(self, image: "Image.Image", questions: "Sequence[str]") -> list[bool]:
        """For each question, whether the answer begins with yes."""
        if not self.answers_only:
            return self._ask(image, [self._prompt(question) for question in questions])
        # One by one: BLIP's decoder looks at the padding of the shorter questions of a batch.
        return [yes for question in questions for yes in self._ask(image, [question])]

    def _ask(self, image: "Image.Image", texts: list[str]) -> list[bool]:
        # A chat template writes its own bos.
        options = {"padding": True, "add_special_tokens": not self.chats, "return_tensors": "pt"}
        inputs = self.processor(images=[image] * len(texts), text=texts, **options).to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        if not self.answers_only and not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # they repeat the question
        return [is_yes(answer) for answer in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _prompt(self, question: str) -> str:
        asked = f"{question} {SUFFIX}"
        if self.chats:
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            chat = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))
        return f"{getattr(self.processor, 'image_token', '')} {asked}".strip()


def is_yes(answer: str) -> bool:
    """`Yes, it is.` -> True; anything that does not begin with the word yes -> False."""
    words = "".join(letter if letter.isalpha() else " " for letter in answer.lower()).split()
    return words[:1] == ["yes"]
