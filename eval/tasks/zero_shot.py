"""Retrieval and zero-shot classification with a tokenizer's image and text towers.

Shapes: N images, T texts, K classes, D feature dimensions.
"""

from collections.abc import Sequence
from typing import Any

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

    Images are taken in order into galleries of distinct captions. Images with an empty caption, and those of an
    incomplete gallery, are skipped and counted. Without a text tokenizer, or with fewer distinct captions than one
    gallery needs, the rows have no value.
    """
    of = of.with_protocol(gallery=gallery, captions="full, distinct", captions_sha256=short_hash(captions))
    groups = distinct_groups(captions, size=gallery)
    note = no_text_note(processor)
    if not groups:
        note = f"{len({*captions} - {''})} distinct captions among {len(captions)} images; a gallery needs {gallery}"
    if note:
        return [of.missing(metric, note=note, unit="%") for metric in ("image_to_text", "text_to_image")]
    hits_image, hits_text = list[bool](), list[bool]()
    for group in groups:
        images_ND = embed_images(images_NHWC[group], model=model, processor=processor)
        texts_TD = embed_texts([captions[i] for i in group], model=model, processor=processor)
        similarity_NT = images_ND @ texts_TD.T
        expected = torch.arange(gallery)
        hits_image += (similarity_NT.argmax(dim=1) == expected).tolist()
        hits_text += (similarity_NT.argmax(dim=0) == expected).tolist()
    common: dict[str, Any] = {"skipped": len(captions) - len(hits_image), "unit": "%"}
    return [
        of.mean("image_to_text", hits_image, note=f"chance is 1 in {gallery}", **common),
        of.mean("text_to_image", hits_text, note=f"chance is 1 in {gallery}", **common),
    ]


def distinct_groups(captions: Sequence[str], *, size: int) -> list[list[int]]:
    """Indices in order, in groups of `size` distinct captions.

    A repeated caption moves to the next group; an empty one is in none.
    """
    groups: list[list[int]] = []
    waiting = [index for index, caption in enumerate(captions) if caption]
    while True:
        chosen: dict[str, int] = {}
        for index in waiting:
            if len(chosen) < size:
                chosen.setdefault(captions[index], index)
        if len(chosen) < size:
            return groups
        groups.append(list(chosen.values()))
        used = set(groups[-1])
        waiting = [index for index in waiting if index not in used]


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
