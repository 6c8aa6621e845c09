"""`um3 chat`: questions about an image, from the command line or in a terminal."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from um3.cli import options
from um3.cli.inputs import find_images, printable_lines, read_images, read_texts, show
from um3.core.errors import UserError
from um3.core.progress import quiet_progress
from um3.core.seeds import sample_seed
from um3.core.text import printable, valid_text

FORGET = "/new"


@options.command(
    "Ask questions about an image.",
    'um3 chat photo.png "How many circles are there?" "What colour are they?" --model runs/demo/um3-instruct/model',
    "um3 chat photo.png --file questions.txt --json",
    "um3 chat photo.png                           (asks in the terminal)",
    'um3 chat "" "What is the capital of France?"  (without an image)',
)
def chat(
    image: Annotated[str, typer.Argument(help='An image file; - is stdin, "" is no image.')],
    questions: Annotated[list[str] | None, typer.Argument(help="Questions; - reads stdin.")] = None,
    file: options.TextFile = None,
    as_json: options.AsJson = False,
    *,
    sampling: options.TextOptions,
    um3: options.ModelOptions,
) -> None:
    """Answer QUESTIONS about IMAGE; each question follows those before it and their answers.

    Without questions, a terminal asks for them until Ctrl-D. By default greedy, with at most 64 tokens an answer.
    """
    in_terminal = not questions and file is None and sys.stdin is not None and sys.stdin.isatty()
    asked: Iterable[str] = _typed() if in_terminal else read_texts(questions, file=file, kind="question")
    paths = find_images([image]) if image else []
    if len(paths) > 1:
        raise UserError(f"{image} holds {len(paths)} images; a conversation has one")
    pipeline = um3.load()
    if not pipeline.trained_on:
        typer.echo(f"{printable(um3.model)} was not trained on conversations (make um3-instruct does)", err=True)
    squares = read_images(paths, size=pipeline.processor.image_size)
    start: list[dict[str, Any]] = [{"type": "image", "image": square} for square in squares]
    settings = sampling.given()
    seed, messages = settings.pop("seed"), list[dict[str, Any]]()
    for question in asked:
        if in_terminal and question.strip() == FORGET:
            messages.clear()
            continue
        content = [*([] if messages else start), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        try:
            with quiet_progress():
                answers = pipeline.chat(messages, seeds=[sample_seed(seed, "chat", len(messages) // 2)], **settings)
        except UserError as error:
            if not in_terminal:
                raise
            typer.echo(f"{printable(error)}; {FORGET} starts a new conversation", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answers[0]})
        columns: dict[str, list[Any]] = {"file": [image], "question": [question], "answer": answers}
        columns |= {"seed": answers.seeds, "logprob": answers.logprobs}
        show(columns, "{answer}", as_json=as_json, escape=printable_lines)


def _typed() -> Iterator[str]:
    """The lines that are typed in the terminal, up to Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and recalls earlier ones
    typer.echo(f"Ask questions. {FORGET} starts a new conversation, Ctrl-D ends.", err=True)
    with contextlib.suppress(EOFError):
        while True:
            if (line := valid_text(input("> "))).strip():
                yield line
    typer.echo(err=True)
