"""Feature networks for Frechet distances. The name of the network is part of every score made with it.

    inception-2015    the network FID is defined with; only with it is the distance called `fid`
    qlip-features     the image tower of the tokenizer under test (the last of several), after its projection
    random-features   a small convolutional network with seeded random weights: needs no file, is the same for every
                      model, and tells images apart by local colour and shape; not comparable with FID

Shapes: B images, H height, W width, D feature dimensions.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eval.config import FeatureName, Preprocessing
from eval.metrics.frechet import Moments, StreamingMoments
from eval.metrics.inception import Inception2015, prepare
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.files import sha256_of
from um3.core.seeds import torch_generator
from um3.core.tensors import read_tensors

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
"""How the published file's sha256 begins; its name ends with it."""
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
RANDOM_SEED = 0
RANDOM_CHANNELS = (16, 32, 64)


class FeatureNetwork(NamedTuple):
    """`extract` maps uint8 images (B, H, W, 3) of any size to features (B, D); equal digests are equal networks."""

    name: FeatureName
    num_features: int
    extract: Callable[[NDArray], Tensor]
    weights_sha256: str
    preprocessing: str = ""
    """How images are brought to the network, where that is a choice."""

    def moments(self, images_NHWC: NDArray, *, batch_size: int = 64) -> Moments:
        """Mean and covariance of the features of all images."""
        streaming = StreamingMoments(self.num_features)
        for start in range(0, len(images_NHWC), batch_size):
            streaming.add(self.extract(images_NHWC[start : start + batch_size]))
        return streaming.result()


def open_features(
    name: FeatureName, *, model: QLIPModel, processor: QLIPProcessor, inception_weights: str = ""
) -> FeatureNetwork:
    """The feature network called `name`."""
    if name == "inception-2015":
        return inception_features(inception_weights)
    return qlip_features(model, processor) if name == "qlip-features" else random_features()


def random_features(*, seed: int = RANDOM_SEED) -> FeatureNetwork:
    """Three strided random convolutions; the mean activation of every channel of every layer is a feature."""
    generator = torch_generator(seed, "random-features")
    layers, inputs = nn.ModuleList(), 3
    for outputs in RANDOM_CHANNELS:
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        scale = (2 / (inputs * 9)) ** 0.5
        layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * scale)
        layer.bias.data.copy_(torch.randn(outputs, generator=generator) * 0.1)  # type: ignore[union-attr]
        layers.append(layer)
        inputs = outputs

    @torch.no_grad()
    def extract(images_BHWC: NDArray) -> Tensor:
        x = _bchw(images_BHWC) / 127.5 - 1
        pooled = []
        for layer in layers:
            x = torch.relu(layer(x))
            pooled.append(x.mean(dim=(2, 3)))
        return torch.cat(pooled, dim=1)

    return FeatureNetwork("random-features", sum(RANDOM_CHANNELS), extract, weights_sha256(layers))


def qlip_features(model: QLIPModel, processor: QLIPProcessor) -> FeatureNetwork:
    """The l2-normalised image embedding of the tokenizer itself, of images brought to its size."""

    @torch.no_grad()
    def extract(images_BHWC: NDArray) -> Tensor:
        fits = images_BHWC.shape[1] == processor.image_size
        pixels_BCHW = processor.pixels(images_BHWC if fits else [Image.fromarray(image) for image in images_BHWC])
        return model.get_image_features(pixels_BCHW.to(model.device, model.dtype)).float()

    probe = torch.zeros(1, processor.image_size, processor.image_size, 3, dtype=torch.uint8).numpy()
    return FeatureNetwork("qlip-features", extract(probe).shape[1], extract, model.fingerprint()[:12])


def inception_features(
    weights: str = "", *, preprocessing: Preprocessing = "pytorch-fid", sha256: str = INCEPTION_SHA256
) -> FeatureNetwork:
    """The 2015 Inception, from `weights` or from torch.hub's cache; nothing is downloaded.

    Raises:
        UserError: no weights there, or a file whose sha256 does not begin with `sha256`.
    """
    path = inception_path(weights)
    if path is None:
        raise UserError(inception_note(weights))
    if not (found := sha256_of(path)).startswith(sha256):
        raise UserError(
            f"{path} is not the published file (its sha256 begins {found[:8]}, not {sha256}); take {INCEPTION_URL}"
        )
    network = Inception2015().eval()
    try:
        network.load_state_dict(read_tensors(path))
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold the Inception weights ({reason}); take {INCEPTION_URL}") from None
    network.to(device())

    @torch.no_grad()
    def extract(images_BHWC: NDArray) -> Tensor:
        return network(prepare(images_BHWC, preprocessing=preprocessing).to(device())).cpu()

    name: FeatureName = "inception-2015"
    return FeatureNetwork(name, Inception2015.num_features, extract, weights_sha256(network), preprocessing)


def weights_sha256(module: nn.Module) -> str:
    """Names a network's weights, for a protocol."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def inception_path(weights: str = "") -> Path | None:
    """Where the Inception weights lie, or None."""
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return path if path.is_file() else None


def inception_note(weights: str = "") -> str:
    """One line: how to provide the weights that were not found."""
    where = weights or str(Path("$TORCH_HOME") / "hub" / "checkpoints" / INCEPTION_FILE)
    return f"no Inception weights at {where}; download {INCEPTION_URL} and set inception_weights=PATH"


def _bchw(images_BHWC: NDArray) -> Tensor:
    return torch.as_tensor(images_BHWC).permute(0, 3, 1, 2).float()
