"""The part of an evaluation that measures image tokenizers: QLIP after each stage, and any other beside it.

Shapes: N images, H height, W width.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import tokenizer as qlip
from data_mix.demo.digits import DigitsSource, captions_of
from data_mix.samples import Split
from data_mix.sources.image_folder import OwnImages
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from eval.config import EvalConfig, LabelledConfig, PerceptualConfig, ProbeConfig
from eval.metrics.code_statistics import MAX_IMAGES, bit_report, bit_scores
from eval.metrics.features import FeatureNetwork, open_features, weights_sha256
from eval.metrics.reconstruction import LPIPS_PROTOCOL, PSNR_PROTOCOL, SSIM_PROTOCOL, quality
from eval.paper_values import QLIP_B_16, STAGE_1
from eval.scores import Measurement, Score
from eval.tasks.classification_data import (
    Labelled,
    LabelledFolder,
    LabelledImages,
    LabelledSource,
    ordered_classes,
    read_class_names,
    read_templates,
)
from eval.tasks.external_tokenizers import open_other
from eval.tasks.generation import frechet_rows, read_back_row
from eval.tasks.linear_probe import PROBE_FEATURES, probe_scores
from eval.tasks.parts import KEPT, PartResult
from eval.tasks.validation_data import HeldOut, held_out_images
from eval.tasks.zero_shot import retrieval_scores, zero_shot_score
from tokenizer.images import ImageTokenizer, QLIPImages, decode_codes, encode_images
from tokenizer.perceptual import PerceptualDistance, build_perceptual_distance
from um3.core.distributed import device
from um3.core.errors import UserError


class Classes(NamedTuple):
    """Images with classes, ready to be told apart; without `train` there is no probe, for the reason in `note`."""

    name: str
    val: Labelled
    train: Labelled | None
    names: list[str]
    templates: list[str]
    note: str = ""


def tokenizer(config: EvalConfig, *, stages: Mapping[str, Path]) -> PartResult:
    """Reconstruction by every tokenizer; retrieval, bits and classification by the last stage's.

    Raises:
        UserError: a tokenizer, a folder with classes or a weights file cannot be used. What may be wrong is opened
            before anything is measured.
    """
    part = config.tokenizer
    others = {name: open_other(target, name=name) for name, target in part.others.items()}
    qlips = {stage: _load(folder) for stage, folder in stages.items()}
    stage, last = list(qlips.items())[-1]
    classified = [_digits(last.image_size)] if part.labelled else []
    classified += [_folder(own, size=last.image_size) for own in part.classification]
    distance = _lpips(part.perceptual)
    features = open_features(config.fid_features, **last._asdict(), inception_weights=config.inception_weights)
    # The last stage comes last: its codes and its originals are the ones that are kept.
    tokenizers: dict[str, ImageTokenizer] = {**others, **qlips}
    result, codes = PartResult([], {"stages": list(tokenizers), "bits": {}}, {}), {}

    @functools.lru_cache(maxsize=1)
    def held_out(size: int) -> list[HeldOut]:
        common: dict[str, Any] = {"num_images": part.num_images, "size": size, "seed": config.seed}
        return [held_out_images(source, **common) for source in config.images]

    for name, measured in tokenizers.items():
        for data in held_out(measured.image_size):
            codes_NP = encode_images(measured, data.images, label=f"encode {name} {data.name}")
            rebuilt_NHWC = decode_codes(measured, codes_NP, label=f"decode {name} {data.name}")
            of = Measurement(f"{data.name}_reconstruction_{name}", config.seed, data.protocol)
            paper = {} if name in others else STAGE_1 if name == "stage1" else QLIP_B_16
            result.scores.append(_size_row(measured, n=len(data.images), of=of))
            result.scores.extend(
                _quality_rows(rebuilt_NHWC, data=data, paper=paper, features=features, distance=distance, of=of)
            )
            codes[data.name] = codes_NP[:MAX_IMAGES].clone()
            # Scenes of another size are other scenes than the originals that are shown.
            if measured.image_size == last.image_size or not data.has_checker:
                result.images[f"{data.name}_{name}"] = rebuilt_NHWC[:KEPT]
            result.images[f"{data.name}_original"] = data.images[:KEPT]
    for data in held_out(last.image_size):
        of = Measurement(f"{data.name}_retrieval", config.seed, {"stage": stage})
        result.scores.extend(retrieval_scores(data.images, captions=data.full_captions, of=of, **last._asdict()))
        of = Measurement(f"{data.name}_bits", config.seed, {"stage": stage} | data.protocol)
        _bits(codes[data.name], name=data.name, tokenizer=last, result=result, of=of)
    for classes in classified:
        of = Measurement(f"{classes.name}_classification", config.seed, {"stage": stage})
        result.scores.extend(_classification_rows(classes, last, probe=part.probe, of=of))
    return result


def _load(folder: Path) -> QLIPImages:
    model, processor = qlip.load(folder)
    return QLIPImages(model.to(device()), processor)  # type: ignore[arg-type]


def _lpips(config: PerceptualConfig) -> PerceptualDistance | None:
    """LPIPS on this machine's accelerator, if its files are given."""
    if not (config.backbone or config.heads):
        return None
    return build_perceptual_distance(backbone=config.backbone, heads=config.heads).to(device())


def _size_row(tokenizer: ImageTokenizer, *, n: int, of: Measurement) -> Score:
    """How many bits the codes of an image take."""
    size, bits = tokenizer.image_size, tokenizer.num_bits * tokenizer.num_codes
    note = f"{tokenizer.num_codes:,} codes of {tokenizer.num_bits} bits, 1/{24 * size**2 / bits:.4g} of the pixels'"
    return of.score("bits_per_image", bits, n=n, higher_is_better=False, note=note)


