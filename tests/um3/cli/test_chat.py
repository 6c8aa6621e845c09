"""`um3 chat` on a tiny saved model: questions from arguments, files and a terminal, and one-line errors."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.processes import ROOT
from tests.tokenizer.conftest import change_json
from tests.um3.cli.test_cli import rows_of, run
from um3 import cli
from um3.cli.inputs import printable_lines
from um3.inference.pipeline import UM3Pipeline

QUESTIONS = ["a red disk?", "Why?"]


@pytest.fixture
def roomy_folder(folder):
    """The tiny model with room for several turns, as `make um3-instruct` marks it."""
    change_json(folder / "config.json", max_position_embeddings=512, um3={"conversations": ["scenes"]})
    return folder


def expected(folder, image, **options):
    """The two answers of the pipeline, the second with the first in its history."""
    pipeline, messages, answers = UM3Pipeline.from_pretrained(folder), [], []
    content = [{"type": "image", "image": Image.open(image)}] if image else []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        answers += pipeline.chat(messages, max_new_tokens=6, **options)
        messages.append({"role": "assistant", "content": answers[-1]})
        content = []
    return [printable_lines(answer) for answer in answers]


def test_each_question_follows_those_before(roomy_folder, photo, tmp_path):
    options = ["--model", roomy_folder, "--max-new-tokens", "6"]
    answers = expected(roomy_folder, photo)
    assert len(set(answers)) == 2
    assert run("chat", photo, *QUESTIONS, *options).splitlines() == answers
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(QUESTIONS))
    rows = rows_of(run("chat", photo, "--file", file, "--json", *options))
    assert [row["question"] for row in rows] == QUESTIONS
    assert [printable_lines(row["answer"]) for row in rows] == answers
    assert {row["file"] for row in rows} == {str(photo)} and max(row["logprob"] for row in rows) < 0
    assert run("chat", "-", *QUESTIONS, *options, stdin=photo.read_bytes()).splitlines() == answers
    assert json.loads(run("info", roomy_folder, "--json"))["conversations"] == "scenes"
    without = expected(roomy_folder, None)
    assert run("chat", "", *options, stdin="\n".join(QUESTIONS)).splitlines() == without != answers


def test_seeds_and_sampling_are_those_of_the_pipeline(roomy_folder, photo):
    options = ["--model", roomy_folder, "--max-new-tokens", "6", "--temperature", "2", "--top-k", "50"]
    first, second = (run("chat", photo, QUESTIONS[0], *options, "--seed", seed) for seed in (1, 2))
    assert first != second
    assert first.strip() == expected(roomy_folder, photo, temperature=2.0, top_k=50, seed=1)[0]


def test_a_terminal_asks_until_its_end(roomy_folder, photo):
    answers = expected(roomy_folder, photo)
    terminal, other_end = pty.openpty()
    lines = [QUESTIONS[0], "", "long " * 800, QUESTIONS[1], "/new", *QUESTIONS]
    script = "from um3.cli import entry_point; entry_point()"
    command = [sys.executable, "-c", script, "chat", str(photo), "--model", str(roomy_folder), "--max-new-tokens", "6"]
    with subprocess.Popen(
        command, stdin=other_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        os.close(other_end)
        for line in lines:
            for start in range(0, len(line), 1000):  # a terminal holds 4,096 characters of a line
                os.write(terminal, line[start : start + 1000].encode())
            os.write(terminal, b"\n")
        os.write(terminal, b"\x04")
        output, errors = process.communicate(timeout=120)
        os.close(terminal)
    assert process.returncode == 0, errors
    assert [line for line in re.sub(r"(?m)^(> )+", "", output).split("\n") if line] == answers * 2
    assert "Ctrl-D ends" in errors and "was not trained" not in errors
    (problem,) = [line for line in errors.splitlines() if "leaves no room" in line]
    assert problem.endswith("/new starts a new conversation")


def test_a_model_that_never_saw_conversations_says_so(folder):
    result = CliRunner().invoke(cli.app, ["chat", "", "a", "--model", str(folder), "--max-new-tokens", "2"])
    assert result.exit_code == 0 and "was not trained on conversations (make um3-instruct does)" in result.stderr
