"""English prose that every Python carries: the language reference and the docstrings of the standard library.

This is the text of the demo, which needs no download. The modules are parsed, never imported: some open a browser or a
window at import. The text depends a little on the Python version, so report that version with numbers measured on it.
Licence: PSF License Agreement.
"""

import ast
import functools
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "ensurepip"}) | {  # not part of the library
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data",  # no prose
}  # fmt: skip
MIN_WORDS = 5  # shorter paragraphs are headings and labels
MIN_PROSE = 0.93  # share of letters, spaces and plain punctuation; tables, signatures and grammar have less
MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 3000  # about 750 tokens

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_PROSE = re.compile(r"[A-Za-z ,.;:'’“”\"()!?-]")
_ROLE = re.compile(r":[a-z:]+:`~?([^`]+)`")
_LIST_MARK = re.compile(r"^(?:[*\-•]|\(?\d+[.)]|[a-z]\))\s+")
_CODE_START = (">>>", "...", "$ ", "::=", "|", "+-", "@", "#", "def ", "class ", "import ", "from ")


class Document(NamedTuple):
    """A piece of prose of a few thousand characters, with a blank line between paragraphs."""

    key: str
    text: str


@functools.lru_cache(maxsize=1)
def python_documents() -> tuple[Document, ...]:
    """All documents of this Python in a fixed order, without repeated paragraphs. Takes about 3 s, once a process."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents: list[Document] = []
    for name, texts in (*((f"topic/{name}", [topics[name]]) for name in sorted(topics)), *_modules()):
        paragraphs = dict.fromkeys(paragraph for text in texts for paragraph in prose_paragraphs(text))
        new = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(new)
        for number, text in enumerate(packed(new, max_chars=MAX_DOCUMENT_CHARS)):
            if len(text) >= MIN_DOCUMENT_CHARS:
                documents.append(Document(f"{name}#{number}", text))
    return tuple(documents)


def _modules() -> Iterator[tuple[str, list[str]]]:
    """Path and docstrings, in the order of the file, of every module of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(path.parts):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):  # templates, and files that are invalid on purpose
                continue
            yield f"library/{path.as_posix()}", list(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Depth first, which is the order of the file."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)


def prose_paragraphs(text: str) -> Iterator[str]:
    """The English sentences of a documentation text, a paragraph a line, without code, tables, headings and lists."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        if any(line.startswith(_CODE_START) or "::=" in line for line in lines):
            continue
        paragraph = _ROLE.sub(r"\1", " ".join(lines)).replace("``", "").replace("`", "")
        paragraph = re.sub(r"\s+", " ", _LIST_MARK.sub("", paragraph)).strip()
        is_sentence = re.match(r"[\"'“(]", paragraph) or paragraph[:1].isupper()
        is_sentence = is_sentence and paragraph.endswith((".", "!", "?", ":", ")", "”", '"'))
        is_long = len(paragraph.split()) >= MIN_WORDS
        if is_sentence and is_long and len(_PROSE.findall(paragraph)) >= MIN_PROSE * len(paragraph):
            yield paragraph


def packed(paragraphs: Iterable[str], *, max_chars: int) -> Iterator[str]:
    """Join consecutive paragraphs by blank lines to texts of at most `max_chars`, or one longer paragraph."""
    texts: list[str] = []
    num_chars = 0
    for paragraph in paragraphs:
        if texts and num_chars + len(paragraph) > max_chars:
            yield "\n\n".join(texts)
            texts, num_chars = [], 0
        texts.append(paragraph)
        num_chars += len(paragraph) + 2
    if texts:
        yield "\n\n".join(texts)