def _quality_rows(
    rebuilt_NHWC: NDArray,
    *,
    data: HeldOut,
    paper: Mapping[str, float],
    features: FeatureNetwork,
    distance: PerceptualDistance | None,
    of: Measurement,
) -> list[Score]:
    found = quality(rebuilt_NHWC, originals_NHWC=data.images, distance=distance, label=f"compare {of.task}")
    common: dict[str, Any] = {"skipped": data.num_skipped, "note": "mean over images, as uint8"}
    rows = [
        of.with_protocol(**PSNR_PROTOCOL).mean("psnr", found.psnr, unit="dB", paper=paper.get("psnr"), **common),
        of.with_protocol(**SSIM_PROTOCOL).mean("ssim", found.ssim, paper=paper.get("ssim"), **common),
    ]
    if distance:
        named = of.with_protocol(**LPIPS_PROTOCOL, network=distance.name, weights_sha256=weights_sha256(distance))
        rows.append(named.score("lpips", found.lpips, n=len(data.images), higher_is_better=False, **common))
    else:
        note = "needs VGG-16's weights and LPIPS's heads; set tokenizer.perceptual.backbone and .heads to the two files"
        rows.append(of.missing("lpips", note=note, higher_is_better=False))
    rows += frechet_rows(
        rebuilt_NHWC, originals_NHWC=data.images, features=features, fid="rfid", paper=dict(paper), of=of
    )
    if data.has_checker:
        note = "the reconstruction's caption, read off its pixels, is the original's"
        rows.append(read_back_row(rebuilt_NHWC, captions=data.full_captions, note=note, of=of))
    return rows


def _bits(codes_NP: Any, *, name: str, tokenizer: QLIPImages, result: PartResult, of: Measurement) -> None:
    report = bit_report(codes_NP, num_bits=tokenizer.num_bits, draw=tokenizer.decode)
    result.scores.extend(bit_scores(report, n=len(codes_NP), of=of))
    kept = {"entropy": report.entropy_L, "correlation": report.correlation_LL, "flip": report.flip_L}
    result.samples["bits"][name] = {key: values.round(4).tolist() for key, values in kept.items()}
    result.images[f"{name}_flipped"] = report.flipped_KHWC


def _classification_rows(
    classes: Classes, tokenizer: QLIPImages, *, probe: ProbeConfig, of: Measurement
) -> list[Score]:
    """Zero-shot accuracy on `val`, and linear probes fitted on `train`."""
    towers = tokenizer._asdict()
    rows = [zero_shot_score(classes.val, class_names=classes.names, templates=classes.templates, of=of, **towers)]
    if classes.train is None:
        return rows + [of.missing(f"probe_{name}", note=classes.note, unit="%") for name in PROBE_FEATURES]
    return rows + probe_scores(
        classes.train, val=classes.val, num_classes=len(classes.names), config=probe, of=of, **towers
    )


def _digits(size: int) -> Classes:
    def part(split: Split) -> LabelledImages:
        source = DigitsSource(size=size, split=split)
        images = np.stack([source[index].image_HWC for index in range(len(source))])
        return LabelledImages(images, source.labels, f"scikit-learn's digits, {split}")

    return Classes("digits", part("val"), part("train"), list(DigitsSource.class_names), list(captions_of("{}")))


def _folder(own: LabelledConfig, *, size: int) -> Classes:
    """A folder of the user's with val, and with train if there is to be a probe.

    Raises:
        UserError: no images in it, train and val of different classes, or names or templates that do not fit.
    """
    root = Path(own.path)
    if own.label_column:
        return _labelled_source(own, size=size)
    val = LabelledFolder(root / "val", size=size, label=f"{own.name} val")
    names, templates = read_class_names(own.class_names, classes=val.classes), read_templates(own.templates)
    if not (root / "train").is_dir():
        return Classes(
            own.name, val, None, names, templates, note=f"needs {root}/train with a folder of images per class"
        )
    train = LabelledFolder(root / "train", size=size, label=f"{own.name} train")
    if train.classes != val.classes:
        other = sorted(set(train.classes) ^ set(val.classes))[0]
        raise UserError(f"{root}: train and val hold different classes ('{other}' is in one only)")
    return Classes(own.name, val, train, names, templates)


def _labelled_source(own: LabelledConfig, *, size: int) -> Classes:
    """A table, WebDataset or hub set with a column of classes; without a train part there is no probe.

    Raises:
        UserError: it cannot be opened, has fewer than two classes, or names or templates that do not fit.
    """
    config = ImageSourceConfig(name=own.name, path=own.path, caption_column=own.label_column)

    def part(split: Split) -> LabelledSource:
        source = open_image_source(config, split=split, size=size, seed=0, classes=True)
        if not isinstance(source, OwnImages):
            raise UserError(f"tokenizer.classification '{own.name}': {own.path} has no classes")
        return LabelledSource(source, label=f"{own.name} {split}")

    val, train, note = part("val"), None, ""
    try:
        train = part("train")
    except UserError as error:
        note = f"no train part: {error}"
    classes = ordered_classes(val.found | (train.found if train else set()))
    if len(classes) < 2:
        raise UserError(f"{own.path}: column '{own.label_column}' holds {len(classes)} classes; it needs two or more")
    for labelled in (val, train):
        if labelled is not None:
            labelled.number_of = {name: number for number, name in enumerate(classes)}
    names, templates = read_class_names(own.class_names, classes=classes), read_templates(own.templates)
    return Classes(own.name, val, train, names, templates, note=note)
