"""The rows of an ablation: which phases a row runs, which folders they start from, and how the row is measured.

Phases are run by `python -m train` and `python -m data_mix encode`, measurements by `python -m eval`: all of them skip
what is up to date and resume what was stopped.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_mix.sources.image_sources import ImageSourceConfig
from eval.scores import Score
from eval.tasks.validation_data import trained_on
from um3.core.errors import Terminated, UserError
from um3.core.files import read_json
from um3.core.ranges import PositiveInt

PHASES = ("stage1", "stage2", "codes", "um3", "llava-align", "llava-instruct", "llamagen")
"""In the order in which a row runs them."""
ANSWER_TOKENS = 16
"""Longest answer to a question about a scene."""
ANSWER_BATCH = 32


@dataclass
class AblationRow:
    """One run: its settings for each phase, on top of the experiment's, and the paper's values by column.

    A phase that is None is not run. What a phase starts from (tokenizer, codes, LLaVA) is this row's, else that of the
    row that it comes `after`, else that of the base run; a row with another tokenizer than its codes makes codes.
    Settings may contain {after}, the folder of the row that `after` names, {base}, the folder of the base run, and
    {text}, the text half of the first UM3 of these two as a plain language model.
    """

    name: str = ""
    stage1: list[str] | None = None
    stage2: list[str] | None = None
    codes: list[str] | None = None
    um3: list[str] | None = None
    llava_align: list[str] | None = None
    llava_instruct: list[str] | None = None
    llamagen: list[str] | None = None
    eval: list[str] = field(default_factory=list)
    """Settings of the evaluation."""
    after: str = ""
    """An earlier row that this row starts from."""
    alone: Literal["", "contrastive", "mse"] = ""
    """The only loss of this row besides the quantizer's, for the rule that balances the two losses."""
    paper: list[float | None] = field(default_factory=list)

    @property
    def phases(self) -> dict[str, list[str]]:
        """The settings of each phase that the row runs, in their order."""
        settings = {phase: getattr(self, phase.replace("-", "_")) for phase in PHASES}
        return {phase: own for phase, own in settings.items() if own is not None}

    @property
    def has_tokenizer(self) -> bool:
        """Whether the row trains a tokenizer."""
        return self.stage1 is not None or self.stage2 is not None

    @property
    def parts(self) -> list[str]:
        """The parts of the evaluation that measure the row."""
        parts = ["tokenizer"] * self.has_tokenizer
        parts += ["language", "captions"] if self.um3 is not None else []
        return parts + ["generation"] * (self.um3 is not None or self.llamagen is not None)

    @property
    def llava(self) -> str:
        """The phase that makes the row's LLaVA, which answers questions about scenes; empty without one."""
        return next((phase for phase in ("llava-instruct", "llava-align") if phase in self.phases), "")

    @property
    def results(self) -> list[str]:
        """The files of scores that measure the row."""
        return [*self.parts, *(["vqa_scenes"] if self.llava else [])]


