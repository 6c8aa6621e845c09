"""The plan's memory against real runs, its FLOPs against torch's count, and its table."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.train.conftest import ROOT, arguments, run_apart
from train.config import UM3Config
from train.plan.memory import Layout, Peak, Trace, Tracer, usage
from train.plan.plan import GPUS, Plan, Setting, main
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.metrics import read_metrics

GIB = 2**30
WITHIN = 0.10


class Case(NamedTuple):
    """A small run: its engine, how many processes, and steps until its memory is at its most."""

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
    # Of ZeRO 3's steps the third is the first to keep what it will need again.
    "zero3 checkpointing": Case({"zero_stage": 3, "activation_checkpointing": True}, 2, steps=3),
}


def options_of(name: str) -> list[str]:
    """Settings of a run of text alone; "none" is the library without a model to speak of."""
    case = CASES[name]
    rows = 8 if case.processes == 1 else 2
    settings = {"loop.max_steps": case.steps, "loop.batch_size": rows, "loop.save_every_steps": 100}
    settings |= {"data.seq_len": 128, "data.text_seq_len": 0, "vocabulary.bit_embeddings": False}
    settings |= {"data.mix.start": "[1,0,0]", "data.mix.end": "[1,0,0]"}
    settings |= {f"engine.{key}": value for key, value in case.engine.items()}
    settings |= {f"model.{key}": value for key, value in BODY.items()} if name != "none" else {}
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def measured(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, float]]:
    """The most resident memory of the first process of every case's run (GiB)."""
    folder = tmp_path_factory.mktemp("measured")

    def run(name: str) -> float:
        place = folder / name.replace(" ", "-")
        command = arguments("um3", made, *options_of(name), f"loop.output_dir={place}")
        result = run_apart(command, processes=CASES[name].processes)
        assert result.returncode == 0, result.stderr
        peak: float = read_metrics(place / "metrics.jsonl")[-1]["mem/peak_gib"]
        shutil.rmtree(place)
        return peak

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        # What is freed goes back to the system at once, as on a GPU to the allocator: no gaps count as memory in use.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        yield dict(zip(CASES, pool.map(run, CASES), strict=True))


def predicted(name: str) -> float:
    """What the plan says of a case (GiB)."""
    case = CASES[name]
    command = arguments("um3", Path("nowhere"), *options_of(name))
    config = load_config(UM3Config, path=command[2], overrides=command[3:])
    plan = Plan(config, devices=case.processes, gpu="cpu")
    setting = plan.own()
    assert setting is not None
    return plan.usage(setting).total / GIB


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "none"])
def test_memory_is_within_a_tenth_of_what_a_run_takes(name: str, measured: dict[str, float]) -> None:
    taken = measured[name] - measured["none"]
    assert predicted(name) == pytest.approx(taken, rel=WITHIN)
    assert taken > 0.7  # enough for the library's own ups and downs not to matter


