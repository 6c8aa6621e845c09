"""Every benchmark runs at a small size, compares like with like, and notices a wrong result."""

import argparse
import functools
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, llamagen, llava, safety, sampling, tokenizer, training, um3_loss, um3_training
from tests.helpers.processes import ROOT
from tokenizer import onednn
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from train.plan.image_flops import stage1_flops, stage2_flops
from train.recipes.um3 import UM3Objective
from train.settings.tokenizer import Stage1Config, Stage2Config
from train.settings.um3 import UM3Config, UM3LossConfig
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.model import split_softmax

MODEL = ["--hidden-size", "64", "--layers", "1", "--text-vocab-size", "300", "--bits-per-subtoken", "4"]
LOSS = [*MODEL, "--patches", "8", "--seq-len", "32", "--threads", "1"]
SAMPLING = [*MODEL, "--patches", "4", "--batch", "3", "--threads", "1"]
TOWER = ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=48")
STAGE1 = [*(f"model.{key}" for key in TOWER), *(f"text.{key}" for key in (*TOWER, "vocab_size=300"))]
READ_SHAPE = functools.partial(um3_training.read_shape, default=um3_training.SHAPE)
SCENES = "data.sources=[{name: scenes, kind: scenes, length: 200}]"


@pytest.fixture
def here(monkeypatch, capsys):
    """Run the sides of a comparison in this process, which spares the imports of each."""
    commands = {"tokenizer": tokenizer, "um3-loss": um3_loss, "sampling": sampling, "llamagen": llamagen}

    def run(command, *, label):
        printed = capsys.readouterr()
        commands[command[1]].main(command[2:])
        output = capsys.readouterr().out
        sys.stdout.write(printed.out)
        return output

    monkeypatch.setattr(harness, "run_process", run)


def lines(capsys):
    *text, numbers = capsys.readouterr().out.splitlines()
    return text, json.loads(numbers)


def test_a_failing_process_gives_one_line():
    with pytest.raises(UserError, match=r"^a run: ValueError: no such thing$"):
        harness.run_process(["timeit", "-n1", "-r1", "raise ValueError('no such thing')"], label="a run")
    with pytest.raises(harness.OutOfMemory, match="smaller batch or model"):
        harness.run_process(["timeit", "-n1", "-r1", "import os; os.kill(os.getpid(), 9)"], label="a run")


