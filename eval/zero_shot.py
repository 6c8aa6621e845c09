"""What a tokenizer's features know: retrieval, zero-shot classification, and a linear probe.

Shapes: N images, T texts, K classes, D feature dimensions, S probe inputs.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.labelled import Labelled
from eval.paper import LINEAR_PROBE, QLIP_B_16
from eval.scores import Measurement, Score
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError

GALLERY = 100
BATCH = 256
PROBE_ITERATIONS = 200
ProbeFeature = Literal["cls", "mean", "cls_mean"]
PROBE_FEATURES: tuple[ProbeFeature, ...] = ("cls", "mean", "cls_mean")


def no_text_note(processor: QLIPProcessor) -> str:
    """Why nothing can be compared with text; empty when it can."""
    try:
        processor.text_tokenizer  # noqa: B018 (reading it is the question)
    except UserError as error:
        return str(error)
    return ""


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

    Images are taken in order into galleries of distinct captions; those that complete none are counted as skipped.

    Without text tokenizer or with fewer distinct captions than one gallery needs the rows have no value.
    """
    of = of.with_protocol(gallery=gallery, captions="full, distinct")
    groups = distinct_groups(captions, size=gallery)
    note = no_text_note(processor)
    if not groups:
        note = f"{len(set(captions))} distinct captions among {len(captions)} images; a gallery needs {gallery}"
    if note:
        return [of.missing(metric, note=note, unit="%") for metric in ("image_to_text", "text_to_image")]
    right_image, right_text = 0, 0
    for group in groups:
        images_ND = image_embeddings(images_NHWC[group], model=model, processor=processor)
        texts_TD = text_embeddings([captions[i] for i in group], model=model, processor=processor)
        similarity_NT = images_ND @ texts_TD.T
        own = torch.arange(gallery)
        right_image += int((similarity_NT.argmax(dim=1) == own).sum())
        right_text += int((similarity_NT.argmax(dim=0) == own).sum())
    scored = len(groups) * gallery
    common: dict[str, Any] = {"n": scored, "skipped": len(captions) - scored, "unit": "%"}
    return [
        of.score("image_to_text", right_image / scored, note=f"chance is 1 in {gallery}", **common),
        of.score("text_to_image", right_text / scored, note=f"chance is 1 in {gallery}", **common),
    ]


def distinct_groups(captions: Sequence[str], *, size: int) -> list[list[int]]:
    """Indices in order, cut into groups of `size` with no caption twice; a repeated one waits for the next group."""
    groups: list[list[int]] = []
    waiting = list(range(len(captions)))
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
    right, count = 0, 0
    for images_NHWC, labels in data.batches():
        found_N = (image_embeddings(images_NHWC, model=model, processor=processor) @ classes_KD.T).argmax(dim=1)
        right += int((found_N == torch.as_tensor(labels)).sum())
        count += len(labels)
    return of.with_protocol(templates=list(templates), classes=list(class_names)).score(
        "zero_shot",
        right / count,
        n=count,
        skipped=data.skipped,
        unit="%",
        paper=QLIP_B_16["zero_shot"],
        note=f"chance is 1 in {len(class_names)}",
    )


def probe_scores(
    train: Labelled,
    *,
    val: Labelled,
    num_classes: int,
    model: QLIPModel,
    processor: QLIPProcessor,
    of: Measurement,
) -> list[Score]:
    """Accuracy on `val` of a linear classifier on frozen features: class token, mean of patches, both side by side."""
    inputs_train, labels_train = _probe_data(train, model=model, processor=processor)
    inputs_val, labels_val = _probe_data(val, model=model, processor=processor)
    of = of.with_protocol(classifier="logistic regression, LBFGS, C=1, standardised", train=len(labels_train))
    scores = []
    for name in PROBE_FEATURES:
        found = fit_probe(inputs_train[name], labels=labels_train, num_classes=num_classes).predict(inputs_val[name])
        right = float((found == torch.as_tensor(labels_val)).float().mean())
        paper, note = LINEAR_PROBE["QLIP-B"][name], f"chance is 1 in {num_classes}"
        common: dict[str, Any] = {"n": len(labels_val), "skipped": val.skipped, "unit": "%", "paper": paper}
        scores.append(of.score(f"probe_{name}", right, note=note, **common))
    return scores


def _probe_data(
    data: Labelled, *, model: QLIPModel, processor: QLIPProcessor
) -> tuple[dict[ProbeFeature, Tensor], list[int]]:
    parts, labels = [], []
    for images_NHWC, found in data.batches():
        parts.append(probe_inputs(images_NHWC, model=model, processor=processor))
        labels += list(found)
    return {name: torch.cat([part[name] for part in parts]) for name in PROBE_FEATURES}, labels


@torch.no_grad()
def probe_inputs(images_NHWC: NDArray, *, model: QLIPModel, processor: QLIPProcessor) -> dict[ProbeFeature, Tensor]:
    """Last hidden states of the image tower as probe inputs (N, S), by name."""
    cls, mean = [], []
    for start in range(0, len(images_NHWC), BATCH):
        pixels = processor.pixels(images_NHWC[start : start + BATCH]).to(model.device, model.dtype)
        hidden_NTD = model.vision_features(pixels).float().cpu()
        cls.append(hidden_NTD[:, 0])
        mean.append(hidden_NTD[:, 1:].mean(dim=1))
    cls_ND, mean_ND = torch.cat(cls), torch.cat(mean)
    return {"cls": cls_ND, "mean": mean_ND, "cls_mean": torch.cat([cls_ND, mean_ND], dim=1)}


class Probe(NamedTuple):
    """A fitted linear classifier over standardised inputs."""

    weight: Tensor
    bias: Tensor
    offset: Tensor
    scale: Tensor

    def predict(self, inputs_NS: Tensor) -> Tensor:
        """Class index (N,) of every input."""
        return (((inputs_NS.double() - self.offset) / self.scale) @ self.weight.T + self.bias).argmax(dim=1)


def fit_probe(inputs_NS: Tensor, *, labels: Sequence[int], num_classes: int, c: float = 1.0) -> Probe:
    """Multinomial logistic regression: summed cross entropy + |w|^2 / (2 c), minimised by LBFGS in float64."""
    inputs = inputs_NS.double()
    offset, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
    inputs, targets = (inputs - offset) / scale, torch.as_tensor(labels)
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, targets) + weight.square().sum() / (2 * c * len(inputs))
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return Probe(weight.detach(), bias.detach(), offset, scale)
