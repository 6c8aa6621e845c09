"""Text sources: the built-in prose and files of every kind, in fixed disjoint splits."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_mix.demo.python_docs import prose_paragraphs, python_documents
from data_mix.samples import Split
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source
from um3.core.errors import UserError

TEXTS = [f"This is document number {number}, and it is short." for number in range(200)]


def config(path: Path | str = "", **options: Any) -> TextSourceConfig:
    return TextSourceConfig(name="mine", path=str(path), **{"val_fraction": 0.2, **options})


def texts_of(config: TextSourceConfig, split: Split = "train") -> list[str]:
    source = open_text_source(config, split=split)
    assert isinstance(source, TextSource) and source.name == config.name
    return list(source)


def assert_splits(config: TextSourceConfig, texts: list[str]) -> None:
    train, val = texts_of(config), texts_of(config, "val")
    assert sorted(train + val) == sorted(texts) and 0 < len(val) < len(train) and train == texts_of(config)


@pytest.mark.slow
def test_python_docs_are_english_prose() -> None:
    modules_before = set(sys.modules)
    documents = python_documents()
    assert set(sys.modules) - modules_before <= {"pydoc_data", "pydoc_data.topics"}, "modules are read, not imported"
    text = "\n".join(document.text for document in documents)
    assert len(text) > 800_000 and max(len(document.text) for document in documents) < 8000
    assert len({document.key for document in documents}) == len(documents)
    assert ">>>" not in text and "::=" not in text and ":class:`" not in text
    words = text.lower().split()
    assert words.count("the") > 0.04 * len(words)
    assert_splits(config(val_fraction=0.1), [document.text for document in documents])


def test_prose_is_separated_from_code() -> None:
    text = """Heading
*******

This sentence wraps over
two lines and names a :class:`~os.PathLike` object.

   stmt ::= "with" expression

>>> print("code is left out of the prose.")
code is left out of the prose.

1. Numbers of list items are dropped from their sentences.

x = function(argument_one, argument_two=None, *rest)
"""
    assert list(prose_paragraphs(text)) == [
        "This sentence wraps over two lines and names a os.PathLike object.",
        "Numbers of list items are dropped from their sentences.",
    ]


def test_txt_files_become_passages(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    paragraphs = [f"Paragraph {number}. " + "Words follow. " * 60 for number in range(300)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("\ufeffÜber\n\n \n\nmuch " + "x" * 9000, encoding="utf-8")
    passages = texts_of(config(tmp_path)) + texts_of(config(tmp_path), "val")
    assert sum(text.count("Paragraph") for text in passages) == 300 and max(map(len, passages)) < 4100
    assert sum(text.count("x") for text in passages) == 9000 and any(text.startswith("Über") for text in passages)
    file = config(tmp_path / "a.txt")
    assert not set(texts_of(file)) & set(texts_of(file, "val"))


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"id": number, "body": text}) for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for path in (tmp_path / "a.jsonl", tmp_path):
        assert_splits(config(path, field="body"), TEXTS)
    with pytest.raises(UserError, match="val split; raise val_fraction"):
        texts_of(config(tmp_path, field="body", val_fraction=0.0), "val")


def test_a_file_that_vanishes_is_an_error_unless_it_may_be_skipped(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "fine"}\n' * 3)
    source = open_text_source(config(tmp_path, val_fraction=0.0, skip_bad_files=False), split="train")
    (tmp_path / "1.jsonl").unlink()
    assert source[2] == "fine"
    with pytest.raises(UserError, match=r"1\.jsonl.*set skip_bad_files=true"):
        source[3]


def test_parquet_splits_by_file_name(tmp_path: Path) -> None:
    for name, texts in (("train-0", TEXTS[:100]), ("train-1", TEXTS[100:150]), ("test-0", TEXTS[150:])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet")
    both = config(tmp_path / "*.parquet")
    assert texts_of(both) == TEXTS[:150] and texts_of(both, "val") == TEXTS[150:]
