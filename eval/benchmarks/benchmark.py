"""One run of a published benchmark: results by image, from a model or from a file, and the file of the scores."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.command import SkipCounter
from eval.part_files import provenance
from eval.results_cache import ResultsCache, UnavailableError, image_hash, measure_images, supplied_results
from eval.scores import Measurement, Score, Unit, write_scores
from eval.tasks.generated_images import GeneratedFolder, has_manifest, read_manifest
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.files import folder_lock
from um3.core.progress import format_seconds
from um3.core.text import printable


@dataclass
class ScoredImagesConfig:
    """The settings that all benchmarks of generated images share."""

    images: str = ""
    """Folder of images, as `python -m eval generate-images` writes it."""
    output: str = ""
    """Result file; IMAGES.json by default."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("set images=FOLDER, as python -m eval generate-images writes it")
        self.output = self.output or f"{self.images.rstrip('/')}.json"


@dataclass
class Benchmark:
    """What one run has measured and skipped so far. While it lives, no other process writes the same result file.

    `pins` names what was measured (model, seeds, images). The protocol does not, since it is equal for two models that
    can be compared.
    """

    config: Any
    measurement: Measurement
    pins: dict[str, Any] = field(default_factory=dict)
    generated: GeneratedFolder = field(default_factory=lambda: GeneratedFolder({}, {}, []))
    skipped: SkipCounter = field(default_factory=SkipCounter)

    def __post_init__(self) -> None:
        self.began, self.cache = time.monotonic(), Path(self.config.output).with_suffix(".cache")
        self._lock = contextlib.ExitStack()
        if is_main():  # the lock has a folder of its own: two benchmarks may write different files of one folder
            self._lock.enter_context(folder_lock(self.cache))

    @classmethod
    def of_images(cls, task: str, config: ScoredImagesConfig) -> "Benchmark":
        """A benchmark of generated images; a folder without a manifest has no known prompts, seed and model."""
        folder = config.images
        if not Path(folder).is_dir():
            raise UserError(f"{folder} does not exist; generate the images with python -m eval generate-images")
        generated = read_manifest(folder) if has_manifest(folder) else GeneratedFolder({}, {}, [])
        return cls(config, Measurement(task, generated.seed, generated.protocol), dict(generated.pins), generated)

    def add_protocol(self, **settings: Any) -> None:
        """Add settings to the protocol of all scores."""
        self.measurement = self.measurement.with_protocol(**settings)

    def results(
        self,
        files: Mapping[str, Path | bytes | None],
        *,
        protocol: Any,
        skipped: SkipCounter | None = None,
        supplied: str = "",
        field: str = "",
        ids: Mapping[str, str] | None = None,
        parse: Callable[[Any], Any] = lambda value: value,
        unusable: str = "",
        **options: Any,
    ) -> dict[str, Any]:
        """The result of every usable image, measured once with `measure_images` and a cache beside the result file.

        A file `supplied` replaces the model: it has `field` for every image, by name or by the id in `ids`. `parse`
        makes a result of its JSON; images for which it raises are skipped, for the reason `unusable`.
        """
        skipped = self.skipped if skipped is None else skipped
        if supplied:
            self.pins[f"{field}_sha256"] = image_hash(Path(supplied))
            ids = ids or {name: name for name in files}
            values = supplied_results(supplied, field=field, ids=ids, skipped=skipped)
        else:
            cache = ResultsCache(self.cache, protocol=protocol)
            values = measure_images(files, cache=cache, skipped=skipped, **options)
        results = {}
        for name, value in values.items():
            try:
                results[name] = parse(value)
            except (KeyError, TypeError, ValueError, AttributeError):
                skipped.add(unusable, name)
        return results

    def run(
        self, score: Callable[["Benchmark"], tuple[list[Score], Any]], *, paper: Mapping[str, float], unit: Unit
    ) -> None:
        """Write the scores and samples that `score` returns.

        If it raises an UnavailableError, the metrics of `paper` are written without a value and with its message.
        """
        try:
            scores, samples = score(self)
        except UnavailableError as error:
            note, of, samples = str(error), self.measurement, None
            scores = [of.missing(name, note=note, unit=unit, paper=value) for name, value in paper.items()]
        self.write(scores, samples=samples)

    def write(self, scores: Sequence[Score], *, samples: Any = None) -> None:
        """Write the scores with everything they depend on, and print them; only the first rank does."""
        if not is_main():
            return
        about = provenance(self.config, began=self.began)
        write_scores(
            self.config.output, scores, samples=samples, skipped=self.skipped.to_dict(), pins=self.pins, **about
        )
        lines, missing = list[str](), dict[str, list[str]]()
        for score in scores:
            if score.value is None:
                missing.setdefault(score.note, []).append(score.key)
            else:
                lines.append(f"{score.key:<40}{score.shown():>10}  n={score.n}  {score.note}".rstrip())
        lines += [f"without a value: {', '.join(keys)}: {note}" for note, keys in missing.items()]
        lines += [self.skipped.note()] * bool(self.skipped.count)
        lines.append(f"{len(scores)} rows in {format_seconds(about['seconds'])} -> {self.config.output}")
        print("\n".join(map(printable, lines)))
