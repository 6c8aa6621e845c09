"""Linear probes on a tokenizer's frozen features: the paper's recipe (Table 11), or logistic regression to its end.

Shapes: N images, D feature dimensions, S probe inputs, K classes.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eval.config import ProbeConfig
from eval.paper_values import LINEAR_PROBE
from eval.scores import Measurement, Score
from eval.tasks.classification_data import Labelled
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
    """Class token and mean of patches side by side (N, 2 D), float32 on the CPU, and the class indices (N,)."""

    both_NS: Tensor
    labels_N: Tensor

    def inputs(self, feature: ProbeFeature) -> Tensor:
        """The columns of one feature, (N, D) or (N, 2 D): a view, since for ImageNet's train a copy is 8 GB."""
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
        found = [self._logits(inputs_BS).argmax(dim=1).cpu() for inputs_BS in inputs_NS.split(PREDICT_BATCH)]
        return torch.cat(found)

    def is_finite(self) -> bool:
        """False after a training that diverged."""
        return all(bool(part.isfinite().all()) for part in self)

    def _logits(self, inputs_BS: Tensor) -> Tensor:
        standardised_BS = (inputs_BS.to(self.weight) - self.offset) / self.scale
        return F.linear(standardised_BS, self.weight, self.bias)


def probe_scores(
    train: Labelled,
    *,
    val: Labelled,
    num_classes: int,
    model: QLIPModel,
    processor: QLIPProcessor,
    config: ProbeConfig,
    of: Measurement,
) -> list[Score]:
    """Accuracy on `val` of a linear classifier on frozen features: class token, mean of patches, both side by side.

    A probe that diverged is a row without a value.
    """
    found, wanted = (probe_data(data, model=model, processor=processor) for data in (train, val))
    of = of.with_protocol(**protocol(config), train_images=len(found.labels_N), train_data=train.identity)
    of = of.with_protocol(images=len(wanted.labels_N), data=val.identity)
    scores = []
    for name in PROBE_FEATURES:
        metric, paper = f"probe_{name}", LINEAR_PROBE["QLIP-B"][name]
        inputs_NS = found.inputs(name)
        if config.kind == "adamw":
            probe = fit_adamw(
                inputs_NS, labels_N=found.labels_N, num_classes=num_classes, config=config, seed=of.seed, label=metric
            )
        else:
            probe = fit_logistic(inputs_NS, labels_N=found.labels_N, num_classes=num_classes)
        if not probe.is_finite():
            note = f"the probe diverged: a feature is not finite, or tokenizer.probe.lr={config.lr:g} is too high"
            scores.append(of.missing(metric, note=note, unit="%", paper=paper))
            continue
        hits = (probe.predict(wanted.inputs(name)) == wanted.labels_N).tolist()
        common: dict[str, Any] = {"skipped": val.skipped, "unit": "%", "paper": paper}
        scores.append(of.mean(metric, hits, note=f"chance is 1 in {num_classes}", **common))
    return scores


def protocol(config: ProbeConfig) -> dict[str, Any]:
    """What two probes must share to be comparable, besides their images."""
    common = {"inputs": "last hidden states, standardised over train", "augmentation": "none"}
    if config.kind == "logistic":
        return common | {"classifier": "logistic regression, LBFGS, C=1"}
    settings = {name: getattr(config, name) for name in ("lr", "epochs", "warmup_epochs", "batch_size")}
    return common | {"classifier": f"AdamW {BETAS}, weight decay 0, linear warm-up, cosine to 0"} | settings


def probe_data(data: Labelled, *, model: QLIPModel, processor: QLIPProcessor) -> ProbeData:
    """The features of all images that can be read, with their labels."""
    both_NS, labels = torch.empty(0), list[int]()
    for images_BHWC, found in data.batches():
        both_BS = probe_inputs(images_BHWC, model=model, processor=processor)
        if not labels:
            both_NS = both_BS.new_empty(len(data), both_BS.shape[1])
        both_NS[len(labels) : len(labels) + len(found)] = both_BS
        labels += found
    return ProbeData(both_NS[: len(labels)], torch.tensor(labels))


@torch.no_grad()
def probe_inputs(images_BHWC: NDArray, *, model: QLIPModel, processor: QLIPProcessor) -> Tensor:
    """Class token and mean of patches of the image tower's last hidden states, (B, 2 D) float32 on the CPU."""
    pixels_BCHW = processor.pixels(images_BHWC).to(model.device, model.dtype)
    hidden_BTD = model.vision_features(pixels_BCHW).float()
    return torch.cat([hidden_BTD[:, 0], hidden_BTD[:, 1:].mean(dim=1)], dim=1).cpu()


def fit_adamw(
    inputs_NS: Tensor, *, labels_N: Tensor, num_classes: int, config: ProbeConfig, seed: int, label: str = "probe"
) -> Probe:
    """The paper's probe (Table 11), from zero weights, on this machine's accelerator; the batches' order is seeded."""
    place = device()
    variance_S, offset_S = (moment_S.to(place) for moment_S in torch.var_mean(inputs_NS, dim=0))
    scale_S = variance_S.sqrt().clamp(min=1e-6)
    layer = nn.Linear(inputs_NS.shape[1], num_classes, device=place)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0)
    epoch_steps = math.ceil(len(inputs_NS) / config.batch_size)
    warmup, total = config.warmup_epochs * epoch_steps, config.epochs * epoch_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, warmup=warmup, total=total))
    generator, progress = torch_generator(seed, "probe"), Progress(total, label=label)
    for _ in range(config.epochs):
        for rows_B in torch.randperm(len(inputs_NS), generator=generator).split(config.batch_size):
            standardised_BS = (inputs_NS[rows_B].to(place) - offset_S) / scale_S
            optimizer.zero_grad()
            F.cross_entropy(layer(standardised_BS), labels_N[rows_B].to(place)).backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    return Probe(layer.weight.detach(), layer.bias.detach(), offset_S, scale_S)


def lr_share(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: up a line to `warmup`, then down half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def fit_logistic(inputs_NS: Tensor, *, labels_N: Tensor, num_classes: int, c: float = 1.0) -> Probe:
    """Multinomial logistic regression: summed cross entropy + |w|^2 / (2 c), minimised by LBFGS in float64."""
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
        loss = F.cross_entropy(inputs @ weight.T + bias, labels_N) + weight.square().sum() / (2 * c * len(inputs))
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return Probe(weight.detach(), bias.detach(), offset, scale)
