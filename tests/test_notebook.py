"""docs/own_images.ipynb runs from top to bottom, and is stored without outputs."""

import json
import os
import re

import pytest

from tests.helpers.processes import ROOT

NOTEBOOK = ROOT / "docs/own_images.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs_and_its_links_lead_somewhere():
    assert CELLS and [cell for cell in CELLS if cell["outputs"] or cell["execution_count"]] == []
    links = re.findall(r"\]\(([\w.]+)[#)]", NOTEBOOK.read_text())
    assert len(links) >= 3 and all((NOTEBOOK.parent / link).exists() for link in links)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "notebook"}
    for number, cell in enumerate(CELLS):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert len(names["captions"]) == len(names["drawn"]) == 4 and all(names["captions"])
