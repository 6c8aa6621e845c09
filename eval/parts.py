"""The four parts of an evaluation: what is measured, and what is kept to look at.

Shapes: N images, H height, W width.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import tokenizer as qlip
from data_mix.digits import DigitsSource, captions_of
from data_mix.samples import Split
from data_mix.scene_prompts import evaluation_prompts
from eval.bits import MAX_IMAGES, BitReport, bit_report, bit_scores
from eval.captions import caption_scores
from eval.clipscore import Clip, load_clip
from eval.config import EvalConfig, LabelledConfig
from eval.features import FeatureNetwork, open_features
from eval.generation import (
    distribution_scores,
    draw,
    frechet_rows,
    judge,
    missing_skills,
    read_back_row,
    skill_scores,
)
from eval.held_out import HeldOut, held_out_documents, held_out_images
from eval.labelled import LabelledFolder, LabelledImages, read_class_names, read_templates
from eval.language import language_scores
from eval.paper import QLIP_B_16, STAGE_1
from eval.reconstruction import mean_quality
from eval.scores import Measurement, Score
from eval.zero_shot import PROBE_FEATURES, probe_scores, retrieval_scores, zero_shot_score
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.progress import Progress
from um3.pipeline import UM3Pipeline

KEPT = 64  # images of each kind that are kept for the report
BATCH = 64


class PartResult(NamedTuple):
    """The rows, JSON-ready samples, and uint8 image arrays (N, H, W, 3) by name."""

    scores: list[Score]
    samples: dict[str, Any]
    images: dict[str, NDArray]


def language(config: EvalConfig, *, pipeline: UM3Pipeline, folder: Path) -> PartResult:
    """Cloze, perplexity, and the paper's tasks where local copies are."""
    part = config.language
    scores, samples = language_scores(
        pipeline,
        documents=held_out_documents(config.texts, seed=config.seed),
        folder=folder,
        seed=config.seed,
        num_items=part.num_items,
        num_documents=part.num_documents,
        benchmarks=part.benchmarks,
        limit=part.limit,
        max_tokens=part.max_tokens,
        batch_size=part.batch_size,
    )
    return PartResult(scores, {"cloze": samples}, {})


def captions(config: EvalConfig, *, pipeline: UM3Pipeline) -> PartResult:
    """Greedy captions of held-out images of every source."""
    part, result = config.captions, PartResult([], {}, {})
    for data in _held_out(config, num_images=part.num_images, size=pipeline.processor.image_size):
        written = pipeline.caption(data.images, max_new_tokens=part.max_new_tokens, batch_size=part.batch_size)
        protocol = {"decoding": "greedy", "max_new_tokens": part.max_new_tokens}
        result.scores.extend(
            caption_scores(
                written,
                references=data.captions,
                of=Measurement(f"{data.name}_captions", config.seed, protocol),
                skipped=data.num_skipped,
                meteor=part.meteor,
            )
        )
        result.samples[data.name] = [
            {"caption": caption, "references": list(given), "right": caption == given[0]}
            for caption, given in list(zip(written, data.captions, strict=True))[:KEPT]
        ]
        result.images[data.name] = data.images[:KEPT]
    return result


def generation(config: EvalConfig, *, pipeline: UM3Pipeline) -> PartResult:
    """Drawings for held-out captions of every source, and for the prompts of the six skills."""
    # What may be missing is opened first, before hours of drawing.
    features = _features(config, model=pipeline.qlip, processor=pipeline.processor)
    clip = load_clip(config.generation.clip) if config.generation.clip else None
    result = PartResult([], {"captions": {}, "skills": []}, {})
    sources = _held_out(config, num_images=config.generation.num_images, size=pipeline.processor.image_size)
    for data in sources:
        _draw_captions(config, data=data, pipeline=pipeline, features=features, clip=clip, result=result)
    if any(data.has_checker for data in sources):
        _draw_skills(config, pipeline=pipeline, result=result)
    else:
        result.scores.extend(missing_skills(Measurement("skills", config.seed)))
    return result


