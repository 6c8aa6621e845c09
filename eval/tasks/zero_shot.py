"""What a tokenizer's towers know of images and texts: retrieval, and zero-shot classification.

Shapes: N images, T texts, K classes, D feature dimensions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.clipscore import no_text_note
from eval.paper_values import QLIP_B_16
from eval.scores import Measurement, Score, texts_sha256
from eval.tasks.classification_data import Labelled
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor

GALLERY = 100
BATCH = 256


@torch.no_grad()
def image_embeddings(images_NHWC: NDArray, *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """l2-normalised image embeddings (N, D), float32."""
    batches = [images_NHWC[start : start + BATCH] for start in range(0, len(images_NHWC), BATCH)]
    pixels = (processor.pixels(batch).to(model.device, model.dtype) for batch in batches)
    return torch.cat([model.get_image_features(batch).float().cpu() for batch in pixels])


@torch.no_grad()
def text_embeddings(texts: Sequence[str], *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """l2-normalised text embeddings (T, D), float32."""
    found = []
    for start in range(0, len(texts), BATCH):
        inputs = {name: ids.to(model.device) for name, ids in processor.text(texts[start : start + BATCH]).items()}
        found.append(model.get_text_features(**inputs).float().cpu())
    return torch.cat(found)


def retrieval_scores(
    images_NHWC: NDArray,
    *,
    captions: Sequence[str],
    model: QLIPModel,
    processor: QLIPProcessor,
    of: Measurement,
    gallery: int = GALLERY,
) -> list[Score]:
    """Share of images whose own caption is the nearest of `gallery` distinct ones, and of captions whose image is.

    Images are taken in order into galleries of distinct captions; those that complete none, and those whose caption is
    empty, are counted as skipped.

    Without text tokenizer or with fewer distinct captions than one gallery needs the rows have no value.
    """
    of = of.with_protocol(gallery=gallery, captions="full, distinct", captions_sha256=texts_sha256(captions))
    groups = distinct_groups(captions, size=gallery)
    note = no_text_note(processor)
    if not groups:
        note = f"{len({*captions} - {''})} distinct captions among {len(captions)} images; a gallery needs {gallery}"
    if note:
        return [of.missing(metric, note=note, unit="%") for metric in ("image_to_text", "text_to_image")]
    hits_image, hits_text = list[bool](), list[bool]()
    for group in groups:
        images_ND = image_embeddings(images_NHWC[group], model=model, processor=processor)
        texts_TD = text_embeddings([captions[i] for i in group], model=model, processor=processor)
        similarity_NT = images_ND @ texts_TD.T
        own = torch.arange(gallery)
        hits_image += (similarity_NT.argmax(dim=1) == own).tolist()
        hits_text += (similarity_NT.argmax(dim=0) == own).tolist()
    common: dict[str, Any] = {"skipped": len(captions) - len(hits_image), "unit": "%"}
    return [
        of.mean("image_to_text", hits_image, note=f"chance is 1 in {gallery}", **common),
        of.mean("text_to_image", hits_text, note=f"chance is 1 in {gallery}", **common),
    ]


def distinct_groups(captions: Sequence[str], *, size: int) -> list[list[int]]:
    """Indices in order, cut into groups of `size` with no caption twice; a repeated one waits for the next group, an
    empty one is in none."""
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


def zero_shot_score(
    data: Labelled,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    model: QLIPModel,
    processor: QLIPProcessor,
    of: Measurement,
) -> Score:
    """Accuracy of the nearest class, a class being the normalised mean of its embedded templates (CLIP's protocol)."""
    if note := no_text_note(processor):
        return of.missing("zero_shot", note=note, unit="%", paper=QLIP_B_16["zero_shot"])
    classes_KD = torch.stack(
        [
            F.normalize(
                text_embeddings([t.format(name) for t in templates], model=model, processor=processor).mean(0), dim=0
            )
            for name in class_names
        ]
    )
    hits = list[bool]()
    for images_NHWC, labels in data.batches():
        found_N = (image_embeddings(images_NHWC, model=model, processor=processor) @ classes_KD.T).argmax(dim=1)
        hits += (found_N == torch.as_tensor(labels)).tolist()
    of = of.with_protocol(templates=list(templates), classes=list(class_names), images=len(hits), data=data.identity)
    return of.mean(
        "zero_shot",
        hits,
        skipped=data.skipped,
        unit="%",
        paper=QLIP_B_16["zero_shot"],
        note=f"chance is 1 in {len(class_names)}",
    )
