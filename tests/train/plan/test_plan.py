"""The plan's memory against real runs, its FLOPs against torch's count, and its table."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, T5Config

from tests.helpers.tiny_qlip import make_qlip
from tests.train.conftest import ROOT, arguments, logged, train_apart
from train.phase import CONFIGS
from train.plan.memory import Layout, Peak, Trace, Tracer, usage
from train.plan.plan import GPUS, MFU, Setting, main, open_plan
from um3.core.config import load_config
from um3.core.errors import UserError

GIB = 2**30
WITHIN = 0.10


class Case(NamedTuple):
    """A small run: its engine, number of processes, and steps until its memory peaks."""

    engine: dict[str, Any]
    processes: int = 1
    steps: int = 1


# 62M parameters: 0.23 GiB in float32, against 0.62 GiB of activations.
BODY = dict(hidden_size=768, num_layers=8, num_heads=12, num_kv_heads=12, head_dim=64, intermediate_size=2304)
CASES = {
    "none": Case({}),
    "zero0": Case({"zero_stage": 0}),
    "zero0 checkpointing": Case({"zero_stage": 0, "activation_checkpointing": True}),
    "zero1": Case({"zero_stage": 1}),
    "zero2 checkpointing": Case({"zero_stage": 2, "activation_checkpointing": True, "bucket_elements": 4_000_000}, 2),
    # ZeRO 3 keeps the weights that it uses again from its third step on.
    "zero3 checkpointing": Case({"zero_stage": 3, "activation_checkpointing": True}, 2, steps=3),
}


def options_of(name):
    """Settings of a run on text alone; "none" has a tiny model, to measure the libraries."""
    case = CASES[name]
    batch = 8 if case.processes == 1 else 2
    settings = {"loop.max_steps": case.steps, "loop.batch_size": batch, "loop.save_every_steps": 100}
    settings |= {"data.seq_len": 128, "data.text_seq_len": 0, "vocabulary.bit_embeddings": False}
    settings |= {"data.mix.start": "[1,0,0]", "data.mix.end": "[1,0,0]"}
    settings |= {f"engine.{key}": value for key, value in case.engine.items()}
    settings |= {f"model.{key}": value for key, value in BODY.items()} if name != "none" else {}
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(autouse=True)
def linear_of_torch(monkeypatch):
    """A run with ZeRO 3 in this process leaves DeepSpeed's linear function in torch, which keeps other tensors."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs of `measured`."""
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def measured(made, runs):
    """The peak resident memory of the first process of every case's run (GiB)."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        # Freed memory returns to the system at once, as on a GPU to the allocator, so fragmentation does not count.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        yield dict(zip(CASES, pool.map(lambda name: peak_gib(name, made, runs), CASES), strict=True))


def peak_gib(name, made, folder, *overrides):
    """The peak resident memory of the first process of a case's run, in a sub-folder (GiB)."""
    run_folder = folder / name.replace(" ", "-")
    command = arguments("um3", made, *options_of(name), f"loop.output_dir={run_folder}", *overrides)
    train_apart(command, processes=CASES[name].processes)
    return logged(run_folder, "mem/peak_gib")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "none"])
def test_memory_is_within_a_tenth_of_a_real_run(name, measured):
    taken = measured[name] - measured["none"]
    overrides = arguments("um3", Path("nowhere"), *options_of(name))[3:]
    plan = plan_of(*overrides, devices=CASES[name].processes)
    setting = plan.own()
    assert plan.usage(setting).total / GIB == pytest.approx(taken, rel=WITHIN)
    assert taken > 0.7  # enough to make the libraries' variation negligible


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_memory_with_a_frozen_base_is_within_a_tenth_of_a_real_run(
    zero_stage, measured, runs, made, tmp_path, monkeypatch
):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # as in `measured`
    options = [f"model.base_model={runs}/zero0/model", "lora.rank=8", f"engine.zero_stage={zero_stage}"]
    taken = peak_gib("zero0", made, tmp_path, *options) - measured["none"]
    plan = plan_of(*arguments("um3", Path("nowhere"), *options_of("zero0"), *options)[3:])
    assert plan.frozen > 10 * sum(plan.parameters)
    setting = plan.own()
    assert plan.usage(setting).total / GIB == pytest.approx(taken, rel=WITHIN)


