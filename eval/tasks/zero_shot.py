"""Retrieval and zero-shot classification with a tokenizer's image and text towers.

Shapes: N images, T texts, K classes, D feature dimensions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from eval.metrics.clipscore import no_text_note
from eval.paper_values import QLIP_B_16
from eval.scores import Measurement, Score
from eval.tasks.classification_data import ClassificationTask
from tokenizer.images import embed_images, embed_texts
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.files import short_hash

GALLERY = 100


def retrieval_scores(
    images_NHWC: NDArray,
    *,
    captions: Sequence[str],
    model: QLIPModel,
    processor: QLIPProcessor,
    of: Measurement,
    gallery: int = GALLERY,
) -> list[Score]:
    """Share of images whose own caption is the nearest of `gallery` distinct captions, and the share of captions.

    Images are taken in order into galleries. Images with an empty caption, and those of an incomplete gallery, are
    skipped and counted. Without a text tokenizer, or with too few distinct captions, the rows have no value.
    """
    of = of.with_protocol(gallery=gallery, captions="full, distinct", captions_sha256=short_hash(captions))
    groups = distinct_groups(captions, size=gallery)
    note = no_text_note(processor)
    if not groups:
        note = f"{len({*captions} - {''})} distinct captions among {len(captions)} images; a gallery needs {gallery}"
    if note:
        return [of.missing(metric, note=note, unit="%") for metric in ("image_to_text", "text_to_image")]
    hits: dict[str, list[bool]] = {"image_to_text": [], "text_to_image": []}
    for group in groups:
        images_ND = embed_images(images_NHWC[group], model=model, processor=processor)
        texts_TD = embed_texts([captions[i] for i in group], model=model, processor=processor)
        similarity_NT = images_ND @ texts_TD.T
        hits["image_to_text"] += (similarity_NT.argmax(dim=1) == torch.arange(gallery)).tolist()
        hits["text_to_image"] += (similarity_NT.argmax(dim=0) == torch.arange(gallery)).tolist()
    skipped, note = len(captions) - len(hits["image_to_text"]), f"chance is 1 in {gallery}"
    return [of.mean(metric, values, skipped=skipped, unit="%", note=note) for metric, values in hits.items()]


def distinct_groups(captions: Sequence[str], *, size: int) -> list[list[int]]:
    """Indices in order, in groups of `size` distinct captions: a repeated one moves on, an empty one is in none."""
    groups, waiting = list[list[int]](), [index for index, caption in enumerate(captions) if caption]
    while len(first := sorted({captions[index]: index for index in reversed(waiting)}.values())) >= size:
        groups.append(first[:size])
        waiting = sorted({*waiting} - {*groups[-1]})
    return groups


def zero_shot_score(task: ClassificationTask, *, model: QLIPModel, processor: QLIPProcessor, of: Measurement) -> Score:
    """Accuracy of the nearest class on val; a class is the normalised mean of its embedded templates (as in CLIP)."""
    paper = QLIP_B_16["zero_shot"]
    if note := no_text_note(processor):
        return of.missing("zero_shot", note=note, unit="%", paper=paper)
    classes = []
    for name in task.class_names:
        prompts = [template.format(name) for template in task.templates]
        classes.append(F.normalize(embed_texts(prompts, model=model, processor=processor).mean(0), dim=0))
    classes_KD, hits = torch.stack(classes), list[bool]()
    for images_NHWC, labels in task.val.batches():
        nearest_N = (embed_images(images_NHWC, model=model, processor=processor) @ classes_KD.T).argmax(dim=1)
        hits += (nearest_N == torch.as_tensor(labels)).tolist()
    of = of.with_protocol(templates=task.templates, classes=task.class_names, images=len(hits), data=task.val.identity)
    note = f"chance is 1 in {len(task.class_names)}"
    return of.mean("zero_shot", hits, skipped=task.val.skipped, unit="%", paper=paper, note=note)
