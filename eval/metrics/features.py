"""Feature networks for Frechet distances. The name of the network is part of every score.

    inception-2015    the network that defines the FID; only over its features the distance is called `fid`
    qlip-features     the image tower of the tokenizer under test (the last of several), after its projection
    random-features   a small convolutional network with seeded random weights: needs no file, is the same for every
                      model, and separates images by local colour and shape; not comparable with the FID

Shapes: B, N images, H height, W width, D feature dimensions.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eval.config import FeatureName, Preprocessing
from eval.metrics.frechet import Moments, StreamingMoments, frechet_distance
from eval.metrics.inception import Inception2015, prepare
from eval.scores import Measurement, Score
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.files import sha256_of, short_hash
from um3.core.hub import read_tensors
from um3.core.seeds import torch_generator

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
"""The first digits of the published file's sha256; they are also in its name."""
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
RANDOM_CHANNELS = (16, 32, 64)
BATCH = 64


class FeatureNetwork(NamedTuple):
    """`extract` maps uint8 images (B, H, W, 3) of any size to features (B, D); equal hashes are equal networks."""

    name: FeatureName
    num_features: int
    extract: Callable[[NDArray], Tensor]
    weights_sha256: str
    preprocessing: str = ""
    """How images are resized for the network, if there is a choice."""

    @property
    def key(self) -> str:
        """`inception-2015 clean-fid`, `random-features`."""
        return f"{self.name} {self.preprocessing}".strip()

    def moments(self, images_NHWC: NDArray) -> Moments:
        """Mean and covariance of the features of all images."""
        streaming = StreamingMoments(self.num_features)
        for start in range(0, len(images_NHWC), BATCH):
            streaming.add(self.extract(images_NHWC[start : start + BATCH]))
        return streaming.result()


def open_features(
    name: FeatureName, *, model: QLIPModel, processor: QLIPProcessor, inception_weights: str = ""
) -> FeatureNetwork:
    """Load the feature network called `name`."""
    if name == "inception-2015":
        return inception_features(inception_weights)
    return qlip_features(model, processor) if name == "qlip-features" else random_features()


def random_features() -> FeatureNetwork:
    """Three strided random convolutions; a feature is the mean activation of a channel of a layer."""
    generator = torch_generator(0, "random-features")
    layers = nn.ModuleList()
    for inputs, outputs in itertools.pairwise((3, *RANDOM_CHANNELS)):
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / (inputs * 9)) ** 0.5)
        layer.bias.data.copy_(torch.randn(outputs, generator=generator) * 0.1)  # type: ignore[union-attr]
        layers.append(layer)

    @torch.no_grad()
    def extract(images_BHWC: NDArray) -> Tensor:
        x_BCHW = torch.as_tensor(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
        features = []
        for layer in layers:
            x_BCHW = torch.relu(layer(x_BCHW))
            features.append(x_BCHW.mean(dim=(2, 3)))
        return torch.cat(features, dim=1)

    return FeatureNetwork("random-features", sum(RANDOM_CHANNELS), extract, weights_sha256(layers))


def qlip_features(model: QLIPModel, processor: QLIPProcessor) -> FeatureNetwork:
    """The l2-normalised image embedding of the tokenizer; images are resized to its size."""

    @torch.no_grad()
    def extract(images_BHWC: NDArray) -> Tensor:
        is_sized = images_BHWC.shape[1] == processor.image_size
        pixels_BCHW = processor.pixels(images_BHWC if is_sized else [Image.fromarray(image) for image in images_BHWC])
        return model.get_image_features(pixels_BCHW.to(model.device, model.dtype)).float()

    sample = torch.zeros(1, processor.image_size, processor.image_size, 3, dtype=torch.uint8).numpy()
    return FeatureNetwork("qlip-features", extract(sample).shape[1], extract, model.fingerprint()[:12])


def inception_features(
    weights: str = "", *, preprocessing: Preprocessing = "pytorch-fid", sha256: str = INCEPTION_SHA256
) -> FeatureNetwork:
    """The 2015 Inception, from `weights` or from torch.hub's cache; nothing is downloaded.

    UserError if the weights are missing, or the file's sha256 does not start with `sha256`.
    """
    path = inception_path(weights)
    if path is None:
        raise UserError(inception_note(weights))
    if not (digest := sha256_of(path)).startswith(sha256):
        digests = f"its sha256 starts with {digest[:8]}, not {sha256}"
        raise UserError(f"{path} is not the published file ({digests}); use {INCEPTION_URL}")
    network = Inception2015().eval()
    try:
        network.load_state_dict(read_tensors(path))
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold the Inception weights ({reason}); use {INCEPTION_URL}") from None
    network.to(device())

    @torch.no_grad()
    def extract(images_BHWC: NDArray) -> Tensor:
        return network(prepare(images_BHWC, preprocessing=preprocessing).to(device())).cpu()

    hashed = weights_sha256(network)
    return FeatureNetwork("inception-2015", Inception2015.num_features, extract, hashed, preprocessing)


def weights_sha256(module: nn.Module) -> str:
    """A short hash of a network's weights, for a protocol."""
    parts: list[str | bytes] = []
    for name, tensor in sorted(module.state_dict().items()):
        parts += [name, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()]
    return short_hash(*parts)


def inception_path(weights: str = "") -> Path | None:
    """The path of the Inception weights, or None if they are missing."""
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return path if path.is_file() else None


def inception_note(weights: str = "") -> str:
    """One line: the weights are missing, and where to get them."""
    path = weights or str(Path("$TORCH_HOME") / "hub" / "checkpoints" / INCEPTION_FILE)
    return f"no Inception weights at {path}; download {INCEPTION_URL} and set inception_weights=PATH"


def frechet_rows(
    images_NHWC: NDArray,
    *,
    originals_NHWC: NDArray,
    features: FeatureNetwork,
    fid: str,
    paper: Mapping[str, float],
    of: Measurement,
) -> list[Score]:
    """The Frechet distance of two sets; over other features than Inception's also a row `fid` with the reason."""
    n, dims = len(images_NHWC), features.num_features
    missing = of.missing(fid, note=inception_note(), higher_is_better=False, paper=paper.get(fid))
    of = of.with_protocol(features=features.name, dimensions=dims, features_sha256=features.weights_sha256, images=n)
    if features.preprocessing:
        of = of.with_protocol(preprocessing=features.preprocessing)
    moments = features.moments(images_NHWC), features.moments(originals_NHWC)
    row = distance_row(features, *moments, fid=fid, paper=paper.get(fid), of=of)
    return [row] if row.metric == fid else [row, missing]


def distance_name(features: FeatureNetwork, *, fid: str) -> str:
    """The name of the distance over a network's features: `fid` over those of Inception only."""
    return fid if features.name == "inception-2015" else f"frechet_distance[{features.name}]"


def distance_row(
    features: FeatureNetwork,
    generated: Moments,
    real: Moments,
    *,
    fid: str,
    paper: float | None,
    of: Measurement,
    note: str = "",
    **fields: Any,
) -> Score:
    """The Frechet distance of two sets of images; the paper's value stands beside an FID only."""
    name, n, dims = distance_name(features, fid=fid), generated.num_vectors, features.num_features
    few = f"{n} images for {dims} dimensions: biased upwards, compare only at equal n" if n < 10 * dims else ""
    fields |= {"paper": paper if name == fid else None, "note": "; ".join(filter(None, [few, note]))}
    return of.score(name, frechet_distance(generated, real), n=n, higher_is_better=False, **fields)