def _draw_captions(
    config: EvalConfig,
    *,
    data: HeldOut,
    pipeline: UM3Pipeline,
    features: FeatureNetwork,
    clip: Clip | None,
    result: PartResult,
) -> None:
    part, prompts = config.generation, data.full_captions
    drawings = draw(pipeline, prompts=prompts, seed=config.seed, sampling=part.sampling)
    images = np.stack([drawing.image for drawing in drawings])
    of = Measurement(f"{data.name}_generation", config.seed, part.sampling.protocol())
    result.scores.extend(
        distribution_scores(
            images,
            originals_NHWC=data.images,
            captions=prompts,
            pipeline=pipeline,
            features=features,
            clip=clip,
            of=of,
        )
    )
    if data.has_checker:
        note = "the drawing's caption, read off its pixels, is the prompt"
        result.scores.append(read_back_row(images, captions=prompts, note=note, of=of))
    result.samples["captions"][data.name] = [drawing.to_dict() for drawing in drawings[:KEPT]]
    result.images[f"{data.name}_drawn"] = images[:KEPT]
    result.images[f"{data.name}_real"] = data.images[:KEPT]


def _draw_skills(config: EvalConfig, *, pipeline: UM3Pipeline, result: PartResult) -> None:
    part = config.generation
    prompts = evaluation_prompts(per_skill=part.per_skill, seed=config.seed)
    drawings = draw(pipeline, prompts=[each.prompt for each in prompts], seed=config.seed, sampling=part.sampling)
    verdicts = judge([drawing.image for drawing in drawings], prompts=prompts)
    of = Measurement("skills", config.seed, part.sampling.protocol())
    result.scores.extend(skill_scores(verdicts, prompts=prompts, of=of))
    result.samples["skills"] = [
        drawing.to_dict() | {"skill": prompt.skill, "passed": verdict.passed, "demands_met": verdict.demands_met}
        for drawing, prompt, verdict in zip(drawings, prompts, verdicts, strict=True)
    ]
    result.images["skills"] = np.stack([drawing.image for drawing in drawings])


def tokenizer(config: EvalConfig, *, stages: Mapping[str, Path]) -> PartResult:
    """Reconstruction by every stage's tokenizer; retrieval and classification by the last."""
    result = PartResult([], {"stages": list(stages), "bits": {}}, {})
    held_out = functools.cache(lambda size: _held_out(config, num_images=config.tokenizer.num_images, size=size))
    for stage, folder in stages.items():
        model, processor = qlip.load(folder)
        model.to(device())  # type: ignore[arg-type]
        features = _features(config, model=model, processor=processor)
        for data in held_out(processor.image_size):
            rebuilt = reconstruct(data.images, model=model, processor=processor, label=f"{stage} {data.name}")
            of = Measurement(f"{data.name}_reconstruction_{stage}", config.seed)
            result.scores.extend(_reconstruction_rows(rebuilt, data=data, stage=stage, features=features, of=of))
            result.images[f"{data.name}_{stage}"] = rebuilt[:KEPT]
            result.images[f"{data.name}_original"] = data.images[:KEPT]
    towers: dict[str, Any] = {"model": model, "processor": processor}
    for data in held_out(processor.image_size):
        of = Measurement(f"{data.name}_retrieval", config.seed, {"stage": stage})
        result.scores.extend(retrieval_scores(data.images, captions=data.full_captions, of=of, **towers))
        report = _bits(data.images[:MAX_IMAGES], **towers)
        result.scores.extend(bit_scores(report, n=min(len(data.images), MAX_IMAGES), of=of.named(f"{data.name}_bits")))
        kept = {"entropy": report.entropy_L, "correlation": report.correlation_LL, "flip": report.flip_L}
        result.samples["bits"][data.name] = {name: values.round(4).tolist() for name, values in kept.items()}
        result.images[f"{data.name}_flipped"] = report.flipped_KHWC
    if config.tokenizer.labelled:
        of = Measurement("digits_classification", config.seed, {"stage": stage})
        result.scores.extend(_digit_rows(of=of, **towers))
    for own in config.tokenizer.classification:
        of = Measurement(f"{own.name}_classification", config.seed, {"stage": stage})
        result.scores.extend(_folder_rows(own, of=of, **towers))
    return result


@torch.inference_mode()
def reconstruct(images_NHWC: NDArray, *, model: QLIPModel, processor: QLIPProcessor, label: str) -> NDArray:
    """uint8 images -> codes -> uint8 images (N, H, W, 3)."""
    progress, rebuilt = Progress(len(images_NHWC), label=f"reconstruct {label}"), []
    for start in range(0, len(images_NHWC), BATCH):
        batch = images_NHWC[start : start + BATCH]
        codes_BN = model.encode(processor.pixels(batch).to(model.device, model.dtype))
        rebuilt.append(processor.images(model.decode(codes_BN)))
        progress.advance(len(batch))
    return np.concatenate(rebuilt)