def plan_of(*overrides, phase="um3", config="demo", devices=1, gpu="cpu"):
    path = ROOT / f"configs/{config}.yaml"
    settings = load_config(CONFIGS[phase], path=path, section=phase, overrides=overrides)
    return open_plan(settings, devices=devices, gpu=gpu)


@pytest.mark.slow
def test_memory_of_llamagen_is_within_a_tenth_of_a_real_run(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # as in `measured`
    settings = ["loop.batch_size=64", "loop.max_steps=1", "optimizer.kind=adamw"]
    wide = [f"model.{key}={value}" for key, value in BODY.items() if key not in ("num_kv_heads", "head_dim")]
    measured, planned = [], []
    for more in ([], wide, [*wide, "engine.activation_checkpointing=true"]):
        output_dir = tmp_path / str(len(measured))
        train_apart(arguments("llamagen", made, *settings, *more, f"loop.output_dir={output_dir}"))
        measured.append(logged(output_dir, "mem/peak_gib")[-1])
        plan = plan_of(*arguments("llamagen", made, *settings, *more)[3:], phase="llamagen")
        planned.append(plan.usage(plan.own()).total / GIB)
    for number in (1, 2):  # the tiny one measures the libraries
        assert planned[number] - planned[0] == pytest.approx(measured[number] - measured[0], rel=WITHIN)
        assert planned[number] > 0.7


@pytest.mark.parametrize(("kind", "layers"), [("t5", -1), ("t5", 1), ("qlip", -1), ("qlip", 0)])
def test_flops_of_llamagen_and_its_text_encoder_are_those_of_torchs_counter(kind, layers, tmp_path):
    T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2).save_pretrained(tmp_path)
    qlip = make_qlip(tmp_path / "qlip", captions=["a dog", "a boat"] * 9)
    name = tmp_path if kind == "t5" else qlip
    encoder = f"text_encoder={{kind: {kind}, name: {name}, max_tokens: 16, num_layers: {layers}}}"
    sizes = ["loop.batch_size=2", "model.hidden_size=64", "model.num_layers=2"]
    plan = plan_of(encoder, *sizes, f"visual_tokenizer={qlip}", phase="llamagen")
    inputs = plan.micro_batch(2)
    objective = plan.objective.to_empty(device="cpu")
    encoder = plan.encoder.to_empty(device="cpu")
    for parameter in (*objective.parameters(), *encoder.parameters()):
        nn.init.normal_(parameter, std=0.02)
    ids_BT = torch.zeros(2, plan.num_caption, dtype=torch.long)
    counter, bf16 = FlopCounterMode(display=False), torch.autocast("cpu", torch.bfloat16)
    with counter, bf16, sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            encoder(ids_BT) if kind == "t5" else encoder.hidden_states(ids_BT)
        objective(*inputs).sum().backward()
    assert counter.get_total_flops() == pytest.approx(sum(plan.step_flops(checkpointing=False)), rel=0.03)


def test_llamagen_xl_and_flan_t5_xl(capsys):
    plan = plan_of(phase="llamagen", config="llamagen_xl", devices=8, gpu="h100")
    # The released model has 777,678,080 with one sub-token; the second one has rows of embedding and head of its own.
    assert sum(plan.parameters) == 777_678_080 + 2 * 16_384 * 1280
    assert plan.beside_bytes == pytest.approx(2 * 1.2233e9, rel=1e-3)
    setting = plan.own()
    memory = plan.usage(setting)
    assert plan.fits(memory) and memory.weights == 4 * sum(plan.parameters) + plan.beside_bytes
    model, again = plan.step_flops(checkpointing=False)
    # 6 FLOP a parameter of the layers for 631 positions, attention, the head, and T5's 2 a parameter of 120 tokens.
    layers = 36 * (4 * 1280**2 + 3 * 1280 * 3584)
    image = 6 * layers * 631 + 12 * 36 * 1280 * 631**2 + 6 * 512 * 1280 * 16_384 + 2 * 1.158e9 * 120
    assert model / 256 == pytest.approx(image, rel=0.02)
    assert plan.step_seconds(setting, mfu=0.35) == pytest.approx((model + again) / (8 * 989e12 * 0.35))
    main(["--config", "llamagen_xl", "--phase", "llamagen", "loop.micro_batch_size=1"])
    assert "2.28 GiB of the text encoder" in capsys.readouterr().out


