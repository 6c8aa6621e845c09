"""The bit report on codes whose bits are known."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eval.metrics.code_statistics import bit_report, bit_scores
from eval.scores import Measurement
from tokenizer.bits import codes_to_bits

WEIGHTS = torch.tensor([64.0, 16.0, 0.0, 4.0])


def draw(codes_BN: torch.Tensor) -> NDArray:
    """A grey picture as bright as the code of its one patch says."""
    grey_B = (codes_to_bits(codes_BN, num_bits=4).float() @ WEIGHTS)[:, 0]
    return grey_B.to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3).numpy()


def test_entropy_correlation_flips_and_distinct_codes() -> None:
    # The first bit is fair, the second its opposite, the third never set, the last set in one code of four.
    codes_BN = torch.tensor([[0b1000], [0b0100], [0b1000], [0b0101]])
    report = bit_report(codes_BN, num_bits=4, draw=draw)
    assert report.ones_L == pytest.approx([0.5, 0.5, 0.0, 0.25])
    assert report.entropy_L == pytest.approx([1.0, 1.0, 0.0, 0.811278], abs=1e-6)
    assert report.correlation_LL[0] == pytest.approx([1.0, -1.0, 0.0, -1 / np.sqrt(3)])
    assert report.correlation_LL[2].tolist() == [0.0] * 4
    assert report.flip_L.tolist() == [64.0, 16.0, 0.0, 4.0]
    assert report.flipped_KHWC[:, 0, 0, 0].tolist() == [64, 0, 80, 64, 68]
    assert (report.num_codes, report.num_distinct) == (4, 3)
    rows = {row.metric: row for row in bit_scores(report, n=4, of=Measurement("x_bits", 0))}
    assert rows["entropy"].value == pytest.approx(2.811278, abs=1e-6)
    assert rows["correlation"].value == pytest.approx(1.0) and rows["distinct_codes"].value == 0.75
    assert rows["saturated_bits"].value == 1.0 and "bits 2 (0 is the most significant)" in rows["saturated_bits"].note


def test_lively_bits_raise_no_alarm() -> None:
    codes_BN = torch.arange(16)[:, None]
    rows = bit_scores(bit_report(codes_BN, num_bits=4, draw=draw), n=16, of=Measurement("x_bits", 0))
    assert [row.value for row in rows] == pytest.approx([4.0, 0.0, 0.0, 1.0])
    assert {row.metric: row.note for row in rows}["saturated_bits"] == ""