@dataclass
class Ablation:
    """A table of runs, each made once per seed 0, 1, ...

    columns: key of a score -> heading. curves: key of a metric -> title of a panel that shows the metric in the last
    phase of every row. questions: settings of `make questions`, for the rows with a LLaVA.
    """

    title: str = ""
    seeds: PositiveInt = 1
    columns: dict[str, str] = field(default_factory=dict)
    curves: dict[str, str] = field(default_factory=dict)
    questions: list[str] = field(default_factory=list)
    rows: list[AblationRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        folders = [slug(name) for name in names]
        if not folders or len(set(folders)) < len(folders) or not all(folders):
            raise ValueError(f"rows {names}: a table needs rows whose names differ in their letters and digits")
        for number, row in enumerate(self.rows):
            if row.after and row.after not in names[:number]:
                raise ValueError(f"row '{row.name}' comes after '{row.after}', which is not the name of an earlier row")
            if not row.phases.keys() - {"codes"}:
                raise ValueError(f"row '{row.name}' needs a phase to train, such as stage1 (an empty list will do)")
            if row.um3 is not None and row.llamagen is not None:
                raise ValueError(
                    f"row '{row.name}' has um3 and llamagen, whose scores have equal names; write two rows"
                )
            if row.paper and len(row.paper) != len(self.columns):
                sizes = f"{len(row.paper)} values of the paper for {len(self.columns)} columns"
                raise ValueError(f"row '{row.name}' has {sizes}")

    def folders(self, row: AblationRow, *, run: Path) -> list[Path]:
        """The row's run folder for each seed."""
        folder = run / slug(row.name)
        return [folder] if self.seeds == 1 else [folder / f"seed-{seed}" for seed in range(self.seeds)]

    def phases(self, row: AblationRow) -> dict[str, list[str]]:
        """The settings of each phase that the row runs, with those of the codes that it needs."""
        phases = row.phases
        for other in self.lineage(row) if phases.keys() & {"um3", "llamagen"} else []:
            if "codes" in (phases if other is row else self.phases(other)):
                break
            if other.has_tokenizer:
                phases["codes"] = []
                break
        return {phase: phases[phase] for phase in PHASES if phase in phases}

    def lineage(self, row: AblationRow) -> list[AblationRow]:
        """The row, the row that it comes after, and so on."""
        earlier = {other.name: other for other in self.rows}
        return [row, *(self.lineage(earlier[row.after]) if row.after else [])]


class Place(NamedTuple):
    """A folder whose phases a row may start from."""

    folder: str
    phases: Collection[str]


@dataclass(frozen=True, kw_only=True)
class RowRun:
    """A row with one seed. `places`: its own folder, those of the rows before it, and the base run's."""

    row: AblationRow
    phases: dict[str, list[str]]
    places: list[Place]
    config: str
    processes: int
    overrides: list[str]
    """Settings for the first training phase, if it is not stage 2."""
    seed: int | None = None
    images_of: str = ""
    """The run on whose validation images the row is measured."""
    questions: str = ""
    """Folder of the questions that a LLaVA answers."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.places[0].folder)

    def run(self) -> None:
        """Run the phases and the measurements that are missing or stale."""
        first = next(phase for phase in self.phases if phase != "codes")
        for phase, own in self.phases.items():
            settings = [*self._inputs(phase), *(self.overrides if phase == first != "stage2" else [])]
            settings += self._filled(own)
            if phase == "codes":
                command = ["data_mix", "encode", "--config", self.config, f"output_dir={self.folder}/codes", *settings]
                self._start(command, output=self.folder / "codes/summary.json")
                continue
            command = ["train", phase, "--processes", str(self.processes), "--config", self.config]
            command += [f"loop.output_dir={self.folder}/{phase}", *settings]
            command += [] if self.seed is None else [f"loop.seed={self.seed}"]
            self._start(command, output=self.folder / phase / "done.json")
        self._measure()

    def _measure(self) -> None:
        if self.row.parts:
            sources = trained_on(self.images_of, phase="stage1", key="sources", kind=ImageSourceConfig)
            images = json.dumps([dataclasses.asdict(source) for source in sources])
            command = ["eval", "run", "--config", self.config, f"run={self.folder}", f"images={images}"]
            command.append(f"parts=[{','.join(self.row.parts)}]")
            command += [f"model={self.folder}/llamagen/model"] * (self.row.llamagen is not None)
            command += self._filled(self.row.eval)
            self._start(command, output=self.folder / "eval" / f"{self.row.parts[-1]}.json")
        if self.row.llava:
            command = ["eval", "vqa", "set=scenes", f"data={self.questions}", f"max_new_tokens={ANSWER_TOKENS}"]
            command.append(f"batch_size={ANSWER_BATCH}")
            output = self.folder / "eval/vqa_scenes.json"
            command += [f"model={self.folder}/{self.row.llava}/model", f"output={output}"]
            self._start(command, output=output)

    def _inputs(self, phase: str) -> list[str]:
        """The settings that name what a phase starts from."""
        if phase == "stage2":
            return [f"init_from={self._place('stage1').folder}/stage1/model"]
        if phase in ("codes", "llava-align"):
            return [f"visual_tokenizer={self._tokenizer()}"]
        if phase in ("um3", "llamagen"):
            return [f"visual_tokenizer={self._tokenizer()}", f"data.codes={self._place('codes').folder}/codes"]
        return [f"init_from={self._place('llava-align').folder}/llava-align/model"] if phase == "llava-instruct" else []

    def _filled(self, settings: Sequence[str]) -> list[str]:
        """The settings with folders in the place of {after}, {base} and {text}."""
        after, base = self.places[1].folder if self.row.after else "", self.places[-1].folder
        if not base and any("{base}" in setting for setting in settings):
            raise UserError(f"row '{self.row.name}' names {{base}}; give a base run with --base (make: RUN=)")
        if not after and any("{after}" in setting for setting in settings):
            raise UserError(f"row '{self.row.name}' names {{after}}; set `after` to the name of an earlier row")
        filled = [setting.replace("{after}", after).replace("{base}", base) for setting in settings]
        if any("{text}" in setting for setting in filled):
            source = self._place("um3", of=self.places[1:]).folder
            text = Path(source, "um3-export")
            if not (text / "config.json").exists():  # the folder holds the lock of an export that was stopped
                self._start(["um3", "export", f"{source}/um3/model", "--out", str(text)], output=text / "config.json")
            filled = [setting.replace("{text}", str(text)) for setting in filled]
        return filled

    def _tokenizer(self) -> str:
        """The folder of the visual tokenizer."""
        folder, phases = self._place("stage1", "stage2")
        return f"{folder}/{'stage2' if 'stage2' in phases else 'stage1'}/model"

    def _place(self, *phases: str, of: Sequence[Place] = ()) -> Place:
        """The first place that runs one of the phases; UserError if only a base run could have it."""
        place = next(place for place in of or self.places if {*phases} & {*place.phases})
        if not place.folder:
            raise UserError(
                f"row '{self.row.name}' starts from {phases[0]}, which neither the row nor one before it runs; give "
                "a run that has it with --base (make: RUN=)"
            )
        return place

    def _start(self, command: list[str], *, output: Path) -> None:
        start(command, output=output, what=f"row '{self.row.name}'")


def costs(run: Path, row: AblationRow) -> list[Score]:
    """Minutes and memory of each training phase of a row."""
    scores = []
    for phase in (phase for phase in row.phases if phase != "codes"):
        done = read_json(run / phase / "done.json")
        values = {"minutes": done["seconds"] / 60, "peak_memory_gib": done["peak_memory_gib"]}
        of_run: dict[str, Any] = {"n": done["steps"], "seed": 0, "higher_is_better": False}
        of_run["protocol"] = {"machine": done["machine"], "processes": done["processes"]}
        scores += [Score(task=phase, metric=metric, value=value, **of_run) for metric, value in values.items()]
    return scores


def start(command: list[str], *, output: Path, what: str) -> None:
    """Run `python -m COMMAND`, which must write `output`. It gets a stop signal too and may save its state first."""
    # In a session of its own: the terminal's Ctrl-C would reach the child twice otherwise.
    child = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)
    try:
        code = child.wait()
    except (KeyboardInterrupt, Terminated) as stop:
        child.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        child.wait()
        raise
    if code or not output.exists():
        reason = f"with exit code {code}" if code else f"without writing {output}"
        remedy = (
            "correct what it says above, and run the command again" if code == 2 else "run the same command to resume"
        )
        raise UserError(f"{what} stopped {reason} in {output.parent.name}; {remedy}")


def slug(name: str) -> str:
    """A folder name: letters, digits and single dashes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.replace(",", "")).split())
