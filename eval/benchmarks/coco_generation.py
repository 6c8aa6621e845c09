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
from eval.scores import Measurement, Score
from eval.tables import image_files
from eval.tasks.generated_images import MANIFEST
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.images import ImageError, read_image, to_square
from um3.core.ranges import Range

if TYPE_CHECKING:
    from PIL import Image

    from eval.benchmarks.feature_statistics import FeatureStatistics, Preparation
    from eval.metrics.features import FeatureNetwork

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
    """Score a folder of images."""
    about = "gFID and CLIPScore of a folder of generated images."
    run_command(CocoGenerationConfig, coco_generation, name="coco-generation", about=about, arguments=arguments)


def coco_generation(config: CocoGenerationConfig) -> None:
    """Measure both sets of images and write the scores.

    Raises:
        UserError: no images, or a missing file or model.
    """
    benchmark, folder = Benchmark.of_images("coco_generation", config), Path(config.images)
    if benchmark.measurement.protocol.get("layout") == "grid":
        raise UserError(f"{folder} has several images in one file; generate them with layout=flat")
    texts = {file: prompt.prompt for prompt in benchmark.generated.prompts for file in prompt.files}
    texts = texts or dict.fromkeys(image_files(folder), "")
    files = {file: folder / file for file in texts}
    clip_rows = clip_scores(benchmark, texts=texts, files=files)
    benchmark.write(fid_scores(benchmark, files=files) + clip_rows)


def clip_scores(benchmark: Benchmark, *, texts: Mapping[str, str], files: Mapping[str, Path]) -> list[Score]:
    """CLIPScore by its three conventions, or a row with the reason why there is none."""
    from eval.metrics.clipscore import clip_conventions, missing_clip

    config, of, paper = benchmark.config, benchmark.measurement, UM3["clipscore"]
    if not config.clip:
        return [missing_clip(of, setting="clip=")]
    if not all(texts.values()):
        return [of.missing("clipscore", note=f"needs prompts; {config.images} has no {MANIFEST}", paper=paper)]
    skipped, towers = SkipCounter(), model_hash(config.clip)
    try:
        cosines = benchmark.results(
            files,
            protocol=[towers, config.clip_prefix, list(texts.values())],
            open_model=lambda: _open_clip(config, texts=texts),
            label="compare images and prompts",
            skipped=skipped,
            batch_size=CLIP_BATCH,
        )
    except UnavailableError as error:
        return [of.missing("clipscore", note=str(error), paper=paper)]
    if not cosines:
        return [of.missing("clipscore", note=f"no usable image: {skipped.note()}", paper=paper)]
    import torch

    of = of.with_protocol(towers=towers, prefix=config.clip_prefix)
    cosines_N = torch.tensor(list(cosines.values()), dtype=torch.float64)
    return clip_conventions(cosines_N, of=of, skipped=skipped.count, note=skipped.note())


def _open_clip(config: CocoGenerationConfig, *, texts: Mapping[str, str]) -> ImageModel:
    from eval.metrics.clipscore import clip_cosines, load_clip

    clip = load_clip(config.clip)

    def compare(names: Sequence[str], images: "Sequence[Image.Image]") -> list[float]:
        prompts = [texts[name] for name in names]
        return list(clip_cosines(images, texts=prompts, clip=clip, prefix=config.clip_prefix).tolist())

    return compare


