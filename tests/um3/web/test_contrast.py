"""Contrast of the page's text, computed from the colours of its style sheet (WCAG 2.2: at least 4.5 : 1)."""

import re

import pytest

from um3.web.server import PAGE

CSS = (PAGE / "page.css").read_text()
COLOURS = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", CSS)}


def luminance(colour):
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_every_ground(mode):
    pairs = [(text, ground) for text in ("ink", "soft", "bad") for ground in ("paper", "card", "sunk")]
    ratios = {pair: contrast(*(COLOURS[name][mode] for name in pair)) for pair in [*pairs, ("on-accent", "accent")]}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


def test_placeholders_have_the_colour_that_was_tested():
    (rule,) = re.findall(r"::placeholder \{(.*?)\}", CSS)
    assert rule.split() == ["color:", "var(--soft);", "opacity:", "1;"]  # Firefox's default opacity is lower
