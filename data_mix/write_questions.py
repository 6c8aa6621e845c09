"""`make questions`: questions about scenes and digits as files in the formats of LLaVA and VQAv2.

train.json         LLaVA's conversations, three to six turns an image
questions.jsonl    LLaVA's question file of the validation images; `category` is the kind of a question
annotations.json   their answers in the format of VQAv2; `question_type` is the kind
images/            KEY.png; the paths in the other files begin in it
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_mix.conversations import IMAGE, Conversation, Questions
from data_mix.demo.questions import Question
from data_mix.demo.scenes import REFERENCE_SIZE
from data_mix.samples import Split
from data_mix.sources.config import ConversationSourceConfig
from um3.core.commands import command_parser, read_config
from um3.core.errors import UserError
from um3.core.files import folder_lock, write_json, write_text
from um3.core.progress import track
from um3.core.ranges import PositiveInt

NUM_ANSWERS = 10  # of a question of VQAv2, by as many people


def _sources() -> list[ConversationSourceConfig]:
    return [
        ConversationSourceConfig("scenes", kind="scenes", length=2000, val_fraction=0.1),
        ConversationSourceConfig("digits", kind="digits"),
    ]


@dataclass
class QuestionsConfig:
    """What to write, and where to.

    sources: of scenes and digits. length is the number of training scenes, val_fraction times length that of validation
    scenes. image_size: in pixels. seed: of the scenes.
    """

    output_dir: str = "questions"
    sources: list[ConversationSourceConfig] = field(default_factory=_sources)
    image_size: PositiveInt = REFERENCE_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.kind == "llava":
                raise ValueError(f"source '{source.name}': kind=llava is a file of questions; use scenes or digits")


def main(arguments: Sequence[str]) -> None:
    """Write the files of a config; they replace earlier ones."""
    parser = command_parser("python -m data_mix questions", "Write questions about scenes and digits as files.")
    config, _ = read_config(QuestionsConfig, parser, arguments=arguments)
    if not config.sources:
        raise UserError("'sources' is empty; list at least one source of kind scenes or digits")
    with folder_lock(config.output_dir, wait=True):  # the seeds of an ablation may start at once
        write_questions(config)


def write_questions(config: QuestionsConfig) -> None:
    """Write images, conversations, questions and answers; print how many of each kind there are."""
    out = Path(config.output_dir)
    (out / "images").mkdir(exist_ok=True)
    conversations = [llava_entry(conversation) for conversation, _ in _each(config, split="train")]
    asked, answered = list[dict[str, Any]](), list[dict[str, Any]]()
    for image_id, (conversation, questions) in enumerate(_each(config, split="val")):
        for question in questions:
            number = {"question_id": len(asked)}
            image = _file_name(conversation)
            asked.append(number | {"image": image, "text": question.text, "category": question.kind})
            answered.append(number | {"image_id": image_id} | vqa_annotation(question))
    write_json(out / "train.json", conversations)
    write_text(out / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in asked))
    write_json(out / "annotations.json", {"annotations": answered})
    counts = Counter(row["category"] for row in asked)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
    print(f"{out}: {len(conversations):,} conversations; {len(asked):,} validation questions ({kinds})")


def _each(config: QuestionsConfig, *, split: Split) -> Iterator[tuple[Conversation, list[Question]]]:
    """The conversations of a split with their questions, after each has its image in the folder."""
    for settings in config.sources:
        source = Questions(settings, split=split, image_size=config.image_size, seed=config.seed)
        for index in track(range(len(source)), total=len(source), label=f"{split} {settings.name}", unit="images"):
            conversation = source[index]
            path, png = Path(config.output_dir, "images", _file_name(conversation)), io.BytesIO()
            Image.fromarray(source.read_image(conversation)).save(png, format="PNG")
            if not path.exists() or path.read_bytes() != png.getvalue():  # another process may be reading it
                path.write_bytes(png.getvalue())
            yield conversation, source.questions(index)[1]


def _file_name(conversation: Conversation) -> str:
    return f"{conversation.image}.png"


def llava_entry(conversation: Conversation) -> dict[str, Any]:
    """A conversation about an image as LLaVA's JSON has it."""
    messages = []
    for number, (question, answer) in enumerate(conversation.turns):
        text = question if number else f"{IMAGE}\n{question}"
        messages += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": conversation.key, "image": _file_name(conversation), "conversations": messages}


def vqa_annotation(question: Question) -> dict[str, Any]:
    """The answer to a question as VQAv2 has it, of ten people who agree."""
    answer = question.answer
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": person} for person in range(1, NUM_ANSWERS + 1)
    ]
    answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return {
        "question_type": question.kind,
        "answer_type": answer_type,
        "multiple_choice_answer": answer,
        "answers": answers,
    }