def fid_scores(benchmark: Benchmark, *, files: Mapping[str, Path]) -> list[Score]:
    """Frechet distances of the two sets over each network, or rows with the reason why there is none.

    The generated images' hash is added to the pins.
    """
    from eval.benchmarks.feature_statistics import Preparation, measure_features
    from eval.metrics.features import inception_note, inception_path

    config: CocoGenerationConfig = benchmark.config
    of = benchmark.measurement
    missing: dict[str, Any] = {"higher_is_better": False, "paper": UM3["fid"]}
    names = [FID_ROWS[preprocessing] for preprocessing in config.preprocessing]
    if not config.reference:
        note = "set reference= to a folder of real images (COCO: all of val2014) or to its statistics"
        return [of.missing(name, note=note, **missing) for name in names]
    networks, side = _networks(config), generated_side(files)
    size = config.size or side
    preparation = Preparation(
        f"largest centred square, Pillow's {config.resize} to {size}, uint8",
        lambda image: to_square(image, size=size, resample=RESAMPLING[config.resize]),
    )
    common: dict[str, Any] = {"networks": networks, "preparation": preparation}
    generated = measure_features(
        benchmark, files, side=side, label="measure generated images", skipped=benchmark.skipped, **common
    )
    reference = _reference(benchmark, **common)
    benchmark.pins["images_sha256"] = generated.about["images_sha256"]
    of = of.with_protocol(
        preparation=preparation.description,
        generated_images=generated.about["images"],
        reference_images=reference.about["images"],
        reference_sha256=reference.about["images_sha256"],
    )
    rows = [
        _distance(network, generated=generated, reference=reference, skipped=benchmark.skipped, of=of)
        for network in networks
    ]
    if inception_path(config.inception_weights) is None:
        note = inception_note(config.inception_weights)
        rows += [of.missing(name, note=note, **missing) for name in names]
    return rows


def generated_side(files: Mapping[str, Path]) -> int:
    """The commonest shorter side of the first images that can be read.

    Raises:
        UserError: none can be read.
    """
    sides = []
    for path in list(files.values())[:SIZE_SAMPLE]:
        with contextlib.suppress(ImageError):
            sides.append(min(read_image(path).size))
    if not sides:
        raise UserError(f"the first {SIZE_SAMPLE} generated images cannot be read; generate them again")
    return statistics.mode(sides)


def _networks(config: CocoGenerationConfig) -> "list[FeatureNetwork]":
    from eval.metrics.features import inception_features, inception_path, random_features

    weights, sha256 = config.inception_weights, config.inception_sha256
    if inception_path(weights) is None:
        if weights:
            raise UserError(f"no Inception weights at {weights}; correct inception_weights")
        return [random_features()]
    return [
        inception_features(weights, preprocessing=preprocessing, sha256=sha256)
        for preprocessing in config.preprocessing
    ]


def _reference(
    benchmark: Benchmark, *, networks: "Sequence[FeatureNetwork]", preparation: "Preparation"
) -> "FeatureStatistics":
    from eval.benchmarks.feature_statistics import load_statistics, measure_features, save_statistics

    path, skipped = Path(benchmark.config.reference), SkipCounter()
    if not path.exists():
        raise UserError(f"no reference at {path}; set it to a folder of real images or to its statistics")
    if path.is_file():
        return load_statistics(path, networks=networks, preparation=preparation)
    reference = measure_features(
        benchmark,
        image_files(path),
        networks=networks,
        preparation=preparation,
        label="measure real images",
        skipped=skipped,
    )
    if is_main():
        file = Path(benchmark.config.output).with_suffix(".reference.npz")
        save_statistics(file, reference)
        print(f"statistics of the real images: {file}; set reference= to it the next time. {skipped.note()}".strip())
    return reference


def _distance(
    network: "FeatureNetwork",
    *,
    generated: "FeatureStatistics",
    reference: "FeatureStatistics",
    skipped: SkipCounter,
    of: Measurement,
) -> Score:
    from eval.benchmarks.feature_statistics import network_key
    from eval.metrics.frechet import frechet_distance

    key, n, dims = network_key(network), generated.about["images"], network.num_features
    is_fid = network.name == "inception-2015"
    name = FID_ROWS[network.preprocessing] if is_fid else f"frechet_distance[{network.name}]"
    paper = UM3["fid"] if is_fid else None
    if key not in reference.moments:
        note = f"the reference has no statistics of {key}; set reference= to the folder of real images"
        return of.missing(name, note=note, higher_is_better=False, paper=paper)
    few = f"{n} images for {dims} dimensions: biased upwards, compare only at equal n" if n < 10 * dims else ""
    return of.with_protocol(features=key, features_sha256=network.weights_sha256).score(
        name,
        frechet_distance(generated.moments[key], reference.moments[key]),
        n=n,
        skipped=skipped.count,
        higher_is_better=False,
        paper=paper,
        note="; ".join(filter(None, [few, skipped.note()])),
    )
