"""What UM3's training starts from: a language model, calibrated once a run, or the folder of a UM3."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.train.conftest import arguments, run_here
from train.recipes.um3_init import main as init
from um3.core.errors import UserError
from um3.core.metrics import read_metrics
from um3.model.text_tokenizer import train_text_tokenizer

GAINS = "cache/qk_norm_gains.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a text tokenizer that has the image marks already."""
    folder = tmp_path_factory.mktemp("base")
    text_tokenizer = train_text_tokenizer(["a module of the standard library"] * 3, vocab_size=280)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=280, initializer_range=0.5, **sizes)).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(base: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UM3 made of `base` for the codes of `made`."""
    out = tmp_path_factory.mktemp("run") / "um3-init"
    init(
        [
            f"base_model={base}",
            f"visual_tokenizer={made}/stage2/model",
            f"output_dir={out}",
            "subtokens=2",
            "rows=2",
            "seq_len=32",
        ]
    )
    return out / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_training_goes_on_from_a_um3_folder_as_it_is(
    start: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"model.base_model={start}", "vocabulary.bit_embeddings=false", "loop.max_steps=1"]
    still = [*options, "optimizer.lr=1e-12", "optimizer.weight_decay=0", "engine.activation_checkpointing=true"]
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/still", *still))
    before, after = weights(start), weights(tmp_path / "still/model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert not (tmp_path / "still" / GAINS).exists()
    card = (tmp_path / "still/model/README.md").read_text()
    assert "state: trained" in card and "`LlamaForCausalLM` with 280 text entries" in card
    run_here(monkeypatch, arguments("um3", made, f"loop.output_dir={tmp_path}/moved", *options, "optimizer.lr=1e-2"))
    assert not torch.equal(weights(tmp_path / "moved/model")["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.qk_norm=false", r"with query-key normalisation; set model\.qk_norm=true"),
        ("vocabulary.subtokens=3", r"into 2 x 6 bits, the config into 3 x 6; set vocabulary\.subtokens=2"),
        ("vocabulary.tokenizer=somewhere", "its own text tokenizer"),
    ],
)
def test_a_config_that_contradicts_the_folder_is_refused(
    override: str, line: str, start: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=line):
        run_here(
            monkeypatch,
            arguments("um3", made, f"loop.output_dir={tmp_path}/um3", f"model.base_model={start}", override),
        )


def test_another_tokenizer_or_another_start_is_refused(
    start: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"loop.output_dir={tmp_path}/um3", f"model.base_model={tmp_path}/start", "loop.max_steps=1"]
    shutil.copytree(start, tmp_path / "start")
    with pytest.raises(UserError, match=r"was made for visual tokenizer \w+, but qlip="):
        run_here(monkeypatch, arguments("um3", made, *options, f"visual_tokenizer={made}/stage1/model"))
    shutil.rmtree(tmp_path / "um3")
    run_here(monkeypatch, arguments("um3", made, *options))
    tensors = load_file(tmp_path / "start/model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "start/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="made from other inputs"):
        run_here(monkeypatch, arguments("um3", made, *options))


def test_a_base_is_calibrated_once_a_run(
    base: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        f"model.base_model={base}",
        f"loop.output_dir={tmp_path}/um3",
        "optimizer.lr=1e-12",
        "optimizer.weight_decay=0",
    ]
    run_here(monkeypatch, arguments("um3", made, *options, "loop.max_steps=2"))
    gains = load_file(tmp_path / "um3" / GAINS)
    name = "model.layers.0.self_attn.q_norm.weight"
    torch.testing.assert_close(weights(tmp_path / "um3/model")[name], gains[name], rtol=0, atol=1e-6)
    # Made anew in the same folder, the run takes the gains that lie there: these could not have been fitted.
    shutil.rmtree(tmp_path / "um3/checkpoints")
    (tmp_path / "um3/done.json").unlink()
    save_file({key: torch.full_like(gain, 7.0) for key, gain in gains.items()}, tmp_path / "um3" / GAINS)
    run_here(monkeypatch, arguments("um3", made, *options, "loop.max_steps=2"))
    assert (weights(tmp_path / "um3/model")[name] - 7).abs().max() < 1e-5


def test_new_rows_can_be_random(base: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [f"model.base_model={base}", "optimizer.lr=1e-12", "loop.max_steps=1", "vocabulary.bit_embeddings=false"]
    spreads = {}
    for rows in ("mean", "random"):
        folder = tmp_path / rows
        run_here(
            monkeypatch, arguments("um3", made, *options, f"loop.output_dir={folder}", f"model.new_token_init={rows}")
        )
        spreads[rows] = weights(folder / "model")["lm_head.weight"][280:].std(0).mean().item()
    assert spreads["mean"] < 1e-6 and spreads["random"] == pytest.approx(0.5, rel=0.1)


def test_streamed_text_is_needed_once_a_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary, the tokens and the guard's rows are made at the first start; no later one needs the hub."""
    monkeypatch.chdir(tmp_path)
    words = tmp_path / "own" / "words"
    words.mkdir(parents=True)
    texts = [f"Sentence {number} of a text that is as long as it has to be, and not longer." for number in range(60)]
    (words / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = "data.texts=[{name: h, kind: hub, path: own/words, stream: 50, val_fraction: 0.1}]"
    command = arguments(
        "um3",
        made,
        f"loop.output_dir={tmp_path}/run",
        source,
        "text_validation.every_steps=2",
        "text_validation.num_sequences=2",
    )

    def losses() -> list[Any]:
        run_here(monkeypatch, command)
        keys = ("train/loss", "text_validation/text_loss")
        return [[row.get(key) for key in keys] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]

    first = losses()
    shutil.rmtree(words)
    for name in ("model", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    for name in ("done.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    assert losses() == first and first[-1][1] is not None
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"hub set own/words\): cannot be opened"):
        losses()
