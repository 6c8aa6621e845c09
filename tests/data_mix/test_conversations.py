"""The reader of LLaVA's JSON: its rules, splits, images, and entries that cannot be used."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import data_mix.conversations
import data_mix.json_values
from data_mix.conversations import BROKEN, Turn, open_conversations, parse_entry
from data_mix.json_values import json_values
from data_mix.samples import BadSample
from data_mix.sources.config import ConversationSourceConfig
from um3.core.errors import UserError


def says(*values, begins="human"):
    roles = ["human", "gpt"] if begins == "human" else ["gpt", "human"]
    return [{"from": roles[index % 2], "value": value} for index, value in enumerate(values)]


def entry(number, image=None):
    mark = " <image>" if image else ""
    turns = {"id": str(number), "conversations": says(f"how é{number}?{mark}", f"so ☃{number}.")}
    return turns | ({"image": image} if image else {})


def opened(path, content=None, *, split="train", check_images=False, **options):
    """The conversations of a file, which is written first if there is `content`: bytes, or what to write as JSON."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    options = {"val_fraction": 0.0, "images": str(path.parent)} | options
    config = ConversationSourceConfig("talk", kind="llava", path=str(path), **options)
    return open_conversations(config, split=split, check_images=check_images)


def lines(entries):
    return "\r\n".join(json.dumps(item, ensure_ascii=False) for item in entries).encode()


FORMS = {
    "list": lambda entries: json.dumps(entries).encode(),
    "indented": lambda entries: b"\xef\xbb\xbf\n" + json.dumps(entries, indent=2, ensure_ascii=False).encode(),
    "lines": lines,
}


@pytest.mark.parametrize("form", FORMS)
def test_entries_become_turns_without_the_mark_of_the_image(form, tmp_path):
    entries = [
        {"id": 1, "image": "./coco/a.jpg", "conversations": says("<image>\nWhat é is it? ", " A dog.")},
        {"image": "coco\\b.jpg", "conversations": says("Where?\n<image>", "There", "Why? </s>", "So", "", "x")},
        {"id": "3", "model": "", "conversations": says("hello", "How?", "By <b>.", begins="gpt")},
    ]
    found = list(opened(tmp_path / "talk.json", FORMS[form](entries)))
    assert [conversation[1:] for conversation in found] == [
        ("coco/a.jpg", (Turn("What é is it?", "A dog."),)),
        ("coco/b.jpg", (Turn("Where?", "There"), Turn("Why? </s>", "So"), Turn("", "x"))),
        (None, (Turn("How?", "By <b>."),)),
    ]
    assert len({conversation.key for conversation in found}) == 3


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (BROKEN, "broken JSON"),
        (3, "not a conversation"),
        ({}, "not a conversation"),
        ({"conversations": [{"from": "human"}]}, "not a conversation"),
        ({"conversations": says("a", 3)}, "not a conversation"),
        ({"conversations": "ab"}, "not a conversation"),
        ({"image": ["a.jpg"], "conversations": says("<image>", "b")}, "not a conversation"),
        ({"conversations": []}, "no human turn"),
        ({"conversations": says("a", begins="gpt")}, "no human turn"),
        ({"conversations": [*says("a", "b"), *says("c", begins="gpt")]}, "roles do not alternate"),
        ({"conversations": [{"from": "system", "value": "s"}, *says("a", "b")]}, "roles do not alternate"),
        ({"conversations": says("a")}, "last question without an answer"),
        ({"conversations": says("a", "b", "c")}, "last question without an answer"),
        ({"conversations": says("a", " ")}, "empty answer"),
        ({"image": "a.jpg", "conversations": says("<image><image>", "b")}, "more than one <image>"),
        ({"image": "a.jpg", "conversations": says("<image>", "b", "<image>", "c")}, "more than one <image>"),
        ({"image": "a.jpg", "conversations": says("<image>", "<image>")}, "<image> in an answer"),
        ({"conversations": says("<image>", "b")}, "<image> without an image"),
        ({"image": "a.jpg", "conversations": says("a", "b")}, "image without <image> in the first question"),
        ({"image": "a.jpg", "conversations": says("a", "b", "<image>", "c")}, "image without <image>"),
        *(
            ({"image": path, "conversations": says("<image>", "b")}, "image path outside the folder")
            for path in ("../a.jpg", "b/../../a.jpg", "/etc/a.jpg", "C:\\a.jpg", "..\\a.jpg", "..")
        ),
    ],
)
def test_an_entry_that_breaks_a_rule_has_its_reason(item, reason):
    with pytest.raises(BadSample) as caught:
        parse_entry(item)
    assert caught.value.reason.startswith(reason)