class Toy(nn.Module):
    """An embedding and one layer; the loss reads the positions of the mask alone."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(10, 16), nn.Linear(16, 32, bias=False)

    def forward(self, ids_BT, mask_BT):
        return (self.layer(self.embedding(ids_BT))[mask_BT].square().sum(),)


def test_a_trace_counts_the_bytes_of_a_layer():
    with torch.device("meta"):
        toy = Toy()
    ids_BT, mask_BT = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool)
    mask_BT[0, :3] = True
    trace = Tracer(toy, body=toy.layer, precision="fp32").trace(ids_BT, mask_BT, shares=(0.0, 1.0))
    embedded, output, chosen = 4 * 10 * 16, 4 * 10 * 32, 4 * 3 * 32
    assert trace.activations == embedded + output
    # In the layer's backward pass: its input, the gradient of its output, and the new gradient of its weight (32, 16);
    # before it, for the three chosen positions: their values, the gradient of their squares, and indices.
    least = embedded + output + 4 * 32 * 16
    assert least <= trace.peaks[0.0].other <= least + 6 * chosen + 1000
    assert trace.peaks[1.0].other + trace.peaks[1.0].gradients >= trace.peaks[0.0].other
    low = Tracer(toy, body=toy.layer, precision="bf16-true").trace(ids_BT, mask_BT, shares=(1.0,))
    assert low.activations == trace.activations / 2


def test_a_longer_mask_takes_more_memory():
    with torch.device("meta"):
        toy = Toy()
    tracer, ids_BT = Tracer(toy, body=toy.layer, precision="fp32"), torch.zeros(2, 500, dtype=torch.long)
    masks = [torch.full((2, 500), False).index_fill(1, torch.arange(chosen), True) for chosen in (5, 500)]
    few, many = (tracer.trace(ids_BT, mask_BT, shares=(0.0,)).peaks[0.0].other for mask_BT in masks)
    assert many > few + 2 * 490 * 32 * 4


def layout(**options):
    """A billion bf16 parameters on 8 GPUs."""
    sizes = dict(parameters=10**9, largest=10**8, head=10**8, weight_bytes=2, bucket_elements=10**8)
    return Layout(**{**dict(zero_stage=2, devices=8), **sizes, **options})


def test_zero_partitions_optimizer_gradients_and_weights():
    trace = Trace(10**9, {share: Peak(2 * 10**9, 10**9) for share in (0.0, 1.0, 1 / 8)})
    usages = {stage: usage(layout(zero_stage=stage), trace) for stage in (1, 2, 3)}
    assert {memory.moment for memory in usages.values()} == {"backward"}
    assert [memory.optimizer for memory in usages.values()] == [12e9 / 8] * 3
    assert [memory.gradients for memory in usages.values()] == [1e9, 2e9 / 8, 2e9 / 8]  # ZeRO 1: those made so far
    assert usages[1].weights == usages[2].weights == 2e9
    assert usages[3].weights == 2e9 / 8 + 2 * (10**8 + 500_000_000 + 50_000_000)
    assert [memory.activations + memory.working for memory in usages.values()] == [2e9] * 3
    assert usage(layout(average=True), trace).optimizer == 16e9 / 8
    assert usage(layout(offload=True), trace).optimizer == 0
    assert usage(layout(zero_stage=1, accumulates=True), trace).gradients == 2e9


def test_without_activations_the_step_or_the_buckets_are_the_peak():
    trace = Trace(0, {share: Peak(0, 0) for share in (0.0, 1.0, 1 / 8)})
    one = layout(devices=1, weight_bytes=4, fused=False)
    memory = usage(one, trace)
    assert (memory.moment, memory.total) == ("step", 1e9 * (4 + 12 + 4 + 8))
    assert usage(layout(devices=1, weight_bytes=4), trace).total == 1e9 * (4 + 12 + 4 + 4)
    assert usage(layout(zero_stage=1, devices=64), trace).moment == "reduce"


@pytest.mark.parametrize("options", [[], ["trainable=new_rows"], ["lora.rank=8"], ["lora.rank=8", "loss.mode=joint"]])
def test_flops_are_those_of_torchs_counter(options, tmp_path):
    """With eager attention and bf16 products, which torch's counter recognises."""
    sizes = [f"model.{key}={value}" for key, value in dict(hidden_size=64, num_layers=2, head_dim=16).items()]
    LlamaConfig(vocab_size=999, hidden_size=64, intermediate_size=256, num_hidden_layers=2).save_pretrained(tmp_path)
    plan = plan_of(*sizes, *options, *([f"model.base_model={tmp_path}"] if options else []),
                   "data.seq_len=64", "data.text_seq_len=64", "data.mix.end=[2,1,1]",
                   "data.mix.calm_down_steps=0", "loop.batch_size=4", "vocabulary.bit_embeddings=false",
                   "vocabulary.subtokens=1", "vocabulary.bits_per_subtoken=6")  # fmt: skip
    input_ids_BT, mask_BT = plan.micro_batch(4)
    objective = plan.objective.to_empty(device="cpu")
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.02)
    objective.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        sums = objective(input_ids_BT, mask_BT)
        (sums.text_sum + sums.visual_sum).backward()
    assert counter.get_total_flops() == pytest.approx(sum(plan.step_flops(checkpointing=False)), rel=0.03)


