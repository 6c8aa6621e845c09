"""Conversations as Hugging Face's chat models take them: messages with a role and a content, or a plain question.

Of each message the role is user or assistant, in turn, and the content a text or a list of parts. The first content may
have an image: {"type": "image", "image": PIL image or path}, or its codes: {"type": "image", "codes": [...]}.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from um3.core.errors import UserError
from um3.core.text import valid_text
from um3.inference.image_io import open_image
from um3.model.sequences import chat_prompt
from um3.model.text_tokenizer import encode_turns
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

Messages = str | Sequence[Mapping[str, Any]]
ROLES = ("user", "assistant")
PARTS = '{"type": "image", "image": PIL image or path} or {"type": "text", "text": "..."}'


class Chat(NamedTuple):
    """(question, answer) of every turn, the last answer empty; the image before the first question, or its codes."""

    turns: list[tuple[str, str]]
    image: Image.Image | Sequence[int] | Tensor | None


def chat_prompts(messages: Messages | Sequence[Messages], *, pipeline: "UM3Pipeline", batch_size: int) -> list[Tensor]:
    """The prompt (T,) for the answer to each conversation of `read_chats`."""
    chats, ids = read_chats(messages), pipeline.ids
    images = [chat.image for chat in chats if isinstance(chat.image, Image.Image)]
    encoded_BN, prompts = iter(pipeline.encode(images, batch_size=batch_size)), []
    for index, (turns, image) in enumerate(chats):
        visual_ids = None
        if image is not None:
            is_pixels = isinstance(image, Image.Image)
            codes_N = next(encoded_BN) if is_pixels else check_codes(image, ids=ids, where=f"conversation {index + 1}")
            visual_ids = ids.codes_to_ids(codes_N)
        prompts.append(chat_prompt(encode_turns(turns, tokenizer=pipeline.text_tokenizer), visual_ids, ids=ids))
    return prompts


def read_chats(messages: Messages | Sequence[Messages]) -> list[Chat]:
    """One conversation, or a list of them.

    UserError for any other form, more than one image, an image after the first message, or no question at the end.
    """
    is_list = isinstance(messages, list | tuple)
    is_one = not is_list or any(isinstance(message, Mapping) for message in messages)
    chats: Sequence[Any] = [messages] if is_one else messages
    return [_read_chat(chat, where=f"conversation {index + 1}") for index, chat in enumerate(chats)]


def _read_chat(messages: Messages, *, where: str) -> Chat:
    if not isinstance(messages, str | list | tuple):
        raise UserError(f"{where} is of type {type(messages).__name__}; give a list of messages, or a question")
    listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    texts, images = list[str](), list[Any]()
    for index, message in enumerate(listed):
        place, expected = f"{where}, message {index + 1}", ROLES[index % 2]
        if not isinstance(message, Mapping) or {"role", "content"} - message.keys():
            raise UserError(f"{place} is {str(message)[:40]!r}; give a dictionary with role and content")
        if message["role"] != expected:
            rule = "user and assistant take turns, and the user begins"
            raise UserError(f"{place} has the role {str(message['role'])[:40]!r} instead of '{expected}'; {rule}")
        text, found = _read_content(message["content"], where=place)
        if expected == "user" and not text.strip():
            raise UserError(f"{place} has no text; ask a question")
        if found and index > 0:
            raise UserError(f"{place} has an image; give the image in the first message")
        texts.append(text)
        images += found
    if len(texts) % 2 == 0:
        raise UserError(f"{where} ends without a question; the last message must be the user's")
    if len(images) > 1:
        raise UserError(f"{where} has {len(images)} images; give one image at most")
    turns = list(zip(texts[::2], [*texts[1::2], ""], strict=True))
    image = images[0] if images else None
    return Chat(turns, open_image(image, where=where) if isinstance(image, Image.Image | str | Path) else image)


def _read_content(content: Any, *, where: str) -> tuple[str, list[Any]]:
    """The texts of a content, joined by spaces, and its images."""
    texts, images = list[str](), list[Any]()
    for part in content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(valid_text(text))
            case {"type": "image", "image": Image.Image() | str() | Path() as image}:
                images.append(image)
            case {"type": "image", "codes": list() | Tensor() as codes}:
                images.append(codes)
            case _:
                raise UserError(f"{where}: the content {str(part)[:60]!r} is neither a text nor {PARTS}")
    return " ".join(texts), images


def check_codes(codes: Any, *, ids: UnifiedVocabulary, where: str) -> Tensor:
    """The codes (N,) of an image after a check."""
    codes = codes.tolist() if isinstance(codes, Tensor) else codes
    is_code = [type(code) is int and 0 <= code < 1 << ids.num_bits for code in codes]
    if len(is_code) != ids.num_patches or not all(is_code):
        raise UserError(f"{where}: an image is {ids.num_patches} codes from 0 to 2**{ids.num_bits} - 1, as integers")
    return torch.tensor(codes)
