"""A pipeline as users of transformers and diffusers handle one: called, moved, saved, uploaded; and its model cards."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl

from um3.core.errors import UserError
from um3.inference.generate import choose
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import Sampling
from um3.model.language_model import render_card

TEMPLATE = Path(__file__).parents[3] / "um3/model/export_card.md"


def test_a_call_generates_and_returns_pil_images(pipeline: UM3Pipeline) -> None:
    called, generated = pipeline("a red disk", seed=3), pipeline.generate(["a red disk"], seed=3)
    assert called.images[0].size == (16, 16) and np.array_equal(np.asarray(called.images[0]), generated.arrays[0])


def test_the_device_is_chosen_and_the_pipeline_moves(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = UM3Pipeline.from_pretrained(model_folder)
    assert pipeline.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pipeline.to("cpu", dtype=torch.bfloat16) is pipeline and pipeline.model.dtype == torch.bfloat16
    assert pipeline.qlip.dtype == torch.float32 and len(pipeline("a red disk").images) == 1
    assert pipeline.to(torch.float32).model.dtype == torch.float32
    assert {parameter.device.type for parameter in pipeline.to("meta").qlip.parameters()} == {"meta"}
    monkeypatch.setattr("um3.core.distributed.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)mps"):  # no Mac is at hand: it was asked for
        UM3Pipeline.from_pretrained(model_folder)


def test_sampling_without_float64_chooses_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV, uniforms_B = torch.randn(200, 50, generator=torch.manual_seed(0)) * 3, torch.rand(200).double()
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01)
    wide = choose(logits_BV, sampling=sampling, uniforms_B=uniforms_B)
    monkeypatch.setattr("um3.inference.generate.widest_float", lambda device: torch.float32)
    narrow = choose(logits_BV, sampling=sampling, uniforms_B=uniforms_B.float())
    assert (wide == narrow).float().mean() > 0.98


def test_a_saved_pipeline_loads_and_keeps_its_card_and_defaults(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("edited by its owner")
    pipeline = UM3Pipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.model.model.norm.weight.mul_(1.5)
    pipeline.save_pretrained(tmp_path / "saved")
    saved = UM3Pipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved("a red disk", seed=1).codes, pipeline("a red disk", seed=1).codes)
    assert (tmp_path / "saved/README.md").read_text() == "edited by its owner"
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {path.name for path in folder.iterdir()}
    assert (tmp_path / "saved/generation_config.json").read_text() == (folder / "generation_config.json").read_text()


def test_what_is_uploaded_is_what_is_saved(
    pipeline: UM3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[tuple[str, set[str]]] = []
    address = RepoUrl("https://huggingface.co/somebody/um3")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: address)

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert pipeline.push_to_hub("somebody/um3") == str(address)
    pipeline.save_pretrained(tmp_path / "saved")
    assert uploads == [("somebody/um3", {path.name for path in (tmp_path / "saved").iterdir()})]


def test_an_upload_that_fails_is_one_line(pipeline: UM3Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nothing listens there
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    for repo_id in ("somebody/um3", "not a name"):
        with pytest.raises(UserError, match=rf"cannot upload to '{repo_id}' \(.*hf auth login"):
            pipeline.push_to_hub(repo_id)


def test_the_metadata_of_a_card(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"architecture": "LlamaForCausalLM", "entries": 9, "parameters": 99, "tied": True}
    base = {"name": "HuggingFaceTB/SmolLM2-135M", "architecture": "LlamaForCausalLM", "license": "apache-2.0"}
    options: dict[str, Any] = {"pipeline_tag": "text-generation", **facts}
    data = ModelCard(render_card(TEMPLATE, base=base, qlip_license="", **options)).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("apache-2.0", base["name"], "text-generation")
    (tmp_path / "base").mkdir()
    card = ModelCard(render_card(TEMPLATE, base=base | {"name": str(tmp_path / "base")}, qlip_license="nc", **options))
    assert (card.data.license, card.data.base_model) == ("other", None) and "trained with: nc" in card.text