def test_the_papers_setting_fits_64_gpus():
    plan = plan_of(config="um3_llama3_1b", devices=64, gpu="h200")
    setting = plan.own()
    assert setting == Setting(2, "bf16-true", True, 8)
    assert plan.fits(plan.usage(setting))
    model, again = plan.step_flops(checkpointing=True)
    # 6 FLOP a parameter of the layers, 12 x 16 layers x 2,048 x 4,096 for attention, 6 a parameter of the text half.
    per_token = 6 * 973_080_576 + 12 * 16 * 2048 * 4096 + 0.75 * 6 * 2048 * 128_258
    assert model / (512 * 4096) == pytest.approx(per_token, rel=0.02)
    assert 0.3 < again / model < 0.4
    assert plan.step_seconds(setting, mfu=0.4) == pytest.approx((model + again) / (64 * 989e12 * 0.4))


def test_lora_fits_where_full_training_does_not(capsys):
    """Llama-3.2-1B's weights take 3.1 GiB in bf16, the adapters' and new rows' states 1.6."""
    options = ["loop.batch_size=1", "loop.micro_batch_size=0", "data.seq_len=1024"]
    whole, lora = (plan_of(*options, *more, config="um3_llama3_1b", gpu="rtx4060") for more in ([], ["lora.rank=16"]))
    assert sum(lora.parameters) == 2 * 2048 * (2 + 32_768) + 16 * 704_512  # 16 layers x rank 16 x widths of 7 modules
    assert sum(lora.parameters) + lora.frozen == sum(whole.parameters) + 16 * 704_512
    setting = Setting(1, "bf16-true", True, 1)
    memory = lora.usage(setting)
    assert memory.weights == 2 * (sum(lora.parameters) + lora.frozen)
    assert memory.optimizer == 12 * sum(lora.parameters)
    assert lora.fits(memory) and not whole.fits(whole.usage(setting))
    arguments = ["--config", "um3_llama3_1b", "--gpus", "1", "--gpu", "rtx4060", *options, "lora.rank=16"]
    main(arguments)
    assert "0.145e9 + 1.498e9 frozen parameters" in capsys.readouterr().out


