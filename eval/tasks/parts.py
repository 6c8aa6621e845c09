"""The three parts that measure the unified model: what is measured, and what is kept to look at.

Shapes: N images, H height, W width.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_mix.demo.scene_prompts import evaluation_prompts
from eval.config import EvalConfig
from eval.journal import Journal
from eval.metrics.captions import caption_scores
from eval.metrics.clipscore import Clip, load_clip
from eval.metrics.features import FeatureNetwork, open_features
from eval.scores import Measurement, Score
from eval.tasks.generation import (
    distribution_scores,
    draw,
    judge,
    missing_skills,
    read_back_row,
    skill_scores,
)
from eval.tasks.language import check_data, language_scores
from eval.tasks.validation_data import HeldOut, held_out_documents, held_out_images
from um3.inference.pipeline import UM3Pipeline

KEPT = 64  # images of each kind that are kept for the report


class PartResult(NamedTuple):
    """The rows, JSON-ready samples, and uint8 image arrays (N, H, W, 3) by name."""

    scores: list[Score]
    samples: dict[str, Any]
    images: dict[str, NDArray]


def language(config: EvalConfig, *, model: str, folder: Path, request: str) -> PartResult:
    """The paper's tasks where local copies are, cloze and perplexity where there is held-out text.

    `model` is any causal language model. What is finished is kept in `folder` until the last score is known.
    """
    from eval.lm import UM3LM, load_language_model

    part = config.language
    documents = held_out_documents(config.texts, seed=config.seed) if config.texts else []
    check_data(part.benchmarks, documents=documents)
    loaded, tokenizer = load_language_model(model)
    journal = Journal(folder / "language.journal", request=request)
    lm = UM3LM.of(loaded, tokenizer=tokenizer, batch_size=part.batch_size, max_tokens=part.max_tokens, journal=journal)
    result = language_scores(
        lm,
        documents=documents,
        folder=folder,
        seed=config.seed,
        num_items=part.num_items,
        num_documents=part.num_documents,
        benchmarks=part.benchmarks,
        limit=part.limit,
    )
    journal.remove()
    return PartResult(result.scores, {"cloze": result.cloze, "prompts": result.prompts}, {})


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
    features = open_features(
        config.fid_features,
        model=pipeline.qlip,
        processor=pipeline.processor,
        inception_weights=config.inception_weights,
    )
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


def _held_out(config: EvalConfig, *, num_images: int, size: int) -> list[HeldOut]:
    return [held_out_images(source, num_images=num_images, size=size, seed=config.seed) for source in config.captioned]
