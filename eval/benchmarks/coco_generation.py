"""`python -m eval coco-generation images=FOLDER reference=FOLDER`: gFID and CLIPScore of generated images.

`images` is a folder of `generate-images`, or any folder of images (CLIPScore needs the prompts). `reference` holds the
real images, as a folder or as the statistics that an earlier run wrote. Both sets are cropped to their largest centred
square and resized to one size. FID is computed for each way of preparing images for Inception. Without Inception's
weights, a distance over random features is computed instead, under another name. The ranks of a torchrun share the
images.
"""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL.Image import Resampling

from eval.benchmarks.benchmark import Benchmark, ScoredImagesConfig
from eval.command import SkipCounter, model_hash, run_command
from eval.config import Preprocessing
from eval.paper_values import UM3
from eval.results_cache import ImageModel, UnavailableError
from eval.scores import Score
from eval.tables import image_files
from eval.tasks.generated_images import MANIFEST
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.images import ImageError, read_image, to_square
from um3.core.ranges import Range
from um3.core.text import printable

if TYPE_CHECKING:
    from eval.benchmarks.feature_statistics import FeatureStatistics

FID_ROWS: dict[str, str] = {"pytorch-fid": "fid", "clean-fid": "fid_clean", "torch-fidelity": "fid_tf1"}
CLIP_BATCH = 64
SIZE_SAMPLE = 25  # images that determine the size of the generated ones
RESAMPLING = {"lanczos": Resampling.LANCZOS, "bicubic": Resampling.BICUBIC}


@dataclass
class CocoGenerationConfig(ScoredImagesConfig):
    """The two sets of images, their preparation, and the networks that compare them."""

    reference: str = ""
    """A folder of real images, the .npz that an earlier run wrote for it, or pytorch-fid's .npz."""
    size: Annotated[int, Range(0, 2**14)] = 0
    """Side in pixels of all prepared images (256 in the COCO protocol); 0 for that of the generated ones."""
    resize: Literal["lanczos", "bicubic"] = "lanczos"
    inception_weights: str = ""
    """pt_inception-2015-12-05-6726825d.pth; by default the file in torch.hub's cache."""
    inception_sha256: str = "6726825d"
    """The first digits of that file's sha256."""
    preprocessing: list[Preprocessing] = field(default_factory=lambda: ["pytorch-fid", "clean-fid"])
    clip: str = ""
    """Folder or hub id of an OpenAI CLIP."""
    clip_prefix: str = ""
    """Text before every prompt; "A photo depicts " in Hessel et al. and LlamaGen."""


def main(arguments: Sequence[str]) -> None:
    """Measure both sets of images and write the scores."""

    def coco_generation(config: CocoGenerationConfig) -> None:
        benchmark, folder = Benchmark.of_images("coco_generation", config), Path(config.images)
        if benchmark.measurement.protocol.get("layout") == "grid":
            raise UserError(f"{folder} has several images in one file; generate them with layout=flat")
        texts = {file: prompt.prompt for prompt in benchmark.generated.prompts for file in prompt.files}
        texts = texts or dict.fromkeys(image_files(folder), "")
        files = {file: folder / file for file in texts}
        clip_rows = clip_scores(benchmark, texts=texts, files=files)
        benchmark.write(fid_scores(benchmark, files=files) + clip_rows)

    about = "gFID and CLIPScore of a folder of generated images."
    run_command(CocoGenerationConfig, coco_generation, name="coco-generation", about=about, arguments=arguments)


def clip_scores(benchmark: Benchmark, *, texts: Mapping[str, str], files: Mapping[str, Path]) -> list[Score]:
    """CLIPScore by its three conventions, or a row with the reason why there is none."""
    import torch

    from eval.metrics.clipscore import clip_conventions, clip_cosines, load_clip, missing_clip

    config, of = benchmark.config, benchmark.measurement
    if not config.clip:
        return [missing_clip(of, setting="clip=")]

    def open_clip() -> ImageModel:
        clip = load_clip(config.clip)
        return lambda names, images: clip_cosines(
            images, texts=[texts[name] for name in names], clip=clip, prefix=config.clip_prefix
        ).tolist()

    skipped, towers = SkipCounter(), model_hash(config.clip)
    try:
        if not all(texts.values()):
            raise UnavailableError(f"needs prompts; {config.images} has no {MANIFEST}")
        cosines = benchmark.results(
            files,
            protocol=[towers, config.clip_prefix, list(texts.values())],
            open_model=open_clip,
            label="compare images and prompts",
            skipped=skipped,
            batch_size=CLIP_BATCH,
        )
        if not cosines:
            raise UnavailableError(f"no usable image: {skipped.note()}")
    except UnavailableError as error:
        return [of.missing("clipscore", note=str(error), paper=UM3["clipscore"])]
    of = of.with_protocol(towers=towers, prefix=config.clip_prefix)
    cosines_N = torch.tensor(list(cosines.values()), dtype=torch.float64)
    return clip_conventions(cosines_N, of=of, skipped=skipped.count, note=skipped.note())


