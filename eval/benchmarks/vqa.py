"""`python -m eval vqa set=NAME data=FOLDER model=FOLDER output=FILE.json`: questions about images.

`data` holds the set's official files (`eval.vqa.sets`), `images` its images (by default also `data`). A UM3 or any
vision-language model of transformers answers each question once; a killed run resumes, and the ranks of a torchrun
share the questions. `answers=FILE` scores another program's answers instead (`eval.vqa.questions`).

Beside OUTPUT.json stand OUTPUT.questions.jsonl and OUTPUT.answers.jsonl in LLaVA's form, and OUTPUT.upload with the
files that the set's own script or server reads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks.benchmark import Benchmark
from eval.command import model_hash, run_command
from eval.results_cache import ImageModel
from eval.scores import Measurement, Score
from eval.vqa.questions import Answer, Question, answer_lines, find_file, question_lines, read_answers
from eval.vqa.sets import SETS, SetName
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.files import atomic_file, check_writable, sha256_of, short_hash, write_text
from um3.core.hub import model_folder
from um3.core.ranges import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from PIL import Image

NUM_SAMPLES = 64  # answers that the result file shows


@dataclass
class VQAConfig:
    """The set, its files, and the model that answers."""

    set: SetName = "pope"
    data: str = ""
    """Folder with the set's official files."""
    images: str = ""
    """Folder of the images; `data` by default."""
    model: str = ""
    """Folder or hub id of a UM3 or a vision-language model of transformers."""
    answers: str = ""
    """File of answers to score instead of asking `model`."""
    limit: NonNegativeInt = 0
    """Number of questions, in the order of the file; 0 for all."""
    max_new_tokens: NonNegativeInt = 0
    """Longest answer; 0 for the set's own (128, or 1,024 for MM-Vet, ScienceQA and MMBench)."""
    batch_size: PositiveInt = 8
    output: str = ""
    """Result file (JSON)."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"set data=FOLDER with the official files of {self.set}")
        if bool(self.model) == bool(self.answers):
            raise ValueError("set either model=FOLDER or answers=FILE")
        if not self.output:
            raise ValueError("set output=FILE.json for the result")
        self.images = self.images or self.data
        self.max_new_tokens = self.max_new_tokens or SETS[self.set].max_new_tokens


def main(arguments: Sequence[str]) -> None:
    """Answer the questions of a set and score the answers."""
    about = "Questions about images: the published sets, scored by their own rules."
    run_command(VQAConfig, vqa, name="vqa", about=about, arguments=arguments)


def vqa(config: VQAConfig) -> None:
    """Answer the questions that have no answer yet, write all answers, and score them."""
    chosen = SETS[config.set]
    if not Path(config.data).is_dir():
        raise UserError(f"{config.data} is not a folder; set data= to the folder with the official files")
    questions = chosen.read(Path(config.data), Path(config.images))
    questions = questions[: config.limit or None]
    if not questions:
        raise UserError(f"{config.data} has no question of {config.set}; copy the published files")
    check_writable(Path(config.output).parent)
    protocol = {"rule": chosen.rule, "questions_sha256": short_hash([(str(q.question_id), q.text) for q in questions])}
    benchmark = Benchmark(config, Measurement(config.set, 0, protocol))
    if config.answers:
        benchmark.add_protocol(answers="supplied")
        path = Path(config.answers)
        benchmark.pins["answers_sha256"] = sha256_of(path) if path.is_file() else ""
        answers = read_answers(path, questions, of=chosen, skipped=benchmark.skipped)
    else:
        answers = _ask(questions, benchmark=benchmark)
    if is_main():
        _write_scores(answers, benchmark=benchmark)
        _write_files(answers, config=config, questions=questions)


def _ask(questions: Sequence[Question], *, benchmark: Benchmark) -> list[Answer]:
    config: VQAConfig = benchmark.config
    if needed := SETS[config.set].asked_with:
        find_file(Path(config.data), needed)
    model = model_hash(model_folder(config.model, kind="vision-language model"))
    decoding = {"decoding": "greedy", "max_new_tokens": config.max_new_tokens}
    benchmark.add_protocol(**decoding)
    benchmark.pins["model_sha256"] = model
    by_name = {question.name: question for question in questions}

    def open_answers() -> ImageModel:
        from transformers.utils.logging import disable_progress_bar

        from eval.vqa.models import open_model

        disable_progress_bar()
        answerer = open_model(config.model)

        def answer(names: Sequence[str], images: "Sequence[Image.Image | None]") -> list[str]:
            prompts = [by_name[name].text for name in names]
            return answerer.answer(images, prompts, max_new_tokens=config.max_new_tokens)

        return answer

    texts = benchmark.results(
        {name: question.image for name, question in by_name.items()},
        protocol=[model, decoding],
        open_model=open_answers,
        label="answer questions",
        batch_size=config.batch_size,
    )
    return [Answer(question, texts[question.name]) for question in questions if question.name in texts]


def _write_files(answers: Sequence[Answer], *, config: VQAConfig, questions: Sequence[Question]) -> None:
    stem = Path(config.output).with_suffix("")
    model_id = Path(config.model or config.answers).resolve().name
    write_text(f"{stem}.questions.jsonl", question_lines(questions, images=Path(config.images)))
    write_text(f"{stem}.answers.jsonl", answer_lines(answers, model_id=model_id))
    uploads = SETS[config.set].upload(answers, Path(config.data)) if answers else {}
    for name, content in uploads.items():
        with atomic_file(Path(f"{stem}.upload") / name) as partial:
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def _write_scores(answers: Sequence[Answer], *, benchmark: Benchmark) -> None:
    chosen, of, skipped = SETS[benchmark.config.set], benchmark.measurement, benchmark.skipped
    if chosen.score is None or not answers:
        reason = (
            f"{chosen.unscored}: {benchmark.config.output.removesuffix('.json')}.upload" if answers else "no answers"
        )
        scores = [of.missing("accuracy", note=reason, unit="x100")]
    else:
        scores = chosen.score(answers, of)
    samples = [{"question": q.text, "answer": text, "id": q.question_id} for q, text in answers[:NUM_SAMPLES]]
    benchmark.write([_with_paper(score, chosen.paper, skipped=skipped) for score in scores], samples=samples)


def _with_paper(score: Score, paper: Any, *, skipped: Any) -> Score:
    """The row with the paper's value, and what was skipped."""
    note = "; ".join(filter(None, [score.note, skipped.note()]))
    return dataclasses.replace(score, paper=paper.get(score.metric), skipped=skipped.count, note=note)