SMOLLM2, LLAMA = "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-1B"
CHECKPOINTING = "engine.activation_checkpointing=true"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "options", "gib", "hours_by_gpu"),
    [
        (SMOLLM2, [], 6.0, {"rtx4060": 10, "rtx4080": 3.1, "rtx4090": 1.8, "a100-80": 1.0, "h100": 0.3}),
        (LLAMA, ["lora.rank=16", CHECKPOINTING], 6.7, {"rtx4060": 78}),
        (LLAMA, ["lora.rank=16"], 12.9, {"rtx4080": 17, "rtx4090": 10, "a100-80": 5.4, "h100": 1.7}),
        (LLAMA, [], 33.5, {"a100-80": 7.6, "h100": 2.4}),
    ],
)
def test_the_table_of_one_gpu_is_the_plan(base, options, gib, hours_by_gpu):
    """The table of docs/um3.md: memory, time, and the smallest card that holds each."""
    page, gpu = (ROOT / "docs/um3.md").read_text(), next(iter(hours_by_gpu))
    plan = plan_of(f"model.base_model={base}", *options, config="one_gpu", gpu=gpu)
    setting = plan.own()
    memory = plan.usage(setting)
    assert memory.total / GIB == pytest.approx(gib, abs=0.06)
    for gpu, hours in hours_by_gpu.items():
        plan.gpu = GPUS[gpu]
        seconds = plan.step_seconds(setting, mfu=MFU) * plan.config.loop.max_steps
        assert plan.fits(memory) and seconds / 3600 == pytest.approx(hours, abs=0.35)
        assert f"{gib} GiB{' with activation checkpointing' * (CHECKPOINTING in options)}, {hours} h" in page


@pytest.mark.slow
def test_the_largest_micro_batch_that_fits_is_taken():
    wide = dict(hidden_size=2048, num_layers=6, num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192)
    sizes = [f"model.{key}={value}" for key, value in wide.items()]
    options = ["loop.batch_size=256", "data.seq_len=4096", "data.text_seq_len=4096", "data.mix.end=[1,0,0]"]
    options += ["optimizer.kind=adamw", "engine.precision=bf16-true", "vocabulary.bit_embeddings=false"]
    plan = plan_of(*sizes, *options, devices=32, gpu="l4")
    assert plan.micro_batches() == [8, 4, 2, 1]
    lines = list(plan.lines())
    for setting, memory, fits in lines:
        assert fits and plan.fits(memory)
        larger = setting._replace(micro_batch=2 * setting.micro_batch)
        assert setting.micro_batch == 8 or not plan.fits(plan.usage(larger))
    chosen = {(setting.zero_stage, setting.checkpointing): setting.micro_batch for setting, _, _ in lines}
    assert chosen[2, False] < chosen[2, True]
    small = plan_of(config="um3_llama3_1b", gpu="l4")  # two moments of 1.6e9 parameters take 12 GiB
    assert not small.fits(small.usage(Setting(0, "bf16-mixed", True, 1)))


def test_the_table_has_a_line_for_every_stage(capsys):
    def lines(*options):
        main(["--config", "demo", *options])
        cells = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [line for line in cells if line and line[0] in "0123"]

    on_gpus = lines("--gpus", "2", "--gpu", "rtx4090")
    assert [line[0] for line in on_gpus] == list("0011221")  # Muon refuses ZeRO 3; the config's own is last
    assert {line[1] for line in on_gpus} == {"bf16-mixed"}
    assert all(float(line[-2].replace(",", "")) > 1000 for line in on_gpus)
    assert all(line[-2:] == ["-", "-"] for line in lines("--gpus", "1", "--gpu", "cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h1000"], "a100-40, a100-80, h100"),
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "63"], "divisible by --gpus 63"),
        (["--mfu", "40"], "at most 1"),
        (["model.base_model=/no/such/model"], "'/no/such/model'"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        main(["--config", "um3_llama3_1b", *options])
