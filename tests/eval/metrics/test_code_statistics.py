"""Code statistics of codes whose bits are known."""

import numpy as np
import pytest
import torch

from eval.metrics.code_statistics import code_scores, code_statistics
from eval.scores import Measurement
from tokenizer.bits import codes_to_bits

WEIGHTS = torch.tensor([64.0, 16.0, 0.0, 4.0])


def decode(codes_BN):
    """A grey image whose brightness is a weighted sum of the bits of its one code."""
    grey_B = (codes_to_bits(codes_BN, num_bits=4).float() @ WEIGHTS)[:, 0]
    return grey_B.to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3).numpy()


def test_entropy_correlation_flips_and_distinct_codes():
    # The first bit is fair, the second its opposite, the third never set, the last set in one code of four.
    codes_BN = torch.tensor([[0b1000], [0b0100], [0b1000], [0b0101]])
    statistics = code_statistics(codes_BN, num_bits=4, decode=decode)
    assert statistics.ones_L == pytest.approx([0.5, 0.5, 0.0, 0.25])
    assert statistics.entropy_L == pytest.approx([1.0, 1.0, 0.0, 0.811278], abs=1e-6)
    assert statistics.correlation_LL[0] == pytest.approx([1.0, -1.0, 0.0, -1 / np.sqrt(3)])
    assert statistics.correlation_LL[2].tolist() == [0.0] * 4
    assert statistics.flip_L.tolist() == [64.0, 16.0, 0.0, 4.0]
    assert statistics.flipped_KHWC[:, 0, 0, 0].tolist() == [64, 0, 80, 64, 68]
    assert (statistics.num_codes, statistics.num_distinct) == (4, 3)
    rows = {row.metric: row for row in code_scores(statistics, n=4, of=Measurement("x_bits", 0))}
    assert rows["entropy"].value == pytest.approx(2.811278, abs=1e-6)
    assert rows["correlation"].value == pytest.approx(1.0) and rows["distinct_codes"].value == 0.75
    assert rows["saturated_bits"].value == 1.0 and "bits 2 (0 is the most significant)" in rows["saturated_bits"].note
    uniform = code_statistics(torch.arange(16)[:, None], num_bits=4, decode=decode)
    rows = code_scores(uniform, n=16, of=Measurement("x_bits", 0))
    assert [row.value for row in rows] == pytest.approx([4.0, 0.0, 0.0, 1.0]) and rows[1].note == ""