class Toy(nn.Module):
    """Rows of an embedding through one layer; the loss sees the rows of the mask alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(10, 16), nn.Linear(16, 32, bias=False)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor]:
        return (self.layer(self.embedding(ids_BT))[mask_BT].square().sum(),)


def test_a_trace_counts_bytes_by_hand() -> None:
    with torch.device("meta"):
        toy = Toy()
    ids_BT, mask_BT = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool)
    mask_BT[0, :3] = True
    trace = Tracer(toy, body=toy.layer, precision="fp32").trace(ids_BT, mask_BT, shares=(0.0, 1.0))
    embedded, through, chosen = 4 * 10 * 16, 4 * 10 * 32, 4 * 3 * 32
    assert trace.activations == embedded + through
    # At the layer's backward pass: its input, the gradient of its output, and the new gradient of its weight (32, 16);
    # before it, of the three chosen positions: themselves, their squares' gradient and indices.
    least = embedded + through + 4 * 32 * 16
    assert least <= trace.peaks[0.0].other <= least + 6 * chosen + 1000
    assert trace.peaks[1.0].other + trace.peaks[1.0].gradients >= trace.peaks[0.0].other
    low = Tracer(toy, body=toy.layer, precision="bf16-true").trace(ids_BT, mask_BT, shares=(1.0,))
    assert low.activations == trace.activations / 2


def test_a_longer_mask_takes_more() -> None:
    with torch.device("meta"):
        toy = Toy()
    tracer, ids_BT = Tracer(toy, body=toy.layer, precision="fp32"), torch.zeros(2, 500, dtype=torch.long)
    few, all_of_them = (
        tracer.trace(ids_BT, torch.full((2, 500), False).index_fill(1, torch.arange(chosen), True), shares=(0.0,))
        for chosen in (5, 500)
    )
    assert all_of_them.peaks[0.0].other > few.peaks[0.0].other + 2 * 490 * 32 * 4


def layout(**options: Any) -> Layout:
    """A billion bf16 parameters on 8 GPUs."""
    sizes = dict(parameters=10**9, largest=10**8, head=10**8, weight_bytes=2, bucket_elements=10**8)
    return Layout(**{**dict(zero_stage=2, devices=8), **sizes, **options})


def test_zero_divides_what_it_says() -> None:
    trace = Trace(10**9, {share: Peak(2 * 10**9, 10**9) for share in (0.0, 1.0, 1 / 8)})
    found = {stage: usage(layout(zero_stage=stage), trace) for stage in (1, 2, 3)}
    assert {each.moment for each in found.values()} == {"backward"}
    assert [each.optimizer for each in found.values()] == [12e9 / 8] * 3
    assert [each.gradients for each in found.values()] == [1e9, 2e9 / 8, 2e9 / 8]  # at ZeRO 1 as far as they are made
    assert found[1].weights == found[2].weights == 2e9
    assert found[3].weights == 2e9 / 8 + 2 * (10**8 + 500_000_000 + 50_000_000)
    assert [each.activations + each.working for each in found.values()] == [2e9] * 3
    average = usage(layout(average=True), trace)
    assert average.optimizer == 16e9 / 8
    assert usage(layout(offload=True), trace).optimizer == 0
    assert usage(layout(zero_stage=1, accumulates=True), trace).gradients == 2e9


def test_without_activations_the_step_or_the_buckets_are_the_most() -> None:
    trace = Trace(0, {share: Peak(0, 0) for share in (0.0, 1.0, 1 / 8)})
    one = layout(devices=1, weight_bytes=4, fused=False)
    found = usage(one, trace)
    assert (found.moment, found.total) == ("step", 1e9 * (4 + 12 + 4 + 8))
    assert usage(layout(devices=1, weight_bytes=4), trace).total == 1e9 * (4 + 12 + 4 + 4)
    assert usage(layout(zero_stage=1, devices=64), trace).moment == "reduce"


def plan_of(*overrides: str, config: str = "demo", devices: int = 1, gpu: str = "cpu") -> Plan:
    path = ROOT / f"configs/{config}/um3.yaml"
    return Plan(load_config(UM3Config, path=path, overrides=overrides), devices=devices, gpu=gpu)


def test_flops_are_those_that_torch_counts() -> None:
    """Eager attention, whose products torch's counter knows, and products in bf16, which the loss leaves to torch."""
    sizes = [f"model.{key}={value}" for key, value in dict(hidden_size=64, num_layers=2, head_dim=16).items()]
    plan = plan_of(*sizes, "data.seq_len=64", "data.text_seq_len=64", "data.mix.end=[2,1,1]",
                   "data.mix.calm_down_steps=0", "loop.batch_size=4", "vocabulary.bit_embeddings=false",
                   "vocabulary.subtokens=1", "vocabulary.bits_per_subtoken=6")  # fmt: skip
    rows = plan._micro_batch(4)
    objective = plan.objective.to_empty(device="cpu")
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.02)
    objective.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        sums = objective(rows.input_ids_BT, rows.target_mask_BT)
        (sums.text_sum + sums.visual_sum).backward()
    assert counter.get_total_flops() == pytest.approx(sum(plan.step_flops(checkpointing=False)), rel=0.03)