@torch.inference_mode()
def _bits(images_NHWC: NDArray, *, model: QLIPModel, processor: QLIPProcessor) -> BitReport:
    pixels = (processor.pixels(images_NHWC[start : start + BATCH]) for start in range(0, len(images_NHWC), BATCH))
    codes_NP = torch.cat([model.encode(batch.to(model.device, model.dtype)).cpu() for batch in pixels])
    return bit_report(
        codes_NP,
        num_bits=model.num_bits,
        draw=lambda codes_BP: processor.images(model.decode(codes_BP.to(model.device))),
    )


def _reconstruction_rows(
    rebuilt_NHWC: NDArray, *, data: HeldOut, stage: str, features: FeatureNetwork, of: Measurement
) -> list[Score]:
    paper = STAGE_1 if stage == "stage1" else QLIP_B_16
    means = mean_quality(rebuilt_NHWC, originals_NHWC=data.images)
    common: dict[str, Any] = {"n": len(data.images), "skipped": data.num_skipped, "note": "mean over images, as uint8"}
    rows = [
        of.score("psnr", means.psnr, unit="dB", paper=paper["psnr"], **common),
        of.score("ssim", means.ssim, paper=paper.get("ssim"), **common),
        *frechet_rows(rebuilt_NHWC, originals_NHWC=data.images, features=features, fid="rfid", paper=paper, of=of),
    ]
    if data.has_checker:
        note = "the reconstruction's caption, read off its pixels, is the original's"
        rows.append(read_back_row(rebuilt_NHWC, captions=data.full_captions, note=note, of=of))
    return rows


def _digit_rows(*, model: QLIPModel, processor: QLIPProcessor, of: Measurement) -> list[Score]:
    """Zero-shot accuracy and linear probe on the digits."""
    train, val = (_digits(size=processor.image_size, split=split) for split in ("train", "val"))
    names, templates = DigitsSource.class_names, captions_of("{}")
    zero_shot = zero_shot_score(val, class_names=names, templates=templates, model=model, processor=processor, of=of)
    probe = probe_scores(train, val=val, num_classes=len(names), model=model, processor=processor, of=of)
    return [zero_shot, *probe]


def _folder_rows(folder: LabelledConfig, *, model: QLIPModel, processor: QLIPProcessor, of: Measurement) -> list[Score]:
    """Zero-shot accuracy on a folder's val, and a linear probe if it has a train of the same classes.

    Raises:
        UserError: no images in it, or train and val of different classes.
    """
    root, towers = Path(folder.path), dict[str, Any](model=model, processor=processor)
    val = LabelledFolder(root / "val", size=processor.image_size, label=f"{folder.name} val")
    names, sentences = read_class_names(folder.class_names, classes=val.classes), read_templates(folder.templates)
    rows = [zero_shot_score(val, class_names=names, templates=sentences, of=of, **towers)]
    if not (root / "train").is_dir():
        note = f"needs {root}/train with a folder of images per class"
        return rows + [of.missing(f"probe_{name}", note=note, unit="%") for name in PROBE_FEATURES]
    train = LabelledFolder(root / "train", size=processor.image_size, label=f"{folder.name} train")
    if train.classes != val.classes:
        other = sorted(set(train.classes) ^ set(val.classes))[0]
        raise UserError(f"{root}: train and val hold different classes ('{other}' is in one only)")
    return rows + probe_scores(train, val=val, num_classes=len(names), of=of, **towers)


def _digits(*, size: int, split: Split) -> LabelledImages:
    source = DigitsSource(size=size, split=split)
    return LabelledImages(np.stack([source[index].image_HWC for index in range(len(source))]), source.labels)


def _held_out(config: EvalConfig, *, num_images: int, size: int) -> list[HeldOut]:
    return [held_out_images(source, num_images=num_images, size=size, seed=config.seed) for source in config.images]


def _features(config: EvalConfig, *, model: QLIPModel, processor: QLIPProcessor) -> FeatureNetwork:
    weights = config.inception_weights
    return open_features(config.features, model=model, processor=processor, inception_weights=weights)
