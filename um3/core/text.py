"""The rules for text from outside: files, archives, tables, names and command lines pass through these functions.

- Lines end at "\\n", "\\r\\n" and "\\r" only. U+2028, U+0085 and form feeds belong to the text.
- Text that UTF-8 cannot hold (half a surrogate pair, bytes of another encoding in a file name) becomes U+FFFD.
- Control characters are escaped before text is printed or logged.
"""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def valid_text(text: str) -> str:
    """`text` with every lone surrogate replaced by U+FFFD; whole pairs become their character."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_lines(text: str) -> list[str]:
    """The lines of `text`, without their ends; unlike `str.splitlines`, only these end one."""
    return re.split(r"\r\n|\n|\r", text)


def printable(text: object) -> str:
    """`text` on one line for a terminal or a log: control characters, which could forge lines, are escaped."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