def fid_scores(benchmark: Benchmark, *, files: Mapping[str, Path]) -> list[Score]:
    """Frechet distances of the two sets over each network, or rows with the reason why there is none.

    The generated images' hash is added to the pins.
    """
    from eval.benchmarks.feature_statistics import measure_features
    from eval.metrics import features

    config: CocoGenerationConfig = benchmark.config
    of, weights, skipped = benchmark.measurement, config.inception_weights, benchmark.skipped
    missing: dict[str, Any] = {"higher_is_better": False, "paper": UM3["fid"]}
    names = [FID_ROWS[preprocessing] for preprocessing in config.preprocessing]
    if not config.reference:
        note = "set reference= to a folder of real images (COCO: all of val2014) or to its statistics"
        return [of.missing(name, note=note, **missing) for name in names]
    networks = [features.random_features()]
    if has_inception := features.inception_path(weights) is not None:
        sha256 = config.inception_sha256
        networks = [
            features.inception_features(weights, preprocessing=name, sha256=sha256) for name in config.preprocessing
        ]
    elif weights:
        raise UserError(f"no Inception weights at {weights}; correct inception_weights")
    sides = []
    for path in list(files.values())[:SIZE_SAMPLE]:
        with contextlib.suppress(ImageError):
            sides.append(min(read_image(path).size))
    if not sides:
        raise UserError(f"the first {SIZE_SAMPLE} generated images cannot be read; generate them again")
    side = statistics.mode(sides)
    size = config.size or side
    description = f"largest centred square, Pillow's {config.resize} to {size}, uint8"
    preparation = (description, lambda image: to_square(image, size=size, resample=RESAMPLING[config.resize]))
    common: dict[str, Any] = {"networks": networks, "preparation": preparation}
    label = "measure generated images"
    generated = measure_features(benchmark, files, side=side, label=label, skipped=skipped, **common)
    reference = _reference(benchmark, **common)
    benchmark.pins["images_sha256"] = generated.about["images_sha256"]
    of = of.with_protocol(
        preparation=description,
        generated_images=generated.about["images"],
        reference_images=reference.about["images"],
        reference_sha256=reference.about["images_sha256"],
    )
    rows = []
    for network in networks:
        key, fid = network.key, FID_ROWS.get(network.preprocessing, "")
        if real := reference.moments.get(key):
            of_network = of.with_protocol(features=key, features_sha256=network.weights_sha256)
            options: Any = {"fid": fid, "paper": UM3["fid"], "skipped": skipped.count, "note": skipped.note()}
            rows.append(features.distance_row(network, generated.moments[key], real, of=of_network, **options))
        else:
            note = f"the reference has no statistics of {key}; set reference= to the folder of real images"
            fields = missing | {"paper": UM3["fid"] if has_inception else None}
            rows.append(of.missing(features.distance_name(network, fid=fid), note=note, **fields))
    note = features.inception_note(weights)
    return rows if has_inception else rows + [of.missing(name, note=note, **missing) for name in names]


def _reference(benchmark: Benchmark, **common: Any) -> "FeatureStatistics":
    from eval.benchmarks.feature_statistics import load_statistics, measure_features, save_statistics

    path, skipped, label = Path(benchmark.config.reference), SkipCounter(), "measure real images"
    if not path.exists():
        raise UserError(f"no reference at {path}; set it to a folder of real images or to its statistics")
    if path.is_file():
        return load_statistics(path, **common)
    reference = measure_features(benchmark, image_files(path), label=label, skipped=skipped, **common)
    if is_main():
        file = Path(benchmark.config.output).with_suffix(".reference.npz")
        save_statistics(file, reference)
        said = f"statistics of the real images: {file}; set reference= to it the next time. {skipped.note()}"
        print(printable(said.strip()))
    return reference
