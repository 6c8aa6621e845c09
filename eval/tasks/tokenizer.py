"""The tokenizer part of `make eval`: QLIP after each stage, and external tokenizers for comparison.

Shapes: N images, H height, W width, P patches.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

import tokenizer as qlip
from data_mix.sources.files import source_kind
from eval.config import EvalConfig
from eval.metrics.code_statistics import MAX_IMAGES, code_scores, code_statistics
from eval.metrics.features import FeatureNetwork, frechet_rows, open_features, weights_sha256
from eval.metrics.reconstruction import COMMON, LPIPS_PROTOCOL, PSNR_PROTOCOL, SSIM_PROTOCOL, WINDOW, quality, seams
from eval.paper_values import QLIP_B_16, STAGE_1
from eval.scores import SHOWN_IMAGES, Measurement, PartResult, Score
from eval.tasks.classification_data import digits_task, open_classification
from eval.tasks.generation import read_back_row
from eval.tasks.linear_probe import probe_scores
from eval.tasks.validation_data import ValidationImages, validation_images
from eval.tasks.zero_shot import retrieval_scores, zero_shot_score
from tokenizer.images import ImageTokenizer, QLIPImages, decode_codes, encode_images, open_external_tokenizer
from tokenizer.losses import PerceptualDistance, build_perceptual_distance
from um3.core.distributed import device


def evaluate_tokenizers(config: EvalConfig, *, stages: Mapping[str, Path]) -> PartResult:
    """Reconstruction by every tokenizer; retrieval, code statistics and classification by the last stage's.

    Everything that may fail is opened before the first measurement: UserError if a tokenizer, a classification data
    set or a weights file cannot be used.
    """
    part = config.tokenizer
    external = {
        name: open_external_tokenizer(target, setting=f"tokenizer.external: {name}", min_image_size=WINDOW)
        for name, target in part.external.items()
    }
    qlips = {stage: _load(folder) for stage, folder in stages.items()}
    stage, last = list(qlips.items())[-1]
    has_digits = part.digits and any(source_kind(source) in ("scenes", "digits") for source in config.images)
    classification = [digits_task(size=last.image_size)] if has_digits else []
    classification += [open_classification(data, size=last.image_size) for data in part.classification]
    lpips, distance = part.perceptual, None
    if lpips.backbone or lpips.heads:
        distance = build_perceptual_distance(backbone=lpips.backbone, heads=lpips.heads).to(device())
    features = open_features(config.fid_features, **last._asdict(), inception_weights=config.inception_weights)
    # The last stage comes last, so that its codes and its originals are kept.
    tokenizers: dict[str, ImageTokenizer] = {**external, **qlips}
    result, codes = PartResult([], {"stages": list(tokenizers), "bits": {}}, {}), dict[str, Tensor]()

    @functools.lru_cache(maxsize=1)
    def validation(size: int) -> list[ValidationImages]:
        options: dict[str, Any] = {"num_images": part.num_images, "size": size, "seed": config.seed}
        return [validation_images(source, **options) for source in config.images]

    for name, measured in tokenizers.items():
        for data in validation(measured.image_size):
            codes_NP = encode_images(measured, data.images, label=f"encode {name} {data.name}")
            rebuilt_NHWC = decode_codes(measured, codes_NP, label=f"decode {name} {data.name}")
            of = Measurement(f"{data.name}_reconstruction_{name}", config.seed, data.protocol)
            paper = {} if name in external else STAGE_1 if name == "stage1" else QLIP_B_16
            networks: dict[str, Any] = {"features": features, "distance": distance}
            result.scores.append(_size_row(measured, n=len(data.images), of=of))
            result.scores.extend(_quality_rows(rebuilt_NHWC, data=data, paper=paper, of=of, **networks))
            if isinstance(measured, QLIPImages):
                result.scores.append(_seams_row(rebuilt_NHWC, data=data, tokenizer=measured, of=of))
            codes[data.name] = codes_NP[:MAX_IMAGES].clone()
            # Scenes of another size are other scenes than the stored originals.
            if measured.image_size == last.image_size or not data.has_checker:
                result.images[f"{data.name}_{name}"] = rebuilt_NHWC[:SHOWN_IMAGES]
            result.images[f"{data.name}_original"] = data.images[:SHOWN_IMAGES]
    for data in validation(last.image_size):
        of = Measurement(f"{data.name}_retrieval", config.seed, {"stage": stage})
        result.scores.extend(retrieval_scores(data.images, captions=data.full_captions, of=of, **last._asdict()))
        of = Measurement(f"{data.name}_bits", config.seed, {"stage": stage} | data.protocol)
        _add_code_statistics(codes[data.name], name=data.name, tokenizer=last, result=result, of=of)
    for task in classification:
        of = Measurement(f"{task.name}_classification", config.seed, {"stage": stage})
        result.scores.append(zero_shot_score(task, of=of, **last._asdict()))
        result.scores.extend(probe_scores(task, config=part.probe, of=of, **last._asdict()))
    return result


def _load(folder: Path) -> QLIPImages:
    model, processor = qlip.load(folder)
    return QLIPImages(model.to(device()), processor)  # type: ignore[arg-type]


def _size_row(tokenizer: ImageTokenizer, *, n: int, of: Measurement) -> Score:
    """The size of an image's codes in bits."""
    size, bits = tokenizer.image_size, tokenizer.num_bits * tokenizer.num_codes
    note = f"{tokenizer.num_codes:,} codes of {tokenizer.num_bits} bits, 1/{24 * size**2 / bits:.4g} of the pixels"
    return of.score("bits_per_image", bits, n=n, higher_is_better=False, note=note)


