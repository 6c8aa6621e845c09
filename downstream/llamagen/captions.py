"""The cleaning of captions that LlamaGen's released text-to-image models were trained and sampled with.

It empties captions in Chinese, Japanese and Korean script. Needs the packages ftfy and beautifulsoup4.
"""

import html
import re
from urllib.parse import unquote_plus

_IMAGE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_ADDRESS = r"[-\w./?=&%+#:]*"
_PLAIN_MARKS = str.maketrans(
    {**dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"), **dict.fromkeys("`´«»“”¨„", '"'), **dict.fromkeys("‘’", "'")}
)
_LINKS = re.compile(rf"\b(?:https?://|www\.)[-\w]+(?:\.[-\w]+)*{_ADDRESS}")
_ENTITIES_AND_NUMBERS = [
    (r"@[\w\d]+\b", ""),
    (r"[\u31c0-\u31ff\u3200-\u33ff\u3400-\u4dbf\u4e00-\u9fff]+", ""),
    (r"&quot;?|&amp;?", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # an IP address
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_IMAGE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_ADVERTISING = [
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),  # article numbers
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?downloads?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_IMAGE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # a size in pixels
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_EDGES = [(r"^[\"'](.+)[\"']$", r"\1"), (r"^['_,\-:+]", ""), (r"['_,\-:+]$", ""), (r"^\.\S+$", "")]
_MAX_JOINTS = 3


def clean_caption(caption: str) -> str:
    """A caption as the released models read it: lower case, without links, file names, sizes and advertising."""
    import bs4
    import ftfy

    def once(text: str) -> str:
        text = unquote_plus(text).strip().lower().replace("<person>", "person")
        text = bs4.BeautifulSoup(_LINKS.sub("", text), features="html.parser").text
        text = _replace(text.translate(_PLAIN_MARKS), _ENTITIES_AND_NUMBERS)
        if len(re.findall(r"[-_]", text)) > _MAX_JOINTS:
            text = re.sub(r"[-_]", " ", text)
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        return _replace(_replace(text, _ADVERTISING).strip(), _EDGES).strip()

    return once(once(caption))


def _replace(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
