"""Conversations as token ids, with a mask of the supervised ones: LLaVA-1.5's `v1` and `plain`, and a short template.

    v1      SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>USER: question ASSISTANT: answer</s>
    qa      Q: <image>\\nquestion A: answer</s>Q: question A: answer</s>
    plain   <image>caption\\n

`qa` is for small vocabularies, which spell the words of `v1` letter by letter.

A string is tokenised in one call. Of a conversation the tokens that end after the model's mark ("ASSISTANT:", "A:") and
not after "</s>" are supervised, of `plain` the caption and its newline. "</s>" stands for the tokenizer's end of text.

What a person typed never becomes a special token: "<image>" is removed, and a space breaks up any other ("< /s>").

Legend: T tokens.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from um3.core.errors import UserError
from um3.core.text import valid_text
from um3.model.text_tokenizer import ANSWER, QUESTION

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TemplateKind = Literal["v1", "qa", "plain"]
MARKS = {"v1": (f"{SYSTEM} ", "USER:", "ASSISTANT:"), "qa": ("", QUESTION, ANSWER)}
"""What a conversation begins with, and the marks before a question and an answer."""

CHAT_TEMPLATE = """\
{%- macro said(content) -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- for part in parts if part['type'] == 'image' -%}{{ 'IMAGE\\n' }}{%- endfor -%}
{%- if content is string and 'IMAGE' in content -%}{{ 'IMAGE\\n' }}{%- endif -%}
{%- set texts = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}
{{ texts | replace('IMAGE', '') | trim }}
{%- endmacro -%}
{%- set ns = namespace(system='SYSTEM') -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = said(message['content']) + ' ' -%}
{%- endfor -%}
{{ ns.system }}
{%- for message in messages if message['role'] != 'system' -%}
{%- if message['role'] == 'user' -%}{{ 'USER ' + said(message['content']) + ' ' }}
{%- else -%}MODEL{% generation %}{{ ' ' + said(message['content']) + 'EOS' }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}MODEL{%- endif -%}
"""


class LlavaSequence(NamedTuple):
    """input_ids_T (int64) with `IMAGE` once a patch, and target_mask_T (bool): the supervised ones."""

    input_ids_T: Tensor
    target_mask_T: Tensor


def chat_template(tokenizer: PreTrainedTokenizerBase, *, kind: TemplateKind = "v1") -> str:
    """The template for `apply_chat_template`, without the begin-of-text token, which the processor adds.

    `plain` has no questions, so its chats are those of `v1`.
    """
    begin, user, model = MARKS["v1" if kind == "plain" else kind]
    values = {"SYSTEM": begin.replace("'", "\\'"), "USER": user, "MODEL": model}
    values |= {"IMAGE": IMAGE, "EOS": str(tokenizer.eos_token)}
    return re.sub("SYSTEM|USER|MODEL|IMAGE|EOS", lambda match: values[match[0]], CHAT_TEMPLATE)


class Template:
    """Turns (question, answer) -> `LlavaSequence` of at most `max_tokens`, cut on the right."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, kind: TemplateKind, num_image_tokens: int, max_tokens: int
    ) -> None:
        """UserError if no answer can begin within `max_tokens` behind an image."""
        self.tokenizer, self.kind = tokenizer, kind
        self.num_image_tokens, self.max_tokens = num_image_tokens, max_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        added = tokenizer.added_tokens_decoder.values()
        specials = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {IMAGE}
        names = sorted((name for name in specials if len(name) > 1), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names)) or "(?!)")
        if (least := len(self([("", "")], has_image=True).input_ids_T)) >= max_tokens:
            problem = f"a window of {max_tokens} tokens has no room for an answer behind the {num_image_tokens} tokens"
            raise UserError(f"{problem} of an image (at least {least} with the template); raise data.max_tokens")

    def __call__(self, turns: Sequence[tuple[str, str]], *, has_image: bool) -> LlavaSequence:
        """The ids and mask of a conversation; its image, if any, belongs to the first question."""
        text, spans = self.text(turns, has_image=has_image)
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids: list[int] = []
        targets: list[bool] = []
        for token_id, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            count = self.num_image_tokens if token_id == self.image_id else 1
            ids += [token_id] * count
            targets += [any(first < end <= last for first, last in spans)] * count
        return LlavaSequence(torch.tensor(ids[: self.max_tokens]), torch.tensor(targets[: self.max_tokens]))

    def text(self, turns: Sequence[tuple[str, str]], *, has_image: bool) -> tuple[str, list[tuple[int, int]]]:
        """The string of a conversation, and its supervised parts: the characters from first to last of each pair."""
        cleaned = [(self.typed(question), self.typed(answer)) for question, answer in turns]
        image = IMAGE if has_image else ""
        if self.kind == "plain":
            caption = cleaned[0][1] + "\n"
            return image + caption, [(len(image), len(image) + len(caption))]
        (text, user, model), spans = MARKS[self.kind], []
        for number, (question, answer) in enumerate(cleaned):
            mark = f"{image}\n" if image and number == 0 else ""
            text += f"{user} {mark}{question} {model}"
            first = len(text)
            text += f" {answer}{self.tokenizer.eos_token}"
            spans.append((first, len(text)))
        return text, spans

    def typed(self, text: str) -> str:
        """Stripped text that holds no special token."""
        text = valid_text(text)
        while IMAGE in text:
            text = text.replace(IMAGE, "")
        return self._specials.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text).strip()
