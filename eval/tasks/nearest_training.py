"""The training images that generated images are most like: whether a model draws or remembers.

Images are compared by the bits of their codes, which `make codes` has stored for every training image. Generated images
have passed the decoder, so real images pass it too before they are compared.

Legend: Q images, N patches, M training images, H, W pixels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_mix.codes.shards import open_code_sources
from data_mix.samples import usable
from eval.scores import Measurement, Score
from tokenizer.images import ExternalTokenizer, QLIPImages, decode_codes, encode_images
from um3.core.errors import UserError

MAX_TRAINING = 20_000
"""Training images that are compared, spread evenly over a source."""
CHUNK = 1024
NAMES = ("nearest_training", "nearest_training_real")


class TrainingCodes(NamedTuple):
    """Codes of training images, and the tokenizer that made them."""

    codes_MN: NDArray
    tokenizer: QLIPImages | ExternalTokenizer


class Nearest(NamedTuple):
    """Reconstructions of the nearest training images of Q images (Q, H, W, 3), and their shares of equal bits."""

    images: NDArray
    equal_Q: NDArray


def training_codes(run: str | Path, *, source: str, tokenizer: QLIPImages | ExternalTokenizer) -> TrainingCodes | None:
    """Training images of a source in RUN/codes; None if there are no codes of this source and tokenizer."""
    try:
        sources = open_code_sources(Path(run, "codes"), split="train", expected_fingerprint=tokenizer.fingerprint)
    except UserError:
        return None
    if source not in sources:
        return None
    shards = sources[source]
    indices = range(0, len(shards), -(-len(shards) // MAX_TRAINING))
    codes = [sample.codes_N.numpy() for sample in usable(shards.__getitem__, indices)]
    return TrainingCodes(np.stack(codes), tokenizer) if codes else None


def nearest(training: TrainingCodes, *, images: NDArray) -> Nearest:
    """The training image with the most bits in common with each image (Q, H, W, 3); of several the first."""
    codes_MN, tokenizer = training
    codes_QN = encode_images(tokenizer, images).numpy()
    best_Q, fewest_Q = np.zeros(len(codes_QN), dtype=int), np.full(len(codes_QN), np.inf)
    for start in range(0, len(codes_MN), CHUNK):
        part_MN = codes_MN[start : start + CHUNK]
        differing_QM = np.stack([np.bitwise_count(part_MN ^ codes_N).sum(1) for codes_N in codes_QN])
        number_Q, place_Q = differing_QM.min(1), differing_QM.argmin(1)
        is_nearer_Q = number_Q < fewest_Q
        best_Q[is_nearer_Q], fewest_Q[is_nearer_Q] = start + place_Q[is_nearer_Q], number_Q[is_nearer_Q]
    num_bits = codes_QN.shape[1] * tokenizer.num_bits
    return Nearest(decode_codes(tokenizer, torch.from_numpy(codes_MN[best_Q])), 1 - fewest_Q / num_bits)


def nearest_rows(
    training: TrainingCodes, *, images: NDArray, originals: NDArray, of: Measurement
) -> tuple[list[Score], NDArray]:
    """How like their nearest training image the generated `images` and the real `originals` are.

    Both are (Q, H, W, 3). Returns the mean shares of equal bits, and the nearest training images of `images`.
    """
    rebuilt = decode_codes(training.tokenizer, encode_images(training.tokenizer, originals))
    generated, real = (nearest(training, images=part) for part in (images, rebuilt))
    fingerprint = training.tokenizer.fingerprint[:12]
    of = of.with_protocol(training_images=len(training.codes_MN), fingerprint=fingerprint)
    notes = ("equal bits of the nearest training image", "the same of real validation images")
    rows = [
        of.mean(name, found.equal_Q.tolist(), unit="%", higher_is_better=False, note=note)
        for name, found, note in zip(NAMES, (generated, real), notes, strict=True)
    ]
    return rows, generated.images
