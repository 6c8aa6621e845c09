"""The benchmarks run at a small size, and count and compare what they say they do."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory, tokenizer, training
from benchmarks.flops import judge_flops, qlip_flops
from benchmarks.peak import measure_peak
from benchmarks.runs import OutOfMemory, run_apart
from data_mix.sources.image_sources import ImageSourceConfig
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from train.config import QLIPSizeConfig, Stage1Config, Stage2Config, TextTowerConfig
from train.recipes.tokenizer_setup import new_tokenizer, open_sources, save_tokenizer
from um3.core import onednn
from um3.core.config import load_config
from um3.core.errors import UserError

ROOT = Path(__file__).parents[2]
TINY_TOWER = ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=48")
TINY = [*(f"model.{key}" for key in TINY_TOWER), *(f"text.{key}" for key in (*TINY_TOWER, "vocab_size=300"))]
SCENES = "data.sources=[{name: scenes, kind: scenes, length: 200}]"


def call(monkeypatch: pytest.MonkeyPatch, main: object, *arguments: str) -> None:
    """A benchmark's `main` in this process."""
    assert callable(main)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    main()


@pytest.fixture(scope="module")
def qlip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained QLIP of the demo's image size."""
    folder = tmp_path_factory.mktemp("qlip") / "model"
    model = QLIPSizeConfig(
        image_size=32, patch_size=8, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, bits=12
    )
    text = TextTowerConfig(
        vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, max_tokens=24
    )
    data = Stage1Config().data
    data.sources = [ImageSourceConfig(length=200)]
    sources = open_sources(data, size=32, seed=0)
    qlip, processor = new_tokenizer(model, text, sources=sources, seed=0)
    save_tokenizer(folder, qlip=qlip, processor=processor, weights={})
    return folder


def test_the_plain_transcription_computes_the_same() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    functions = tokenizer._PlainFunctions(torch.nn.functional)
    for is_causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(functions.scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)


def test_the_tokenizer_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--variants", "B-8", "--image-size", "32", "--layers", "1", "--batch", "2", "--repeats", "1"]
    call(monkeypatch, tokenizer.main, *small, "--device", "cpu", "--precision", "bf16")
    line, numbers = capsys.readouterr().out.splitlines()
    assert line.startswith("B-8: ") and "x the memory" in line
    assert "images/s in bf16, plain" in line and "in float32" in line
    found = json.loads(numbers)
    assert (found["batch"], found["device"], found["precision"], found["compile"]) == (2, "cpu", "bf16", None)
    for kind in ("ours", "plain"):
        (run,) = found[kind]
        assert run["seconds"] == run["encode"] + run["decode"] > 0 and run["peak_gib"] >= 0


@pytest.mark.parametrize(("variant", "folder"), [("B-16", "paper"), ("B-8", "qlip_b8"), ("L-14", "qlip_l14")])
def test_the_variants_are_those_of_the_configs(variant: str, folder: str) -> None:
    model = load_config(Stage1Config, path=ROOT / f"configs/{folder}/stage1.yaml").model
    assert tokenizer.VARIANTS[variant] == {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
    }