def test_entries_that_cannot_be_used_are_skipped_counted_and_named(tmp_path, caplog):
    entries = [entry(0), None, {"conversations": []}, {"conversations": []}, entry(1)]
    source = opened(tmp_path / "talk.json", entries)
    assert [turns[0].answer for *_, turns in source] == ["so ☃0.", "so ☃1."]
    assert "talk': 2 samples; not a conversation: 1 (such as byte" in caplog.text
    assert "no human turn: 2 (such as byte" in caplog.text
    with pytest.raises(UserError, match=r"not a conversation; repair it, or set skip_bad_files=true"):
        opened(tmp_path / "talk.json", entries, skip_bad_files=False)


BREAKS = {
    "comma": ('"id": "3", ', '"id": "3" '),
    "quote": ('so \\u26033."', "so \\u26033."),
    "open quote": ('"id": "3"', '"id: "3"'),
    "brace": ('"so \\u26033."}', '"so \\u26033."'),
    "word": ('{"id": "3"', 'oops {"id": "3"'),
    "escape": ("so \\u26033.", "so \\x3."),
    "bytes": ("so \\u26033.", "so \xff3."),
    "deep": ('"id": "3"', f'"id": {"[" * 100_000}'),
    "digits": ('"id": "3"', f'"id": {"3" * 5000}'),
}


@pytest.mark.parametrize("window", [None, 1024], ids=["whole", "windows"])
@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("kind", BREAKS)
def test_one_broken_entry_costs_that_entry(kind, form, window, tmp_path, monkeypatch, caplog):
    if window:
        monkeypatch.setattr(data_mix.json_values, "WINDOW_BYTES", window)
    entries = [entry(number, f"{number}.png" if number % 2 else None) for number in range(40)]
    before, after = BREAKS[kind]
    text = json.dumps(entries) if form == "list" else "\n".join(map(json.dumps, entries))
    assert text.count(before) == 1
    source = opened(tmp_path / "talk.json", text.replace(before, after).encode("latin-1"))
    found = [int(turns[0].question[5:-1]) for *_, turns in source]
    expected = [number for number in range(40) if number != 3]
    assert found == expected or (kind == "word" and found == list(range(40)))
    assert caplog.text.count("broken JSON: 1 (such as byte") == 1


def test_a_list_that_was_cut_off_is_told(tmp_path, caplog):
    text = json.dumps([entry(0), entry(1)]).encode()
    assert len(opened(tmp_path / "talk.json", text[:-20])) == 1
    assert "broken JSON" in caplog.text
    caplog.clear()
    assert len(opened(tmp_path / "talk.json", text[:-1])) == 2
    assert "broken JSON: 1" in caplog.text


@pytest.mark.parametrize("window", [64, 500, 2**24])
def test_places_are_those_of_the_file_for_any_window(window, tmp_path, monkeypatch):
    monkeypatch.setattr(data_mix.json_values, "WINDOW_BYTES", window)
    values = [{"k": "é☃" * (number % 4), "n": [{}, {"a": number}]} for number in range(50)]
    for form in FORMS.values():
        (tmp_path / "a.json").write_bytes(form(values))
        found = list(json_values(tmp_path / "a.json", key="k"))
        if window == 64:  # values of more than half a window count as broken
            assert any(value is BROKEN for *_, value in found)
            found = [(*place, value) for *place, value in found if value is not BROKEN]
            assert all(value in values for *_, value in found)
        else:
            assert [value for *_, value in found] == values
        data = (tmp_path / "a.json").read_bytes()
        assert [json.loads(data[start : start + size]) for start, size, _ in found] == [value for *_, value in found]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no .json or .jsonl file"),
        (b"", "neither a JSON list nor JSON lines"),
        (b"version https://git-lfs", "neither a JSON list nor JSON lines"),
        (b"[", "no sample in its 1 llava files"),
        (b"[]", "no sample in its 1 llava files"),
        (b'{"questions": []}', "not a conversation: 1"),
    ],
)
def test_a_file_without_conversations_is_one_line(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "talk.json", content)


