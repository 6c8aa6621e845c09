"""`python -m eval coco-generation images=FOLDER reference=FOLDER`: gFID and CLIPScore of drawn images.

`images` is a folder of `eval.benchmarks.generate_images`, or any folder of images (without prompts there is no CLIPScore); `reference` the
real ones, as a folder or as the statistics that an earlier run left. Both are cropped to their largest centred square
and brought to one size. FID is measured once for each way of bringing images to Inception; without Inception's weights
a distance over random features stands in, under a name of its own.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Resampling

from eval.benchmarks.generated_images import MANIFEST, DrawnFolder, DrawnPrompt, has_manifest, read_drawn
from eval.command import LeftOut, folder_sha256, run_command, write_result
from eval.config import Preprocessing
from eval.paper_values import UM3
from eval.records import Judge, NoJudgeError, judge_name, judgements
from eval.scores import Measurement, Score, texts_sha256
from um3.core.distributed import is_main
from um3.core.errors import UserError
from um3.core.images import SUFFIXES, ImageError, read_image, to_square

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from eval.benchmarks.folder_moments import FolderMoments
    from eval.metrics.features import FeatureNetwork

FID_ROWS: dict[str, str] = {"pytorch-fid": "fid", "clean-fid": "fid_clean", "torch-fidelity": "fid_tf1"}
CLIP_BATCH = 64
FIRST = 25  # images that say how large the drawn ones are
RESAMPLING = {"lanczos": Resampling.LANCZOS, "bicubic": Resampling.BICUBIC}


@dataclass
class CocoGenerationConfig:
    """Which images are compared with which, and over what."""

    images: str = ""
    reference: str = ""
    """A folder of real images, the .safetensors that such a folder left, or pytorch-fid's .npz."""
    size: int = 0
    """Side that all images are brought to (the COCO protocol's is 256); 0 for that of the drawn ones."""
    resize: Literal["lanczos", "bicubic"] = "lanczos"
    inception_weights: str = ""
    """pt_inception-2015-12-05-6726825d.pth; by default it is looked for in torch.hub's cache."""
    inception_sha256: str = "6726825d"
    """How the sha256 of that file begins."""
    preprocessing: list[Preprocessing] = field(default_factory=lambda: ["pytorch-fid", "clean-fid"])
    clip: str = ""
    """Folder or hub id of an OpenAI CLIP."""
    clip_prefix: str = ""
    """Put in front of every prompt; "A photo depicts " in Hessel et al. and LlamaGen."""
    out: str = ""
    """File of the result; IMAGES.json by default."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("set images=FOLDER, as eval.benchmarks.generate_images made it")
        self.out = self.out or f"{self.images.rstrip('/')}.json"


def main(arguments: Sequence[str]) -> None:
    """Score a folder of images."""
    about = "gFID and CLIPScore of a folder of drawn images."
    run_command(
        CocoGenerationConfig,
        coco_generation,
        name="coco-generation",
        about=about,
        arguments=arguments,
    )


def coco_generation(config: CocoGenerationConfig) -> None:
    """Measure both sets of images, write the rows.

    Raises:
        UserError: no images, or a file or model that is not there.
    """
    began, left_out, folder = time.monotonic(), LeftOut(), Path(config.images)
    drawn = listed(folder)
    files = {file: folder / file for each in drawn.prompts for file in each.files}
    of, pins = Measurement("coco_generation", drawn.seed, drawn.protocol), dict(drawn.pins)
    clip_rows = clip_scores(config, prompts=drawn.prompts, files=files, of=of)
    if clip_rows is None or not is_main():
        return None
    rows = fid_scores(config, files=files, left_out=left_out, pins=pins, of=of) + clip_rows
    return write_result(config.out, rows, config=config, left_out=left_out, began=began, pins=pins)


def listed(folder: Path) -> DrawnFolder:
    """Every image that should be there; those of a plain folder have no prompt.

    Raises:
        UserError: no images in it, or several in one file.
    """
    if not has_manifest(folder):
        return DrawnFolder({}, {}, [DrawnPrompt(file, "", [file], []) for file in images_in(folder)])
    drawn = read_drawn(folder)
    if drawn.protocol.get("layout") == "grid":
        raise UserError(f"{folder} has several images in a file; draw with layout=flat")
    return drawn


def images_in(folder: Path) -> dict[str, Path]:
    """All images below a folder by their names there, in order.

    Raises:
        UserError: there is none.
    """
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not found:
        raise UserError(f"{folder} holds no image ({' '.join(SUFFIXES)}); give a folder of images")
    return {file.relative_to(folder).as_posix(): file for file in found}


def clip_scores(
    config: CocoGenerationConfig, *, prompts: Sequence[DrawnPrompt], files: Mapping[str, Path], of: Measurement
) -> list[Score] | None:
    """CLIPScore by its three conventions; None on all ranks but the first."""
    from eval.metrics.clipscore import clip_conventions, missing_clip

    texts = {file: each.prompt for each in prompts for file in each.files}
    if not config.clip:
        return [missing_clip(of, setting="clip=")]
    if not all(texts.values()):
        note = f"needs prompts; {config.images} has no {MANIFEST}"
        return [of.missing("clipscore", note=note, paper=UM3["clipscore"])]
    left_out, towers = LeftOut(), folder_sha256(config.clip)
    try:
        values = judgements(
            files,
            stem=Path(config.out).with_suffix(".clip"),
            made_by=judge_name(towers, config.clip_prefix, texts_sha256(list(texts.values()))),
            open_judge=lambda: _open_clip(config, texts=texts),
            label="compare images and prompts",
            left_out=left_out,
            batch_size=CLIP_BATCH,
        )
    except NoJudgeError as error:
        return [of.missing("clipscore", note=str(error), paper=UM3["clipscore"])]
    if values is None:
        return None
    if not values:
        return [of.missing("clipscore", note=f"no image could be used: {left_out.note()}", paper=UM3["clipscore"])]
    import torch

    named = of.with_protocol(towers=towers, prefix=config.clip_prefix)
    cosines_N = torch.tensor(list(values.values()), dtype=torch.float64)
    return clip_conventions(cosines_N, of=named, skipped=left_out.count, note=left_out.note())


def _open_clip(config: CocoGenerationConfig, *, texts: Mapping[str, str]) -> Judge:
    from eval.metrics.clipscore import clip_cosines, load_clip

    clip = load_clip(config.clip)

    def judge(files: Sequence[str], images: "Sequence[Image.Image]") -> list[float]:
        prompts = [texts[file] for file in files]
        return list(clip_cosines(images, texts=prompts, clip=clip, prefix=config.clip_prefix).tolist())

    return judge


def fid_scores(
    config: CocoGenerationConfig, *, files: Mapping[str, Path], left_out: LeftOut, pins: dict[str, Any], of: Measurement
) -> list[Score]:
    """Frechet distances of the two sets over each network; a row that says why where there is none. The drawn images'
    name joins `pins`."""
    from eval.benchmarks.folder_moments import measure
    from eval.metrics.features import inception_note, inception_path

    paper = UM3["fid"]
    names = [FID_ROWS[each] for each in config.preprocessing]
    if not config.reference:
        note = "set reference= to a folder of real images (COCO: all of val2014) or to its statistics"
        return [of.missing(name, note=note, higher_is_better=False, paper=paper) for name in names]
    networks, side = _networks(config), drawn_side(files)
    size, stem = config.size or side, Path(config.out).with_suffix("")
    preparation = f"largest centred square, Pillow's {config.resize} to {size}, uint8"
    drawn = measure(
        files,
        networks=networks,
        preparation=preparation,
        to_array=lambda image: _square(image, size=size, resize=config.resize, only=side),
        file=stem.with_name(f"{stem.name}.drawn.safetensors"),
        label="measure drawn images",
        left_out=left_out,
    )
    reference = _reference(config, networks=networks, preparation=preparation, size=size, stem=stem)
    pins["drawn_sha256"] = drawn.about["images_sha256"]
    of = of.with_protocol(
        preparation=preparation,
        drawn_images=drawn.about["images"],
        reference_images=reference.about["images"],
        reference_sha256=reference.about["images_sha256"],
    )
    rows = [_distance(each, drawn=drawn, reference=reference, left_out=left_out, of=of) for each in networks]
    if inception_path(config.inception_weights) is None:
        note = inception_note(config.inception_weights)
        rows += [of.missing(name, note=note, higher_is_better=False, paper=paper) for name in names]
    return rows


def drawn_side(files: Mapping[str, Path]) -> int:
    """The commonest shorter side of the first images that can be read.

    Raises:
        UserError: none can.
    """
    sides: Counter[int] = Counter()
    for path in files.values():
        with contextlib.suppress(ImageError):
            sides[min(read_image(path).size)] += 1
        if sides.total() == FIRST:
            break
    if not sides:
        raise UserError(f"none of the {len(files)} drawn images can be read; draw them again")
    return sides.most_common(1)[0][0]


def _networks(config: CocoGenerationConfig) -> "list[FeatureNetwork]":
    from eval.metrics.features import inception_features, inception_path, random_features

    weights, sha256 = config.inception_weights, config.inception_sha256
    if inception_path(weights) is None:
        if weights:
            raise UserError(f"no Inception weights at {weights}; correct inception_weights")
        return [random_features()]
    return [inception_features(weights, preprocessing=each, sha256=sha256) for each in config.preprocessing]


def _square(image: "Image.Image", *, size: int, resize: str, only: int = 0) -> "NDArray":
    """The image as it is compared; `only` is the shorter side that it must have (0: any)."""
    from eval.benchmarks.folder_moments import WrongSizeError

    if only and min(image.size) != only:
        raise WrongSizeError
    return to_square(image, size=size, resample=RESAMPLING[resize])


def _reference(
    config: CocoGenerationConfig, *, networks: "Sequence[FeatureNetwork]", preparation: str, size: int, stem: Path
) -> "FolderMoments":
    from eval.benchmarks.folder_moments import load_reference, measure

    if not Path(config.reference).is_dir():
        if not Path(config.reference).is_file():
            raise UserError(f"no reference at {config.reference}; give a folder of real images or its statistics")
        return load_reference(config.reference, networks=networks, preparation=preparation)
    left_out, file = LeftOut(), stem.with_name(f"{stem.name}.reference.safetensors")
    found = measure(
        images_in(Path(config.reference)),
        networks=networks,
        preparation=preparation,
        to_array=lambda image: _square(image, size=size, resize=config.resize),
        file=file,
        label="measure real images",
        left_out=left_out,
    )
    print(f"statistics of the real images are in {file}: give it as reference= another time. {left_out.note()}".strip())
    return found


def _distance(
    network: "FeatureNetwork",
    *,
    drawn: "FolderMoments",
    reference: "FolderMoments",
    left_out: LeftOut,
    of: Measurement,
) -> Score:
    from eval.benchmarks.folder_moments import network_key
    from eval.metrics.frechet import frechet_distance

    key, n, dims = network_key(network), drawn.about["images"], network.num_features
    is_fid = network.name == "inception-2015"
    name = FID_ROWS[network.preprocessing] if is_fid else f"frechet_distance[{network.name}]"
    paper = UM3["fid"] if is_fid else None
    if key not in reference.moments:
        note = f"the reference holds no statistics for {key}; give the folder of real images"
        return of.missing(name, note=note, higher_is_better=False, paper=paper)
    few = f"{n} images for {dims} dimensions: biased upwards, compare only at equal n" if n < 10 * dims else ""
    return of.with_protocol(features=key, features_sha256=network.weights_sha256).score(
        name,
        frechet_distance(drawn.moments[key], reference.moments[key]),
        n=n,
        skipped=left_out.count,
        higher_is_better=False,
        paper=paper,
        note="; ".join(filter(None, [few, left_out.note()])),
    )