def test_what_is_compiled_is_one_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is cut in two costs a launch, and what lies between is not compiled."""
    compile_ = torch.compile
    compiled = []

    def traced(function: object, *, mode: str) -> object:
        compiled.append(mode)
        return compile_(function, backend="eager", fullgraph=True)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", traced)
    small = {"variants": ["B-16"], "image_size": 32, "layers": 1, "batch": 2, "threads": None}
    asked = argparse.Namespace(one="ours", device="cpu", precision="bf16-true", compile="reduce-overhead", **small)
    found = tokenizer.measure(asked)
    assert compiled == ["reduce-overhead"] * 2
    assert found["seconds"] > 0 and "peak_gib" not in found


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (tokenizer.main, ["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (tokenizer.main, ["--batch", "-3"], "--batch is -3; it must be at least 1"),
        (tokenizer.main, ["--layers", "0"], "--layers is 0"),
        (tokenizer.main, ["--image-size", "0"], "--image-size is 0"),
        (tokenizer.main, ["--image-size", "40", "--variants", "B-8", "B-16"], "40; B-16 needs a multiple .* 16"),
        (training.main, ["--steps", "0"], "--steps is 0"),
        (training.main, ["--warmup", "0"], "--warmup is 0"),
        (training.main, ["--peak-tflops", "0"], "--peak-tflops is 0"),
        (training.main, ["--stages", "stage2"], "give --tokenizer"),
        (memory.main, ["--batches", "8", "0"], "--batches is 0"),
    ],
)
def test_bad_numbers_are_refused(
    main: object, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=message):
        call(monkeypatch, main, *arguments)


def test_a_process_that_fails_gives_one_line() -> None:
    with pytest.raises(UserError, match=r"^a run: --batch is 0; it must be at least 1$"):
        run_apart(["benchmarks.tokenizer", "--batch", "0"], label="a run")
    with pytest.raises(UserError, match=r"^a run: ValueError: no such thing$"):
        run_apart(["timeit", "-n1", "-r1", "raise ValueError('no such thing')"], label="a run")
    with pytest.raises(OutOfMemory, match="a smaller batch or model"):
        run_apart(["timeit", "-n1", "-r1", "import os; os.kill(os.getpid(), 9)"], label="a run")


@pytest.mark.parametrize("swiglu", [True, False])
def test_the_formula_counts_what_torch_counts(swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "AVAILABLE", False)  # torch has no count for it
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, swiglu=swiglu)
    tower |= dict(image_size=24, patch_size=8)
    text = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, vocab_size=99)
    config = QLIPConfig(
        text_config=text | {"bos_token_id": 0, "eos_token_id": 2},
        vision_config=tower | {"quantizer_cfg": {"embed_dim": 12}, "hidden_size_post_q": 16},
        decoder_config=tower | {"hidden_size": 16, "num_hidden_layers": 1},
        projection_dim=24,
    )
    qlip, images, tokens = QLIPModel(config), 3, 7
    pixels_BCHW, input_ids_BT = torch.randn(images, 3, 24, 24), torch.ones(images, tokens, dtype=torch.long)
    expected = qlip_flops(config, text_tokens=tokens)
    logits = 2 * images**2 * 24
    # torch has no count for the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = qlip(pixels_BCHW, input_ids_BT)
        assert counter.get_total_flops() == images * sum(expected) + logits
        (output.reconstructions.sum() + output.image_embeds.sum() + output.text_embeds.sum()).backward()
    to_pixels = 2 * 9 * 3 * 8**2 * 32  # nobody asks for the gradient of the pixels
    assert counter.get_total_flops() == images * (expected.stage1 - to_pixels) + logits

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            hidden_BTD = qlip.vision_model(pixels_BCHW)
        qlip.decode_quantized(qlip.vision_model.quantize(hidden_BTD, entropy=True).quantized_BNL).sum().backward()
    to_encoder = 2 * 9 * 32 * 32
    assert counter.get_total_flops() == images * (expected.stage2 - to_encoder)


def test_stage_2_counts_the_networks_that_it_uses() -> None:
    config = Stage2Config()
    whole = judge_flops(config, image_size=64)
    assert whole["perceptual"] > 0 and whole["discriminator"] > 0
    config.loss.r1 = 1.0
    assert judge_flops(config, image_size=64)["discriminator"] > whole["discriminator"]
    config.loss.perceptual = config.loss.adversarial = 0.0
    assert judge_flops(config, image_size=64) == {"perceptual": 0, "discriminator": 0}

    config = Stage2Config()
    config.loss.adversarial = 0.0
    config.perceptual.backbone = "vgg16.pth"
    # VGG-16's 13 convolutions at 64 pixels, 1.25 GMAC: forward on two images, and back to one of them.
    assert judge_flops(config, image_size=64)["perceptual"] == pytest.approx(3 * 2 * 1.25e9, rel=0.01)


def test_a_steps_time_is_that_between_two_rows() -> None:
    clock = [5.0, 5.5, 6.5]
    rows = [{"step": step, "perf/steps_per_s": step / at} for step, at in enumerate(clock, start=1)]
    assert training.step_seconds(rows) == pytest.approx([0.5, 1.0])


def test_the_peak_is_that_of_all_processes() -> None:
    two = measure_peak(precision="fp32", processes=2, threads=1)
    assert two.flops > 1e8 and two.how.startswith("measured on 2 x ")
    assert two.how.endswith("float32 products of 2048 x 2048" if not torch.cuda.is_available() else "8192 x 8192")


def test_the_training_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["loop.num_threads=1", "loop.batch_size=8", "loop.micro_batch_size=4", SCENES]
    stages = ["--stage1", *TINY, "--stage2", "discriminator.channels=8"]
    sizes = ["--steps", "2", "--warmup", "1", "--peak-tflops", "0.5"]
    call(monkeypatch, training.main, "--config", str(ROOT / "configs/demo"), *both, *stages, *sizes)
    stage1, stage2, numbers = capsys.readouterr().out.splitlines()
    assert stage1.startswith("stage1: ") and stage2.startswith("stage2: ")
    found = json.loads(numbers)
    assert {"commit", "machine", "versions", "peak_kind"} < found.keys()
    for stage in ("stage1", "stage2"):
        run = found[stage]
        seconds = sum(run["step_s"]) / 2
        assert len(run["step_s"]) == 2 and math.isclose(run["images_per_s"], 8 / seconds)
        assert math.isclose(run["utilisation"], sum(run["flops_per_image"].values()) * run["images_per_s"] / 0.5e12)
        assert 0 < run["utilisation"] < 1 and run["peak_gib"] > 0.1
    assert found["stage1"]["flops_per_image"].keys() == {"qlip"}
    assert min(found["stage2"]["flops_per_image"].values()) > 0


@pytest.mark.slow
def test_the_memory_benchmark_sees_what_the_networks_take(qlip_folder: Path, tmp_path: Path) -> None:
    arguments = ["--config", "configs/demo", SCENES, "--tokenizer", str(qlip_folder), "--batches", "128"]
    printed = run_apart(["benchmarks.memory", *arguments, "--out", str(tmp_path)], label="memory")
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["batches"] == [128] and found["with"][0] > found["without"][0] > 0.1
    title, heads, row, path = printed.splitlines()
    assert title.startswith("peak ") and heads.split() == ["images", "with", "without"]
    assert row.split() == ["128", f"{found['with'][0]:.2f}", f"{found['without'][0]:.2f}"]
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_a_curve_ends_where_memory_did(tmp_path: Path) -> None:
    curves = [memory.Curve("with", [1.5, None]), memory.Curve("without", [1.0, 2.0])]
    lines = memory.table(curves, batches=[8, 16], title="peak")
    assert [line.split() for line in lines[2:]] == [["8", "1.50", "1.00"], ["16", "no", "memory", "2.00"]]
    memory.draw(curves, batches=[8, 16], title="peak", path=tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000
