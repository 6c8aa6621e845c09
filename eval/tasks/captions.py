"""The captions part of `make eval`: greedy captions of validation images of every source."""

from typing import Any

from eval.config import EvalConfig
from eval.metrics.captions import EXACT_MATCHES, caption_scores, other_images_row
from eval.scores import SHOWN_IMAGES, Measurement, PartResult
from eval.tasks.validation_data import validation_images
from um3.core.errors import UserError
from um3.inference.image_pipeline import ImagePipeline
from um3.inference.pipeline import UM3Pipeline


def evaluate_captions(config: EvalConfig, *, pipeline: ImagePipeline) -> PartResult:
    """Caption metrics of each image source with captions; UserError if one has too few images, or METEOR failed."""
    if not isinstance(pipeline, UM3Pipeline):
        raise UserError(f"{pipeline.name} generates images only; captions need a UM3: remove captions from `parts`")
    part, result, size = config.captions, PartResult([], {}, {}), pipeline.processor.image_size
    of = Measurement("", config.seed, {"decoding": "greedy", "max_new_tokens": part.max_new_tokens})
    for source in config.captioned:
        data = validation_images(source, num_images=part.num_images, size=size, seed=config.seed)
        captions = pipeline.caption(data.images, max_new_tokens=part.max_new_tokens, batch_size=part.batch_size)
        options: dict[str, Any] = {"skipped": data.num_skipped, "meteor": part.meteor}
        of = of.named(f"{data.name}_captions")
        rows = caption_scores(captions, references=data.captions, of=of, **options)
        rows.append(other_images_row(captions, references=data.captions, of=of))
        # A description in free words is never the reference to the word, however right it is.
        result.scores.extend(row for row in rows if data.repeats_captions or row.metric not in EXACT_MATCHES)
        result.samples[data.name] = [
            {"caption": caption, "references": list(references)}
            | ({"right": caption == references[0]} if data.repeats_captions else {})
            for caption, references in list(zip(captions, data.captions, strict=True))[:SHOWN_IMAGES]
        ]
        result.images[data.name] = data.images[:SHOWN_IMAGES]
    return result
