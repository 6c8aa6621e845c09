"""Linear probes on a tokenizer's frozen features: the paper's recipe (Table 11), or logistic regression.

Shapes: N images, D feature dimensions, S probe inputs, K classes.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.config import ProbeConfig
from eval.paper_values import LINEAR_PROBE
from eval.scores import Measurement, Score
from eval.tasks.classification_data import ClassificationData, ClassificationTask
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import device
from um3.core.progress import Progress
from um3.core.seeds import torch_generator

BETAS = (0.9, 0.999)
LBFGS_ITERATIONS = 200
PREDICT_BATCH = 4096
ProbeFeature = Literal["cls", "mean", "cls_mean"]
PROBE_FEATURES: tuple[ProbeFeature, ...] = ("cls", "mean", "cls_mean")


class ProbeData(NamedTuple):
    """Concatenated class token and mean of patches (N, 2 D), float32 on the CPU, and the class indices (N,)."""

    both_NS: Tensor
    labels_N: Tensor

    def inputs(self, feature: ProbeFeature) -> Tensor:
        """The columns of one feature, (N, D) or (N, 2 D), as a view: for ImageNet's train split a copy takes 8 GB."""
        width = self.both_NS.shape[1] // 2
        return {"cls": self.both_NS[:, :width], "mean": self.both_NS[:, width:], "cls_mean": self.both_NS}[feature]


class Probe(NamedTuple):
    """A linear classifier over standardised inputs: weight (K, S), bias (K,), offset and scale (S,)."""

    weight: Tensor
    bias: Tensor
    offset: Tensor
    scale: Tensor

    def predict(self, inputs_NS: Tensor) -> Tensor:
        """Class index (N,) of every input, on the CPU."""
        batches = ((x_BS.to(self.weight) - self.offset) / self.scale for x_BS in inputs_NS.split(PREDICT_BATCH))
        return torch.cat([F.linear(x_BS, self.weight, self.bias).argmax(dim=1).cpu() for x_BS in batches])


def probe_scores(
    task: ClassificationTask, *, model: QLIPModel, processor: QLIPProcessor, config: ProbeConfig, of: Measurement
) -> list[Score]:
    """Val accuracy of a linear classifier on frozen features: class token, mean of patches, and both concatenated.

    A probe that diverged, or a task without train data, gives rows without a value.
    """
    if task.train is None:
        return [of.missing(f"probe_{feature}", note=task.note, unit="%") for feature in PROBE_FEATURES]
    train, val = (probe_data(data, model=model, processor=processor) for data in (task.train, task.val))
    of = of.with_protocol(**protocol(config), train_images=len(train.labels_N), train_data=task.train.identity)
    of = of.with_protocol(images=len(val.labels_N), data=task.val.identity)
    scores, options = [], dict[str, Any](labels_N=train.labels_N, num_classes=len(task.class_names))
    adamw = functools.partial(fit_adamw, config=config, seed=of.seed)
    for feature in PROBE_FEATURES:
        metric, inputs_NS = f"probe_{feature}", train.inputs(feature)
        common: dict[str, Any] = {"unit": "%", "paper": LINEAR_PROBE["QLIP-B"][feature]}
        is_adamw = config.kind == "adamw"
        probe: Probe = adamw(inputs_NS, label=metric, **options) if is_adamw else fit_logistic(inputs_NS, **options)
        if all(bool(part.isfinite().all()) for part in probe):
            hits = (probe.predict(val.inputs(feature)) == val.labels_N).tolist()
            note = f"chance is 1 in {len(task.class_names)}"
            scores.append(of.mean(metric, hits, skipped=task.val.skipped, note=note, **common))
        else:
            note = f"the probe diverged: a feature is not finite, or tokenizer.probe.lr={config.lr:g} is too high"
            scores.append(of.missing(metric, note=note, **common))
    return scores


def protocol(config: ProbeConfig) -> dict[str, Any]:
    """The settings that two probes must share to be comparable, besides their images."""
    common = {"inputs": "last hidden states, standardised over train", "augmentation": "none"}
    if config.kind == "logistic":
        return common | {"classifier": "logistic regression, LBFGS, C=1"}
    settings = {name: getattr(config, name) for name in ("lr", "epochs", "warmup_epochs", "batch_size")}
    return common | {"classifier": f"AdamW {BETAS}, weight decay 0, linear warm-up, cosine to 0"} | settings


@torch.no_grad()
def probe_data(data: ClassificationData, *, model: QLIPModel, processor: QLIPProcessor) -> ProbeData:
    """The features of all readable images, from the image tower's last hidden states, with their labels."""
    both_NS, labels = torch.empty(0), list[int]()
    for images_BHWC, batch_labels in data.batches():
        pixels_BCHW = processor.pixels(images_BHWC).to(model.device, model.dtype)
        hidden_BTD = model.vision_features(pixels_BCHW).float()
        both_BS = torch.cat([hidden_BTD[:, 0], hidden_BTD[:, 1:].mean(dim=1)], dim=1).cpu()
        if not labels:
            both_NS = both_BS.new_empty(len(data), both_BS.shape[1])
        both_NS[len(labels) : len(labels) + len(batch_labels)] = both_BS
        labels += batch_labels
    return ProbeData(both_NS[: len(labels)], torch.tensor(labels))


def fit_adamw(
    inputs_NS: Tensor, *, labels_N: Tensor, num_classes: int, config: ProbeConfig, seed: int, label: str = "probe"
) -> Probe:
    """The paper's probe (Table 11), from zero weights, on the accelerator; the order of the batches is seeded."""
    target = device()
    variance_S, offset_S = (moment_S.to(target) for moment_S in torch.var_mean(inputs_NS, dim=0))
    scale_S = variance_S.sqrt().clamp(min=1e-6)
    layer = nn.Linear(inputs_NS.shape[1], num_classes, device=target)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0)
    epoch_steps = math.ceil(len(inputs_NS) / config.batch_size)
    warmup, total = config.warmup_epochs * epoch_steps, config.epochs * epoch_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, warmup=warmup, total=total))
    generator, progress = torch_generator(seed, "probe"), Progress(total, label=label)
    for _ in range(config.epochs):
        for indices_B in torch.randperm(len(inputs_NS), generator=generator).split(config.batch_size):
            standardised_BS = (inputs_NS[indices_B].to(target) - offset_S) / scale_S
            optimizer.zero_grad()
            F.cross_entropy(layer(standardised_BS), labels_N[indices_B].to(target)).backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    return Probe(layer.weight.detach(), layer.bias.detach(), offset_S, scale_S)


def lr_share(step: int, *, warmup: int, total: int) -> float:
    """Learning rate relative to its peak: linear warm-up to step `warmup`, then a cosine to 0 at step `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def fit_logistic(inputs_NS: Tensor, *, labels_N: Tensor, num_classes: int) -> Probe:
    """Multinomial logistic regression: summed cross entropy + |w|^2 / 2, minimised by LBFGS in float64.

    scikit-learn's refuses features that are not finite and has another model for two classes. With more classes its
    coefficients are equal to 1e-3 (a test compares them).
    """
    inputs = inputs_NS.double()
    offset, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
    inputs = (inputs - offset) / scale
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=LBFGS_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels_N) + weight.square().sum() / (2 * len(inputs))
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return Probe(weight.detach(), bias.detach(), offset, scale)