@pytest.mark.parametrize("benchmark", [tokenizer, um3_loss, sampling])
@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--repeats", "-1"], ["--threads", "x"]])
def test_numbers_below_1_are_usage_errors(benchmark, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2 and f"argument {arguments[0]}: {arguments[1]}" in capsys.readouterr().err


def test_step_times_come_from_the_loops_clock():
    clock = [5.0, 5.5, 6.5]
    rows = [{"step": n, "perf/steps_per_s": n / at, "perf/cpu_s": 2 * at} for n, at in enumerate(clock, start=1)]
    run = harness.TrainingRun(Path(), rows, {})
    assert run.step_seconds(warmup=1) == pytest.approx([0.5, 1.0])
    assert run.step_seconds(warmup=1, cpu=True) == pytest.approx([1.0, 2.0])


@pytest.mark.slow
def test_the_peak_adds_all_processes():
    peak = harness.machine_peak(precision="fp32", processes=2, threads=1)
    assert peak.flops > 1e8 and peak.how.startswith("measured on 2 x ")
    assert harness.machine_peak(precision="fp32", tflops=2.0) == harness.Peak(2e12, "given")


def test_the_plain_transcription_computes_the_same():
    q, k, v = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    functions = tokenizer.PlainFunctions(torch.nn.functional)
    for is_causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(functions.scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)


@pytest.mark.slow
def test_the_tokenizer_benchmark_compares_two_processes(capsys):
    small = ["--variants", "B-8", "--image-size", "32", "--layers", "1", "--batch", "2", "--repeats", "1"]
    tokenizer.main([*small, "--device", "cpu", "--precision", "bf16"])
    (line, share), numbers = lines(capsys)
    assert share.startswith("B-8: encode takes ") and 0 < numbers["encode_utilisation"] < 1.1
    assert line.startswith("B-8: ") and "x the memory" in line and "images/s in bf16, plain" in line
    assert (numbers["batch"], numbers["device"], numbers["precision"], numbers["compile"]) == (2, "cpu", "bf16", None)
    for side in tokenizer.SIDES:
        (run,) = numbers[side]
        assert run["seconds"] == run["encode"] + run["decode"] > 0 and run["peak_gib"] >= 0


@pytest.mark.parametrize(("variant", "config"), [("B-16", "qlip_b16"), ("B-8", "qlip_b8"), ("L-14", "qlip_l14")])
def test_the_variants_are_those_of_the_configs(variant, config):
    model = load_config(Stage1Config, path=ROOT / f"configs/{config}.yaml", section="stage1").model
    names = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    for key, value in tokenizer.VARIANTS[variant].items():
        assert getattr(model, names.get(key, key)) == value


@pytest.mark.slow
def test_each_side_of_a_compiled_run_is_one_graph(monkeypatch):
    compile_, modes = torch.compile, []

    def traced(function, *, mode):
        modes.append(mode)
        return compile_(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    small = {"variants": ["B-16"], "image_size": 32, "layers": 1, "batch": 2, "threads": None}
    options = argparse.Namespace(side="ours", device="cpu", precision="bf16", compile="reduce-overhead", **small)
    result = tokenizer.measure(options)
    assert modes == ["reduce-overhead"] * 2
    assert result["seconds"] > 0 and "peak_gib" not in result


@pytest.mark.usefixtures("here")
def test_the_loss_benchmark_runs(capsys):
    um3_loss.main([*LOSS, "--kinds", "mix", "--optimizer", "--repeats", "1"])
    (line,), numbers = lines(capsys)
    assert line.startswith("mix: ") and "(goal 1.2x)" in line and "(goal 0.25x)" in line and "(goal 1e-05)" in line
    assert numbers["kind"] == "mix" and numbers["batch"] == 4 and 0 < numbers["error"] <= 1e-5
    for side in um3_loss.SIDES:
        (run,) = numbers[side]
        assert run["seconds"] > 0 and run["cpu_s"] > 0


def test_sequences_are_full_and_mixed_as_in_the_paper():
    _, ids, batches = um3_loss.build(um3_loss.parse([*LOSS, "--kinds", "mix"]))
    input_ids_BT, target_mask_BT = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(batches) == 4 and input_ids_BT.shape == (16, 32)
    assert not (input_ids_BT == ids.pad_id).any()
    is_visual_BT = input_ids_BT >= ids.text_vocab_size
    assert sorted(is_visual_BT.sum(1).tolist()) == [0] * 12 + [ids.image_tokens] * 4
    assert ((is_visual_BT & target_mask_BT).sum(1) > 0).sum() == 3
    ((input_ids_BT, target_mask_BT),) = um3_loss.build(um3_loss.parse([*LOSS, "--kinds", "image"]))[2]
    is_visual_BT = input_ids_BT >= ids.text_vocab_size
    assert is_visual_BT.sum(1).tolist() == [ids.image_tokens] * 4 and target_mask_BT[is_visual_BT].all()


def test_the_sides_have_the_same_weights_and_targets():
    options = um3_loss.parse([*LOSS, "--kinds", "image"])
    model, ids, (batch,) = um3_loss.build(options)
    again, _, (same_batch,) = um3_loss.build(options)
    for ours, theirs in zip([*model.parameters(), *batch], [*again.parameters(), *same_batch], strict=True):
        assert torch.equal(ours, theirs)
    joint = UM3Objective(model, ids=ids, loss=UM3LossConfig(mode="joint"))(*batch)
    mean = (joint.text_sum + joint.visual_sum) / (joint.text_count + joint.visual_count)
    torch.testing.assert_close(um3_loss.stock_loss(model, batch), mean)


def test_a_wrong_gradient_is_an_error(monkeypatch):
    options = um3_loss.parse([*LOSS, "--kinds", "image"])
    assert um3_loss.check(options)["error"] < 1e-5
    right = split_softmax._Logits.backward

    def wrong(ctx, *gradients):
        grad_hidden_ND, grad_weight_VD, *others = right(ctx, *gradients)
        return grad_hidden_ND, 1.001 * grad_weight_VD, *others

    monkeypatch.setattr(split_softmax._Logits, "backward", staticmethod(wrong))
    with pytest.raises(UserError, match=r"gradient of lm_head.weight differs by 1\.0e-03"):
        um3_loss.check(options)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("scale", ["1", "3"])
def test_all_sides_generate_the_same(capsys, scale):
    sampling.main([*SAMPLING, "--repeats", "2", "--guidance-scale", scale])
    text, numbers = lines(capsys)
    assert sum("3 of 3 images have equal ids" in line for line in text) == 2
    assert any(line.startswith("memory bound ") for line in text) and numbers["guidance_scale"] == float(scale)
    images = {tuple(run["images"]) for side in sampling.SIDES for run in numbers[side]}
    assert len(images) == 1 and len(set(images.pop())) == 3


@pytest.mark.usefixtures("here")
def test_one_position_a_patch_is_compared_with_one_an_id(capsys):
    sizes = ["--hidden-size", "64", "--layers", "2", "--patches", "16", "--bits-per-subtoken", "4", "--batch", "2"]
    llamagen.main([*sizes, "--caption-tokens", "3", "--repeats", "1", "--threads", "1"])
    (step, draw), numbers = lines(capsys)
    assert step.startswith("step: ") and "(goal 0.65x)" in step and draw.startswith("draw: ")
    (depth,), (flat,) = numbers["depth"], numbers["flat"]
    assert flat["parameters"] < depth["parameters"] < 1.5 * flat["parameters"]


def test_other_ids_are_an_error():
    with pytest.raises(UserError, match="ours, stock generated different ids"):
        sampling.check_same_images({"ours": [{"images": ["a"]}], "stock": [{"images": ["b"]}]})


@pytest.mark.parametrize("swiglu", [True, False])
def test_flops_are_those_of_a_real_step(swiglu, monkeypatch):
    monkeypatch.setattr(onednn, "AVAILABLE", False)  # torch does not count oneDNN's products
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, swiglu=swiglu)
    text = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, vocab_size=99)
    tower |= dict(image_size=24, patch_size=8)
    config = QLIPConfig(
        text_config=text | {"bos_token_id": 0, "eos_token_id": 2},
        vision_config=tower | {"quantizer_cfg": {"embed_dim": 12}, "hidden_size_post_q": 16},
        decoder_config=tower | {"hidden_size": 16, "num_hidden_layers": 1},
        projection_dim=24,
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = QLIPModel(config)(torch.randn(1, 3, 24, 24), torch.ones(1, 7, dtype=torch.long))
        (output.reconstructions.sum() + output.image_embeds.sum() + output.text_embeds.sum()).backward()
    assert stage1_flops(config, text_tokens=7) == {"qlip": counter.get_total_flops()}
    weights = 2 * (9 * 3 * 8**2 * 32)  # of the patch embedding, for one image: forward
    assert counter.get_total_flops() > 3 * weights


def test_stage_2_counts_the_networks_that_it_uses():
    tower = dict(image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    qlip = QLIPConfig(
        text_config={"num_hidden_layers": 1}, vision_config=tower | {"quantizer_cfg": {"embed_dim": 12}},
        decoder_config=tower,
    )  # fmt: skip
    config = Stage2Config()
    whole = stage2_flops(qlip, config)
    assert min(whole.values()) > 0
    config.loss.r1 = 1.0
    assert stage2_flops(qlip, config)["discriminator"] > whole["discriminator"]
    config.loss.adversarial = 0.0
    config.perceptual.backbone = "vgg16.pth"
    # VGG-16's 13 convolutions at 64 pixels, 1.25 GMAC: forward on two images, backward to one.
    counted = stage2_flops(qlip, config)
    assert counted["perceptual"] == pytest.approx(3 * 2 * 1.25e9, rel=0.01) and counted["discriminator"] == 0


@pytest.mark.slow
def test_the_memory_benchmark_sees_the_networks(tmp_path, capsys):
    stage1 = ["--stage1", *STAGE1]
    training.main(["memory", SCENES, "loop.num_threads=1", *stage1, "--batches", "128", "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "memory.json").read_text())
    assert numbers["batches"] == [128] and numbers["with"][0] > numbers["without"][0] > 0.1
    *_, row, path = capsys.readouterr().out.splitlines()
    assert row.split() == ["128", f"{numbers['with'][0]:.2f}", f"{numbers['without'][0]:.2f}"]
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_a_curve_ends_where_memory_did(tmp_path):
    peaks = {"with": [1.5, None], "without": [1.0, 2.0]}
    table = training.table(peaks, batches=[8, 16], title="peak")
    assert [line.split() for line in table[2:]] == [["8", "1.50", "1.00"], ["16", "no", "memory", "2.00"]]
    training.plot(peaks, batches=[8, 16], title="peak", path=tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.mark.slow
def test_every_safety_net_is_timed(capsys):
    safety.main(["--sizes", "demo", "--steps", "4", "loop.batch_size=8", "text_validation.num_sequences=2"])
    (size, *nets), numbers = lines(capsys)
    assert size.startswith("demo: ") and len(nets) == len(safety.CLOCKS) - 1
    demo = numbers["demo"]
    assert all(min(demo[net]) > 0 for net in safety.CLOCKS) and demo["bytes"] > 12e6
    assert demo["save"][0] > max(demo[net][0] for net in safety.PARTS_OF_SAVE)
    config = load_config(UM3Config, path=ROOT / "configs/demo.yaml", section="um3")
    assert demo["every"]["save"] == config.loop.save_every_steps


def test_a_clock_counts_for_the_step_of_the_call(monkeypatch):
    monkeypatch.setattr(training, "table", training.table)  # restored after the test
    seconds, step = defaultdict(lambda: [0.0, 0.0]), {}
    safety.time_function("benchmarks.training:table", seconds=seconds, step=step)
    for number in range(2):
        assert training.table({}, batches=[], title="peak")[0].startswith("peak")
        step[number] = [1.0, 1.0]
    assert seconds.keys() == {0, 1} and min(clock for clock, _ in seconds.values()) > 0


def test_the_papers_save_is_computed_from_the_rates(capsys):
    rates = {"bytes": 1e9, "save": [9, 2.0]} | {net: [9, 0.5] for net in safety.PARTS_OF_SAVE}
    numbers = safety.paper(rates)
    assert 12 * 1.2e9 < numbers["bytes"] < 12 * 2e9
    seconds = numbers["bytes"] / 1e9 * (0.5 + 0.5 + 1) + 2**31 / 1e9 * 0.5  # gather, write, disk; hash of one file
    assert numbers["share_at_1_gb_s"] == pytest.approx(seconds / numbers["seconds_between_saves"])
    assert numbers["share_at_5_gb_s"] < numbers["share_at_1_gb_s"]
    assert capsys.readouterr().out.count("paper: ") == 2


def build_loss(arguments):
    return um3_loss.build(um3_loss.parse([*LOSS, "--kinds", "image", *arguments]))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (tokenizer.parse, ["--image-size", "40", "--variants", "B-8", "B-16"], r"40; B-16 needs a multiple .* 16"),
        (build_loss, ["--seq-len", "20"], "--seq-len is 20; an image of 8 patches and a caption need 21"),
        (build_loss, ["--bits-per-subtoken", "21"], "at most 20 bits"),
        (build_loss, ["--text-vocab-size", "3"], "is not a text entry"),
        (training.main, ["training", "--stages", "stage2"], "--tokenizer FOLDER"),
        (llava.main, ["engine.zero_stage=0", "--side", "model", "--folder", "x"], "set engine.zero_stage"),
        *((READ_SHAPE, [setting], "--shape") for setting in ("depth=3", "layers=0", "hidden_size=30")),
    ],
)
def test_mistakes_are_one_line(command, arguments, message):
    with pytest.raises(UserError, match=message):
        command(arguments)
