"""The rules for text from outside."""

import pytest

from um3.core.text import printable, text_lines, valid_text


@pytest.mark.parametrize(
    ("text", "valid"),
    [("plain", "plain"), ("\ud83d half", "\ufffd half"), ("\ud83d\ude00", "😀"), ("name\udcff.png", "name\ufffd.png")],
)
def test_text_that_utf8_cannot_hold_becomes_the_replacement_character(text, valid):
    assert valid_text(text) == valid
    valid_text(text).encode("utf-8")


def test_only_line_feeds_and_carriage_returns_end_a_line():
    assert text_lines("a\nb\r\nc\rd\u2028e\x85f\x0cg") == ["a", "b", "c", "d\u2028e\x85f\x0cg"]


def test_control_characters_are_escaped_before_they_are_printed():
    assert printable("a\nb\x1b[31mc\x9bd\u202ee\ud800") == r"a\nb\x1b[31mc\x9bd\u202ee\ud800"
    assert printable("grün 😀") == "grün 😀"
