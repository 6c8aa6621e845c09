"""Text sources: the embedded prose and own files of every kind, in fixed disjoint splits."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_mix.demo.python_docs import prose_paragraphs, python_documents
from data_mix.samples import Split
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source
from um3.core.errors import UserError

TEXTS = [f"This is document number {number}, and it is short." for number in range(200)]


def texts_of(config: TextSourceConfig, split: Split) -> list[str]:
    source = open_text_source(config, split=split)
    assert isinstance(source, TextSource) and source.name == config.name
    return [source[index] for index in range(len(source))]


def assert_splits(config: TextSourceConfig, everything: list[str]) -> None:
    train, val = texts_of(config, "train"), texts_of(config, "val")
    assert sorted(train + val) == sorted(everything)
    assert 0 < len(val) < len(train)
    assert train == texts_of(config, "train")


def test_python_docs_are_english_prose() -> None:
    python_documents.cache_clear()
    modules_before = set(sys.modules)
    documents = python_documents()
    assert set(sys.modules) - modules_before <= {"pydoc_data", "pydoc_data.topics"}, "modules are read, not imported"
    assert sum(len(document.text) for document in documents) > 800_000
    assert len({document.key for document in documents}) == len(documents)
    every_text = "\n".join(document.text for document in documents)
    assert ">>>" not in every_text and "::=" not in every_text and ":class:`" not in every_text
    words = every_text.lower().split()
    assert words.count("the") > 0.04 * len(words)
    assert max(len(document.text) for document in documents) < 8000
    assert_splits(TextSourceConfig(val_fraction=0.1), [document.text for document in documents])


def test_prose_is_told_from_code() -> None:
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
    config = TextSourceConfig(name="mine", path=str(tmp_path), val_fraction=0.2)
    passages = texts_of(config, "train") + texts_of(config, "val")
    assert sum(text.count("Paragraph") for text in passages) == 300
    assert max(len(text) for text in passages) < 4100
    assert sum(text.count("x") for text in passages) == 9000 and any(text.startswith("Über") for text in passages)
    one = TextSourceConfig(name="mine", path=str(tmp_path / "a.txt"), val_fraction=0.2)
    assert not set(texts_of(one, "train")) & set(texts_of(one, "val"))


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"id": number, "body": text}) for number, text in enumerate(TEXTS)]
    lines[3:3] = ["", json.dumps({"body": "  "})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert_splits(TextSourceConfig(name="j", path=str(tmp_path / "a.jsonl"), field="body", val_fraction=0.2), TEXTS)
    assert_splits(TextSourceConfig(name="j", path=str(tmp_path), field="body", val_fraction=0.2), TEXTS)


def test_jsonl_mistakes_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    config = TextSourceConfig(name="j", path=str(file))
    for line, message in (
        ("{broken", r"a.jsonl:2: not JSON"),
        ('{"body": "x"}', r"a.jsonl:2: no text in field 'text' \(has: body\)"),
        ("[1]", r"a.jsonl:2: no text in field 'text' \(has: list\)"),
    ):
        file.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(UserError, match=message):
            open_text_source(config, split="train")


def test_parquet_with_and_without_a_split_column(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    config = TextSourceConfig(name="p", path=str(file), val_fraction=0.2)
    pq.write_table(pa.table({"text": TEXTS}), file)
    assert_splits(config, TEXTS)
    parts = ["train", "validation", "test", "extra"] * 50
    pq.write_table(pa.table({"text": TEXTS, "split": parts}), file)
    assert texts_of(config, "train") == TEXTS[::4] and texts_of(config, "val") == TEXTS[1::4]
    pq.write_table(pa.table({"text": pa.array(["a", None]), "split": ["train", "train"]}), file)
    assert sorted(texts_of(TextSourceConfig(name="p", path=str(file), val_fraction=0.0), "train")) == ["", "a"]
    pq.write_table(pa.table({"text": TEXTS, "split": ["odd"] * 200}), file)
    with pytest.raises(UserError, match=r"no part is called train \(found: odd\)"):
        open_text_source(config, split="train")


def test_parquet_parts_by_file_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS[:100]}), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": TEXTS[100:150]}), tmp_path / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": TEXTS[150:]}), tmp_path / "test-00000-of-00001.parquet")
    config = TextSourceConfig(name="p", path=str(tmp_path / "*.parquet"))
    assert texts_of(config, "train") == TEXTS[:150] and texts_of(config, "val") == TEXTS[150:]


def test_parquet_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"words": TEXTS, "number": range(200)}), file)
    with pytest.raises(UserError, match=r"no column 'text' \(has: words, number\); set field"):
        open_text_source(TextSourceConfig(name="p", path=str(file)), split="train")
    with pytest.raises(UserError, match="'number' holds int64, not text"):
        open_text_source(TextSourceConfig(name="p", path=str(file), field="number"), split="train")
    file.write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match="cannot read parquet"):
        open_text_source(TextSourceConfig(name="p", path=str(file)), split="train")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TextSourceConfig(name="t", path="/absent/file.txt"), r"no \.txt file at '/absent/file\.txt'"),
        (TextSourceConfig(name="t", path="/absent/folder"), "no .txt, .jsonl or .parquet"),
        (TextSourceConfig(name="t", kind="jsonl"), "kind=jsonl needs a path"),
        (TextSourceConfig(name="t", kind="python_docs", path="x"), "takes no path"),
        (TextSourceConfig(name="t", val_fraction=1.0), r"val_fraction=1.0 is outside \[0, 1\)"),
        (TextSourceConfig(name="t", val_fraction=0.0), "nothing for the val split"),
    ],
)
def test_mistakes_are_one_line(config: TextSourceConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_text_source(config, split="val")
    assert "\n" not in str(caught.value)


def test_txt_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="not UTF-8"):
        open_text_source(TextSourceConfig(name="t", path=str(tmp_path)), split="train")
