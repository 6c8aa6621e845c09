"""One run of a published benchmark: results by image, from a model or from a file, and the file of the scores."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.command import SkipCounter
from eval.results_cache import ResultsCache, UnavailableError, image_hash, measure_images, supplied_results
from eval.scores import Measurement, Score, Unit, write_scores
from eval.tasks.generated_images import GeneratedFolder, has_manifest, read_manifest
from um3.core.config import to_dict
from um3.core.distributed import is_main
from um3.core.progress import format_seconds


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
    """What one run has measured and skipped so far.

    `pins` names what was measured (model, seeds, images). The protocol does not, since it is equal for two models that
    can be compared.
    """

    config: Any
    measurement: Measurement
    pins: dict[str, Any] = field(default_factory=dict)
    generated: GeneratedFolder = field(default_factory=lambda: GeneratedFolder({}, {}, []))
    skipped: SkipCounter = field(default_factory=SkipCounter)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def of_images(cls, task: str, config: ScoredImagesConfig) -> "Benchmark":
        """A benchmark of generated images; a folder without a manifest has no known prompts, seed and model."""
        folder = config.images
        generated = read_manifest(folder) if has_manifest(folder) else GeneratedFolder({}, {}, [])
        measurement = Measurement(task, generated.seed, generated.protocol)
        return cls(config, measurement, dict(generated.pins), generated)

    def add_protocol(self, **settings: Any) -> None:
        """Add settings to the protocol of all scores."""
        self.measurement = self.measurement.with_protocol(**settings)

    def results(
        self,
        files: Mapping[str, Path | bytes],
        *,
        protocol: Any,
        skipped: SkipCounter | None = None,
        supplied: str = "",
        field: str = "",
        ids: Mapping[str, str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The result of every usable image, measured once with `measure_images` and a cache beside the result file.

        Args:
            supplied: a file that replaces the model: it has `field` for every image, by name or by the id in `ids`.
        """
        skipped = self.skipped if skipped is None else skipped
        if supplied:
            self.pins[f"{field}_sha256"] = image_hash(Path(supplied))
            return supplied_results(supplied, field=field, ids=ids or {name: name for name in files}, skipped=skipped)
        cache = ResultsCache(Path(self.config.output).with_suffix(".cache"), protocol=protocol)
        return measure_images(files, cache=cache, skipped=skipped, **options)

    def run(
        self, score: Callable[["Benchmark"], tuple[list[Score], Any]], *, paper: Mapping[str, float], unit: Unit
    ) -> None:
        """Write the scores and samples that `score` returns.

        If it raises an UnavailableError, the metrics of `paper` are written without a value and with its message.
        """
        try:
            scores, samples = score(self)
        except UnavailableError as error:
            samples = None
            scores = [
                self.measurement.missing(name, note=str(error), unit=unit, paper=value) for name, value in paper.items()
            ]
        self.write(scores, samples=samples)

    def write(self, scores: Sequence[Score], *, samples: Any = None) -> None:
        """Write the scores with everything they depend on, and print them; only the first rank does."""
        from um3.core.metrics import commit, machine, versions

        if not is_main():
            return
        seconds = time.monotonic() - self.began
        write_scores(
            self.config.output,
            scores,
            samples=samples,
            skipped=self.skipped.to_dict(),
            pins=self.pins,
            seconds=round(seconds, 1),
            config=to_dict(self.config),
            commit=commit(),
            versions=versions(),
            machine=machine(),
        )
        missing: dict[str, list[str]] = {}
        for score in scores:
            if score.value is None:
                missing.setdefault(score.note, []).append(score.key)
            else:
                print(f"{score.key:<40}{score.shown():>10}  n={score.n}  {score.note}".rstrip())
        for note, keys in missing.items():
            print(f"without a value: {', '.join(keys)}: {note}")
        if self.skipped.count:
            print(self.skipped.note())
        print(f"{len(scores)} rows in {format_seconds(seconds)} -> {self.config.output}")