def save_image(path, value=7):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((30, 50, 3), value, dtype=np.uint8)).save(path)


def test_all_turns_of_an_image_are_in_one_split(tmp_path):
    entries = [entry(number, f"{number % 40}.png") for number in range(200)] + [entry(number) for number in range(50)]
    train, val = (opened(tmp_path / "talk.json", entries, split=split, val_fraction=0.3) for split in ("train", "val"))
    images = [{image for _, image, _ in source if image} for source in (train, val)]
    assert not images[0] & images[1] and len(images[0] | images[1]) == 40 and len(train) + len(val) == 250
    assert any(image is None for _, image, _ in val)


def test_missing_and_broken_images_are_found_before_the_start(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "images"
    for number in range(6):
        save_image(folder / f"{number}.png", number)
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-40])
    (folder / "3.png").write_bytes(b"not an image")
    entries = [entry(number, f"{number % 6}.png") for number in range(12)] + [entry(12)]
    options = {"images": str(folder), "check_images": True}
    source = opened(tmp_path / "talk.json", entries, **options)
    assert [image for _, image, _ in source] == ["0.png", "4.png", "5.png"] * 2 + [None]
    assert "talk': 7 samples" in caplog.text
    for number, reason in enumerate(("missing image", "truncated", "not an image"), start=1):
        assert f"{reason}: 2 (such as {number}.png)" in caplog.text
    assert source.read_image(source[1]).tolist() == [[[4] * 3] * 50] * 30

    # The images that could be read are not read again, the others are.
    save_image(folder / "1.png", 1)
    read, read_image = [], data_mix.conversations.read_image
    monkeypatch.setattr(data_mix.conversations, "read_image", lambda path: read.append(path.name) or read_image(path))
    again = opened(tmp_path / "talk.json", **options)
    assert sorted(read) == ["1.png", "2.png", "3.png"] and len(again) == 9
    assert source.fingerprint() != again.fingerprint()
    (folder / "0.png").unlink()
    with pytest.raises(BadSample, match=r"missing image: 0\.png"):
        again.read_image(again[0])

    assert len(opened(tmp_path / "talk.json", entries, images="")) == 13  # training on codes reads no image
    for images, message in (("nowhere", "no folder 'nowhere'"), (str(tmp_path), r"missing image: 6.*set images to")):
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "talk.json", [*entries[:6], entry(12)], images=images, check_images=True)
    with pytest.raises(UserError, match="skip_bad_files=true"):
        opened(tmp_path / "talk.json", entries, **options, skip_bad_files=False)


def test_the_parsed_entries_are_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data_mix.json_values, "WINDOW_BYTES", 2**18)
    words = "word " * 400
    path = tmp_path / "talk.json"
    entries = [{"id": str(number), "conversations": says(f"{number} {words}", words)} for number in range(5000)]
    path.write_bytes(json.dumps(entries).encode())
    size = path.stat().st_size
    del entries
    tracemalloc.start()
    try:
        source = opened(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 20e6 and peak < 0.2 * size and kept < 0.05 * size
    assert source[4321].turns[0].question.startswith("4321 ")


def test_a_folder_of_files_and_the_fingerprint(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([entry(0)]))
    (tmp_path / "b.jsonl").write_bytes(lines([entry(1), entry(2)]))
    source = opened(tmp_path)
    assert [key.partition("#")[0] for key, *_ in source] == ["a.json", "b.jsonl", "b.jsonl"]
    before = source.fingerprint()
    (tmp_path / "a.json").write_text(json.dumps([entry(3)]))
    assert opened(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "kind=llava needs a path"),
        ({"kind": "scenes", "path": "a.json"}, "kind=scenes takes no path"),
        ({"path": "a.json", "stream": 5}, "stream are not for conversations"),
        ({"kind": "digits", "preset": "coco"}, "preset and stream are not"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        open_conversations(ConversationSourceConfig("talk", **options), split="train")
