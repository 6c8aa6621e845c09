"""FID, SSIM and CLIPScore against torchmetrics, which implements them independently."""

import numpy as np
import pytest
import torch
from torch import nn

from eval.metrics.clipscore import clip_conventions, clip_cosines, load_clip
from eval.metrics.frechet import StreamingMoments, frechet_distance
from eval.metrics.reconstruction import SIGMA, WINDOW, psnr, ssim
from eval.scores import Measurement
from tests.helpers.tiny_judges import save_clip

pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.slow


def images(*, count, size=32, seed=0):
    """Smooth uint8 images (N, H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def noisy(originals, *, sigma, seed=1):
    noise = np.random.default_rng(seed).normal(0, sigma, originals.shape)
    return (originals + noise).clip(0, 255).astype(np.uint8)


def channels_first(images_NHWC):
    return torch.as_tensor(images_NHWC).permute(0, 3, 1, 2)


class Features(nn.Module):
    """The colours of 2 x 2 blocks, 12 dimensions: torchmetrics' Inception needs a download."""

    num_features = 12

    def forward(self, images_NCHW):
        return nn.functional.adaptive_avg_pool2d(images_NCHW.double(), 2).flatten(1)


def test_frechet_distance():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated, extract = images(count=60), images(count=40, seed=2), Features()
    theirs = FrechetInceptionDistance(feature=extract, input_img_size=(3, 32, 32)).set_dtype(torch.float64)
    moments = []
    for batch, is_real in ((real, True), (generated, False)):
        theirs.update(channels_first(batch), real=is_real)
        moments.append(StreamingMoments(extract.num_features))
        moments[-1].add(extract(channels_first(batch)))
    ours = frechet_distance(*(part.result() for part in moments))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6) and ours > 1


@pytest.mark.parametrize("sigma", [2, 30])
def test_psnr_and_ssim(sigma):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    originals = images(count=4, size=48)
    reconstructed = noisy(originals, sigma=sigma)
    pair = [channels_first(batch).double() for batch in (reconstructed, originals)]
    options = {"data_range": 255.0, "sigma": SIGMA, "reduction": "none", "return_full_image": True}
    _, maps_NCHW = structural_similarity_index_measure(*pair, **options)
    # torchmetrics also counts the windows that reach over the edge; ours are those within the image.
    edge = WINDOW // 2
    theirs = maps_NCHW[..., edge:-edge, edge:-edge].mean(dim=(1, 2, 3))
    assert ssim(reconstructed, originals_BHWC=originals).tolist() == pytest.approx(theirs.tolist(), rel=1e-6)
    theirs = peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3))
    assert psnr(reconstructed, originals_BHWC=originals).tolist() == pytest.approx(theirs.tolist(), rel=1e-6)


class Embeddings(nn.Module):
    """A CLIP as torchmetrics 1.9 expects it: transformers 5 returns the embeddings inside an object."""

    def __init__(self, clip):
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, pixels):
        return self.clip.get_image_features(pixels).pooler_output

    def get_text_features(self, input_ids, mask):
        return self.clip.get_text_features(input_ids, mask).pooler_output


def test_clipscore(tmp_path):
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPProcessor

    clip = load_clip(str(save_clip(tmp_path / "clip")))
    processor = CLIPProcessor(image_processor=clip.processor, tokenizer=clip.text_tokenizer)
    batch, texts = images(count=4), ["a red cat", "the dog", "a photo of a dog", "is the cat blue ?"]
    theirs = CLIPScore(lambda: (Embeddings(clip.model), processor))
    theirs.update(channels_first(batch), texts)
    scores = clip_conventions(clip_cosines(batch, texts=texts, clip=clip), of=Measurement("scenes", seed=0))
    ours = {score.metric: score.value for score in scores}["clipscore_100"]
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)