def test_the_papers_setting_fits_64_gpus() -> None:
    plan = plan_of(config="paper", devices=64, gpu="h200")
    # 1.236e9 of Llama-3.2-1B, 2 marks and 32,768 visual rows of 2,048 in and out, a head of its own, qk-norm.
    assert sum(plan.parameters) == 1_235_814_400 + 2048 * (2 * (2 + 32_768) + 128_256) + 16 * 2 * 64
    setting = plan.own()
    assert setting == Setting(2, "bf16", True, 8)
    assert setting is not None and plan.fits(plan.usage(setting))
    model, again = plan.step_flops(checkpointing=True)
    # 6 FLOP a parameter of the layers, 12 x 16 layers x 2,048 x 4,096 of attention, 6 a row of the text half.
    per_token = 6 * 973_080_576 + 12 * 16 * 2048 * 4096 + 0.75 * 6 * 2048 * 128_258
    assert model / (512 * 4096) == pytest.approx(per_token, rel=0.02)
    assert 0.3 < again / model < 0.4
    assert plan.step_seconds(setting, mfu=0.4) == pytest.approx((model + again) / (64 * 989e12 * 0.4))


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    wide = dict(hidden_size=2048, num_layers=6, num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192)
    sizes = [f"model.{key}={value}" for key, value in wide.items()]
    options = ["loop.batch_size=256", "data.seq_len=4096", "data.text_seq_len=4096", "data.mix.end=[1,0,0]"]
    options += ["optimizer.kind=adamw", "engine.precision=bf16-true", "vocabulary.bit_embeddings=false"]
    plan = plan_of(*sizes, *options, devices=32, gpu="l4")
    assert plan.micro_batches() == [8, 4, 2, 1]
    for setting, found, fits in plan.lines():
        assert fits and plan.fits(found)
        larger = setting._replace(micro_batch=2 * setting.micro_batch)
        assert setting.micro_batch == 8 or not plan.fits(plan.usage(larger))
    chosen = {(setting.zero_stage, setting.checkpointing): setting.micro_batch for setting, _, _ in plan.lines()}
    assert chosen[2, False] < chosen[2, True]
    small = plan_of(config="paper", gpu="l4")  # two moments of 1.6e9 parameters alone take 12 GiB
    assert not small.fits(small.usage(Setting(0, "autocast", True, 1)))


def test_the_table_tells_every_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs/demo.yaml")
    monkeypatch.setattr("sys.argv", ["plan", "--config", config, "--gpus", "2", "--gpu", "rtx4090"])
    main()
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if line and line[0] in "0123"] == list("0011221")  # Muon: no ZeRO 3; its own last
    assert all(float(line[-2].replace(",", "")) > 1000 for line in lines if line and line[0] in "0123")
    monkeypatch.setattr("sys.argv", ["plan", "--config", config, "--gpus", "1", "--gpu", "cpu"])
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(line[-2:] == ["-", "-"] for line in lines if line and line[0] in "0123")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h1000"], "a100-40, a100-80, h100"),
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "63"], "does not divide over 63"),
        (["--mfu", "40"], "at most 1"),
        (["model.base_model=/no/such/model"], "cannot load the base model '/no/such/model'"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--config", str(ROOT / "configs/um3_llama3_1b.yaml"), *options])
    with pytest.raises(UserError, match=message) as found:
        main()
    assert "\n" not in str(found.value)


def test_every_gpu_holds_what_its_name_says() -> None:
    for name, gpu in GPUS.items():
        memory = name.rpartition("-")[2]
        assert not memory.isdigit() or gpu.memory_gib == int(memory)
        assert gpu.bf16_tflops != gpu.bf16_tflops or gpu.bf16_tflops > gpu.float32_tflops


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_plan_passes_its_variables_on() -> None:
    command = ["make", "--no-print-directory", "-n", "plan", "CONFIG=paper", "GPUS=64", "GPU=h200", "ARGS=--mfu 0.5"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert found.endswith("-m train.plan.plan --config configs/um3_llama3_1b.yaml --gpus 64 --gpu h200 --mfu 0.5")
