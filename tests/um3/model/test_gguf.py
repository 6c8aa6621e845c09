"""GGUF files as bases: the same model and tokenizer, and one line for files that cannot be read as they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.gguf_files import write_gguf
from tests.helpers.processes import ROOT
from tests.helpers.tiny_um3 import LLAMA_3_ROPE, make_base
from train.phase import main as init
from um3.core.errors import UserError
from um3.model.extend import load_base, load_base_tokenizer, read_base_config
from um3.model.gguf import LLAMA_3_SCALING, rope_factors
from um3.model.language_model import load_model
from um3.model.text_tokenizer import encode_texts, train_text_tokenizer

SMOLLM2 = ROOT / "models" / "smollm2"
TEXTS = ["the quick  brown fox", "x =  12, 3456\n\n  7 don't", "é ü 日本 <|end_of_text|>", " a\tb \r\n"]
LLAMA_3 = LLAMA_3_ROPE | LLAMA_3_SCALING | {"rope_theta": 500_000.0, "factor": 32.0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_text_tokenizer(["the quick brown fox  12 345  6789 don't"] * 40, vocab_size=300)


def base_of(kind: str, **options: Any) -> PreTrainedModel:
    return make_base(kind, **{"vocab_size": 300, "intermediate_size": 64, **options})


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))).logits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA_3}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_a_file_gives_the_model_and_the_tokenizer_that_it_was_written_from(
    kind: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = base_of(kind, **options)
    tensors = {}
    if "rope_parameters" in options:
        tensors["rope_freqs.weight"] = rope_factors(base.config)
        assert tensors["rope_freqs.weight"].max() == 32 and tensors["rope_freqs.weight"].min() == 1
    path = write_gguf(tmp_path / "base.gguf", base=base, tokenizer=tokenizer, tensors=tensors)
    (tmp_path / "tokenizer.json").write_text("{}")  # of another model; a file stands for itself
    with torch.device("meta"):  # as `make plan` does
        assert read_base_config(str(path)).rope_parameters == base.config.rope_parameters
    loaded = load_base(str(path))
    assert type(loaded) is type(base) and not loaded.training
    assert loaded.config.tie_word_embeddings == base.config.tie_word_embeddings
    torch.testing.assert_close(logits(loaded), logits(base), rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    text_tokenizer, entries = load_base_tokenizer(str(path))
    assert entries == len(tokenizer) and text_tokenizer.bos_token == tokenizer.bos_token
    assert encode_texts(TEXTS, tokenizer=text_tokenizer) == encode_texts(TEXTS, tokenizer=tokenizer)


@pytest.mark.parametrize("weights", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantized_tensors_are_dequantized(weights: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = base_of("llama")
    loaded = load_base(str(write_gguf(tmp_path / "q.gguf", base=base, tokenizer=tokenizer, weights=weights)))
    kind = gguf.GGMLQuantizationType[weights]
    for name, parameter in base.named_parameters():
        expected = parameter.detach()
        if parameter.dim() == 2:
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(expected.numpy(), kind), kind))
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), expected), name


def test_um3_init_starts_from_a_file(
    tokenizer: PreTrainedTokenizerFast, qlip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of("llama", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "base.gguf", base=base, tokenizer=tokenizer)
    (tmp_path / "prose.jsonl").write_text('{"text": "the quick brown fox asks why. and why"}\n' * 40)
    settings = ["qk_norm=false", "data.num_sequences=2", "data.seq_len=64", f"loop.output_dir={tmp_path}/run"]
    settings += [f"base_model={path}", f"visual_tokenizer={qlip_folder}"]
    init(["um3-init", "--config", "demo", *settings, f"data.texts=[{{name: prose, path: {tmp_path}/prose.jsonl}}]"])
    loaded = load_model(tmp_path / "run" / "model")
    kept = len(tokenizer)
    rows_VD = loaded.model.get_input_embeddings().weight
    assert torch.equal(rows_VD[:kept], base.get_input_embeddings().weight[:kept])
    assert loaded.model.config.um3["base"]["license"] == "apache-2.0"
    assert loaded.model.config.um3["base"]["name"] == str(path)


ODD_MODELS: list[tuple[dict[str, Any], list[str]]] = [
    ({"values": {"general.architecture": "gemma2"}}, ["'gemma2'", "llama, qwen2, qwen3"]),
    ({"values": {"split.count": 3}}, ["split", "llama-gguf-split"]),
    ({"values": {"llama.rope.scaling.type": "yarn"}}, ["'yarn'"]),
    ({"tensors": {"rope_freqs.weight": torch.tensor([1.0, 2, 3, 9])}}, ["rope_freqs.weight"]),
    ({"tensors": {"blk.0.attn_q.bias": torch.zeros(32)}}, ["blk.0.attn_q.bias"]),
    ({"tensors": {"blk.1.ffn_up.weight": None}}, ["blk.1.ffn_up.weight", "missing"]),
    ({"tensors": {"output_norm.weight": torch.ones(31)}}, ["output_norm.weight", "31"]),
    ({"tensors": {"output_norm.weight": torch.full((32,), torch.nan)}}, ["NaN"]),
    ({"values": {"llama.block_count": 4_000_000_000}}, ["4,000,000,000 layers"]),
    ({"values": {"llama.embedding_length": 4_000_000_000}}, ["4000000000"]),
    ({"values": {"llama.attention.head_count": 0}}, ["modulo by zero"]),
    ({"values": {"llama.embedding_length": None}}, ["4096"]),
]
ODD_TOKENIZERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"values": {"tokenizer.ggml.pre": "poro-chat"}}, ["'poro-chat'"]),
    ({"values": {"tokenizer.ggml.tokens": None}}, ["tokenizer"]),
    ({"values": {"tokenizer.ggml.merges": ["a"]}}, ["tokenizer"]),
    ({"values": {"tokenizer.ggml.model": "rwkv"}}, ["rwkv"]),
    ({"values": {"tokenizer.ggml.bos_token_id": 9999}}, ["tokenizer"]),
]


@pytest.mark.parametrize(
    ("load", "changes", "names"),
    [*((load_base, *case) for case in ODD_MODELS), *((load_base_tokenizer, *case) for case in ODD_TOKENIZERS)],
)
def test_a_file_that_cannot_be_read_as_it_is_is_one_line(
    load: Any, changes: dict[str, Any], names: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", base=base_of("llama"), tokenizer=tokenizer, **changes)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert all(name in str(caught.value) for name in [str(path), *names])


def test_damaged_files_are_one_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", base=base_of("llama"), tokenizer=tokenizer).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    # Numbers of metadata entries and tensors that would not fit the memory.
    huge = whole[:8] + b"\xff" * 7 + b"\0" + b"\xff" * 7 + b"\0" + whole[24:]
    cut = [whole[: len(whole) * part // 40] for part in range(40)]
    for content in (pointer, huge, whole[:-1], *cut):
        (tmp_path / "bad.gguf").write_bytes(content)
        for load in (read_base_config, load_base, load_base_tokenizer):
            with pytest.raises(UserError, match=r"bad\.gguf is not a whole GGUF file \("):
                load(str(tmp_path / "bad.gguf"))
    (tmp_path / "a-00002-of-00003.gguf").write_bytes(whole)
    for name, message in (("missing.gguf", "does not exist"), ("a-00002-of-00003.gguf", "one part of a split file")):
        with pytest.raises(UserError, match=message):
            load_base(str(tmp_path / name))


def test_without_the_package_smollm2_is_one_line_with_the_hub_id(tmp_path: Path) -> None:
    script = [sys.executable, "scripts/smollm2.py", str(tmp_path / "smollm2")]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "BASE=HuggingFaceTB/SmolLM2-135M-Instruct" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "smollm2").exists()


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs `make smollm2`")
def test_smollm2_is_a_plain_folder_that_speaks() -> None:
    base, tokenizer = load_base(str(SMOLLM2)), AutoTokenizer.from_pretrained(SMOLLM2)
    assert "license: apache-2.0" in (SMOLLM2 / "README.md").read_text() and base.config.tie_word_embeddings
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(base.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer
    script = [sys.executable, "scripts/smollm2.py", str(SMOLLM2)]
    assert "up to date" in subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
