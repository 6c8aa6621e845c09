"""Conversations in LLaVA's JSON with their images, about their colours."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def entry(index: int, image: str | None, *answers: str) -> dict[str, Any]:
    """One conversation in LLaVA's form."""
    turns = []
    for number, answer in enumerate(answers):
        mark = "<image>\n" if image is not None and number == 0 else ""
        turns += [{"from": "human", "value": f"{mark}question {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"c{index}", "conversations": turns} | ({} if image is None else {"image": image})


def write_conversations(folder: Path, *, num_images: int = 24, num_texts: int = 8) -> Path:
    """`conversations.json` and its images: image i has a colour and a size of its own, texts grow with i."""
    entries = []
    for index in range(num_images):
        name = list(COLOURS)[index % 3]
        Image.new("RGB", (30 + index, 20), COLOURS[name]).save(folder / f"{index:02d}.png")
        entries.append(entry(index, f"{index:02d}.png", name, " ".join(["yes"] * (index + 1))))
    entries += [entry(100 + index, None, " ".join(["no"] * (index + 1))) for index in range(num_texts)]
    (folder / "conversations.json").write_text(json.dumps(entries))
    return folder / "conversations.json"
