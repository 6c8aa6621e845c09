"""Caption tokenization by the Penn Treebank conventions, without Java.

It agrees with the Stanford tokenizer of the COCO caption tools on ordinary captions: lower case, punctuation split off
and dropped, clitics ("n't", "'s") split from their word. On the published COCO val2014 example BLEU and ROUGE are equal
and CIDEr differs in the fourth digit.
"""

import re

TOKENIZER = "ptb-python-1"
# The tokens that the COCO caption tools drop. They list brackets in upper case but the tokenizer writes "-lrb-", so
# brackets are kept there, and here.
DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_ABBREVIATIONS = r"mr|mrs|ms|dr|st|jr|sr|prof|gen|rev|vs|etc|inc|co|corp|ltd|ave|blvd|rd|mt|no|oz|ft|lb|u\.s|[ap]\.m"
_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "gimme": "gim me", "'tis": "'t is"}
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)\S+                              # addresses
    | [\w.+-]+@[\w-]+\.[\w.]+
    | \d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?![\w-])       # 10,000  3.5  4:30  1/2  2nd
    | (?:{_ABBREVIATIONS})\.(?!\w)                        # abbreviations keep their full stop
    | (?:[a-z]\.){{2,}}                                   # u.s.
    | '(?:s|m|d|ll|re|ve)(?!\w)                           # clitics
    | n't(?!\w)
    | '\d0s | 'tis(?!\w)                                  # the '60s
    | \w+(?=n't(?!\w))                                    # the word before n't
    | o'\w+ | d'\w+ | rock\ 'n'\ roll
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                            # AT&T, but b & b
    | \w+(?:[-/+.]\w+)*                                   # words, hyphenated words, and/or
    | \.\.\.+ | --+ | [!?]{{2,}}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> str:
    """The caption's tokens joined by single spaces; empty if the caption is only punctuation."""
    text = normalise(caption).translate(_QUOTES)
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match.group().lower()
        token = _BRACKETS.get(token, token)
        token = "..." if token.startswith("...") else "--" if token.startswith("--") else token
        tokens += _WORDS.get(token, token).split()
    return " ".join(token for token in tokens if token not in DROPPED and token != '"')


def normalise(caption: str) -> str:
    """Replace every run of white space by one space.

    Line-based tools treat U+2028, form feeds and the like as the end of a caption.
    """
    return " ".join(caption.split())