def _quality_rows(
    rebuilt_NHWC: NDArray,
    *,
    data: ValidationImages,
    paper: Mapping[str, float],
    features: FeatureNetwork,
    distance: PerceptualDistance | None,
    of: Measurement,
) -> list[Score]:
    values = quality(rebuilt_NHWC, originals_NHWC=data.images, distance=distance, label=f"compare {of.task}")
    common: dict[str, Any] = {"skipped": data.num_skipped, "note": "mean over images, as uint8"}
    rows = [
        of.with_protocol(**PSNR_PROTOCOL).mean("psnr", values.psnr, unit="dB", paper=paper.get("psnr"), **common),
        of.with_protocol(**SSIM_PROTOCOL).mean("ssim", values.ssim, paper=paper.get("ssim"), **common),
    ]
    if distance:
        lpips = of.with_protocol(**LPIPS_PROTOCOL, network=distance.name, weights_sha256=weights_sha256(distance))
        rows.append(lpips.score("lpips", values.lpips, n=len(data.images), higher_is_better=False, **common))
    else:
        note = "needs VGG-16's weights and LPIPS's heads; set tokenizer.perceptual.backbone and .heads to the two files"
        rows.append(of.missing("lpips", note=note, higher_is_better=False))
    rows += frechet_rows(rebuilt_NHWC, originals_NHWC=data.images, features=features, fid="rfid", paper=paper, of=of)
    if data.has_checker:
        note = "the caption read from the reconstruction's pixels equals the original's"
        rows.append(read_back_row(rebuilt_NHWC, captions=data.full_captions, note=note, of=of))
    return rows


def _seams_row(rebuilt_NHWC: NDArray, *, data: ValidationImages, tokenizer: QLIPImages, of: Measurement) -> Score:
    patch_size = tokenizer.model.config.decoder_tower.patch_size
    value = seams(rebuilt_NHWC, originals_NHWC=data.images, patch_size=patch_size)
    note = "jumps of the error between patches / within patches: 1 without a grid"
    of = of.with_protocol(**COMMON, patch_size=patch_size)
    return of.score("seams", value, n=len(data.images), higher_is_better=False, skipped=data.num_skipped, note=note)


def _add_code_statistics(
    codes_NP: Tensor, *, name: str, tokenizer: QLIPImages, result: PartResult, of: Measurement
) -> None:
    statistics = code_statistics(codes_NP, num_bits=tokenizer.num_bits, decode=tokenizer.decode)
    result.scores.extend(code_scores(statistics, n=len(codes_NP), of=of))
    by_bit = {"entropy": statistics.entropy_L, "correlation": statistics.correlation_LL, "flip": statistics.flip_L}
    result.samples["bits"][name] = {key: values.round(4).tolist() for key, values in by_bit.items()}
    result.images[f"{name}_flipped"] = statistics.flipped_KHWC
