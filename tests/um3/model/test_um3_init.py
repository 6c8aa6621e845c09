"""`make um3-init` and the export: text as before, stock folders, the way there and back, one-line errors.

The Llama here has the full vocabulary of Llama-3.2, 128,256 rows; its other sizes are tiny.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from tests.helpers.tiny_um3 import make_base
from tests.helpers.trained_llama import trained_llama
from tests.tokenizer.conftest import change_json
from tests.train.conftest import train_apart
from tests.um3.model.test_model_folders import rewrite
from tokenizer.configuration import RELEASED_LICENSE
from train.phase import main as train
from train.settings.um3 import UM3Config
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.files import write_json
from um3.core.hub import CHECKSUMS, WEIGHTS
from um3.inference.pipeline import UM3Pipeline
from um3.model.export import export_text_half
from um3.model.language_model import load_model
from um3.model.vocabulary import UnifiedVocabulary

LLAMA_ENTRIES, QWEN_ENTRIES = 128_256, 303
LLAMA_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|r0|>", "<|r1|>", "<|finetune_right_pad_id|>"]
PROSE = "The quick brown fox jumps over the lazy dog; nobody asks why. " * 4
Start = Callable[..., Path]


def byte_tokenizer(*, words: int, specials: list[str], bos: bool, padding: bool) -> PreTrainedTokenizerFast:
    """Bytes, entries up to `words` that no text uses, then special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet + [f"unused{i}" for i in range(256, words)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special) for special in specials])
    options = ({"bos_token": specials[0]} if bos else {}) | ({"pad_token": specials[2]} if padding else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[1], **options)
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def save_base(folder: Path, *, kind: str) -> PreTrainedModel:
    """A base with random weights and its tokenizer: a Llama with the real vocabulary, Qwens with a padded one."""
    is_llama = kind == "llama"
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    if is_llama:
        specials = LLAMA_SPECIALS + [f"<|reserved_{i}|>" for i in range(251)]
    entries, rows = (LLAMA_ENTRIES, LLAMA_ENTRIES) if is_llama else (QWEN_ENTRIES, 320)
    words = entries - len(specials)
    text_tokenizer = byte_tokenizer(words=words, specials=specials, bos=is_llama, padding=not is_llama)
    assert len(text_tokenizer) == entries
    base = make_base(kind, vocab_size=rows, tie_word_embeddings=kind != "qwen2")
    base.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\nA base.\n")
    return base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with 128,256 tied rows, and Qwens whose 303 entries are padded to 320 rows."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("llama", "qwen2", "qwen3")}
    for kind, folder in folders.items():
        save_base(folder, kind=kind)
    return folders


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} {PROSE}"}) + "\n" for number in range(40)))
    return path


@pytest.fixture(scope="module")
def start(bases: dict[str, Path], qlip_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs um3-init once for each base and settings; returns its folder."""

    @cache
    def make(kind: str, *settings: str) -> Path:
        folder = tmp_path_factory.mktemp("run") / "um3-init"
        train(command(bases[kind], qlip_folder, text, folder, *settings))
        return folder

    return make


def command(base: Path | str, qlip: Path | str, text: Path | str, out: Path, *settings: str) -> list[str]:
    options = [f"base_model={base}", f"visual_tokenizer={qlip}", f"loop.output_dir={out}", "loop.max_steps=2"]
    options += ["data.num_sequences=2", "data.seq_len=64", "loop.batch_size=2", "engine.precision=fp32"]
    texts = [f"data.texts=[{{name: prose, path: {text}}}]"] if text else []
    return ["um3-init", "--config", "demo", *options, *texts, *settings]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


@torch.no_grad()
def logits(folder: Path, *, entries: int) -> torch.Tensor:
    """Text logits of a folder, loaded with stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = torch.randint(0, entries, (2, 24), generator=torch.Generator().manual_seed(0))
    return model(input_ids).logits[..., :entries]


def test_text_logits_of_an_extended_llama_are_unchanged(start, bases):
    folder = start("llama", "qk_norm=false")
    assert torch.equal(logits(folder / "model", entries=LLAMA_ENTRIES), logits(bases["llama"], entries=LLAMA_ENTRIES))
    loaded = load_model(folder / "model")
    ids = loaded.ids
    assert isinstance(loaded.model, LlamaForCausalLM) and not loaded.model.config.tie_word_embeddings
    assert (ids.begin_of_image_id, ids.end_of_image_id, ids.pad_id) == (LLAMA_ENTRIES, LLAMA_ENTRIES + 1, 128_004)
    assert (ids.text_vocab_size, ids.subtokens, ids.bits_per_subtoken) == (LLAMA_ENTRIES + 2, 2, 14)
    done = record(folder)
    assert done["text_loss_after"]["base_entries"] == done["text_loss_before"] > 1
    assert 0 <= done["text_loss_after"]["text_vocab_size"] - done["text_loss_before"] < 1e-4
    assert done["parameters"]["total"] == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_the_losses_are_those_of_the_two_models_on_validation_text(start, bases):
    """Compared with transformers' own loss on the sequences in the cache."""
    folder = start("llama", "qk_norm=true")
    done = record(folder)
    kept = [json.loads(path.read_text())["sequences"] for path in (folder / "cache").glob("sequences-*.json")]
    rows_BT = torch.tensor([[128_000, *row] for row in min(kept, key=len)])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(bases["llama"])(rows_BT, labels=rows_BT).loss.item()
        assert done["text_loss_before"] == pytest.approx(loss, rel=1e-5) and done["text_tokens"] == 2 * 63
        model = load_model(folder / "model").model
        scores_BTV = model(rows_BT).logits[:, :-1, :LLAMA_ENTRIES]
        after = torch.nn.functional.cross_entropy(scores_BTV.flatten(0, 1), rows_BT[:, 1:].flatten()).item()
    assert done["text_loss_after"]["base_entries"] == pytest.approx(after, rel=1e-5) != loss
    assert isinstance(model, Qwen3ForCausalLM) and done["architecture"] == "Qwen3ForCausalLM"
    assert done["steps"] == 2 and len(done["divergences"]) == 2


def test_distillation_brings_the_model_back_and_resumes(qlip_folder, text, tmp_path, monkeypatch, capsys):
    """From gains alone, on a trained Llama whose heads differ; a finished run resumes for more steps as one run."""
    monkeypatch.setattr("um3.model.qk_norm.MAX_ERROR", -1.0)
    for name, value in {"MAKELEVEL": "1", "CONFIG": "demo", "RUN": "my run", "TEXT": str(text), "DATA": ""}.items():
        monkeypatch.setenv(name, value)
    text_tokenizer = byte_tokenizer(words=256, specials=LLAMA_SPECIALS[:5], bos=True, padding=False)
    trained_llama().save_pretrained(tmp_path / "base")
    text_tokenizer.save_pretrained(tmp_path / "base")
    settings = ["loop.max_steps=12", "loop.batch_size=8", "evaluate_every_steps=4", "optimizer.lr=1e-3"]
    settings += ["optimizer.schedule=constant"]
    runs = [command(tmp_path / "base", qlip_folder, text, tmp_path / name, *settings) for name in ("whole", "stopped")]
    train(runs[0])
    before, *_, after = record(tmp_path / "whole")["divergences"]
    assert after < 0.7 * before
    encode, next_command = map(shlex.split, capsys.readouterr().out.splitlines()[-2:])
    tokenizer = f"QLIP={tmp_path}/whole/model/qlip"  # this run has no stage 2
    assert encode[3:] == ["make", "codes", "RUN=my run", tokenizer]
    assert next_command[2:7] == ["make", "um3", "RUN=my run", f"TEXT={text}", tokenizer]
    assert load_config(UM3Config, overrides=shlex.split(next_command[7].removeprefix("ARGS=")))
    train([*runs[1], "loop.max_steps=8"])
    train(runs[1])
    files = [tmp_path / name / "model/model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert record(tmp_path / "stopped")["divergences"] == record(tmp_path / "whole")["divergences"]
    # A divergence that no longer falls ends the training.
    still = ["optimizer.lr=1e-12", "evaluate_every_steps=1"]
    train([*command(tmp_path / "base", qlip_folder, text, tmp_path / "still", *settings), *still])
    assert record(tmp_path / "still")["steps"] == 1


@pytest.mark.slow
def test_stock_transformers_loads_the_start_without_our_code(start, tmp_path):
    folder = start("llama", "qk_norm=true") / "model"
    script = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
assert tokenizer.chat_template == "{{{{ messages }}}}"
assert tokenizer.convert_tokens_to_ids("<|begin_of_image|>") == {LLAMA_ENTRIES}
assert model.generation_config.eos_token_id == 128001 and model.generation_config.pad_token_id == 128004
with torch.no_grad():
    torch.save(model(torch.tensor([[128000, 5, 6, {LLAMA_ENTRIES}, 130000]])).logits, {str(tmp_path / "logits.pt")!r})
assert not {{"um3", "tokenizer", "train"}} & set(sys.modules), "our code was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = load_model(folder).model(torch.tensor([[128000, 5, 6, LLAMA_ENTRIES, 130000]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


@pytest.mark.slow
def test_without_a_text_the_embedded_prose_is_used(bases, qlip_folder, tmp_path):
    train(command(bases["qwen2"], qlip_folder, "", tmp_path / "out"))
    assert record(tmp_path / "out")["text_tokens"] == 2 * 63


def test_the_start_is_a_um3_that_generates_and_is_made_once(start, bases, qlip_folder, text, capsys):
    folder = start("qwen2", "qk_norm=true")
    pipeline = UM3Pipeline.from_pretrained(folder / "model")
    assert len(pipeline.complete(["a red"], max_new_tokens=4)) == 1
    assert pipeline.generate(["a red disk"], seed=1).arrays.shape == (1, 16, 16, 3)
    capsys.readouterr()
    train(command(bases["qwen2"], qlip_folder, text, folder, "qk_norm=true"))
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_export_restores_the_base(kind, start, bases, tmp_path):
    entries = LLAMA_ENTRIES if kind == "llama" else QWEN_ENTRIES
    base_folder, folder = bases[kind], start(kind, f"qk_norm={str(kind == 'qwen3').lower()}")
    summary = export_text_half(folder / "model", out=tmp_path / "plain")
    base, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (base_folder, tmp_path / "plain"))
    assert type(plain) is type(base) and plain.config.vocab_size == entries
    assert plain.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert not hasattr(plain.config, "um3") and "inserted" not in summary
    assert not hasattr(plain.generation_config, "image_sampling")
    assert torch.equal(logits(tmp_path / "plain", entries=entries), logits(base_folder, entries=entries))
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base_folder, tmp_path / "plain"))
    assert before.get_vocab() == after.get_vocab() and before(PROSE)["input_ids"] == after(PROSE)["input_ids"]
    assert after.pad_token == ("<|finetune_right_pad_id|>" if kind == "llama" else "<|endoftext|>")
    assert "begin_of_image" not in (tmp_path / "plain/tokenizer_config.json").read_text()
    assert not (tmp_path / "plain/qlip").exists()
    assert before.chat_template == after.chat_template == "{{ messages }}"
    card = (tmp_path / "plain/README.md").read_text()
    assert (
        "pipeline_tag: text-generation\n" in card and f"{entries:,} text entries" in card and str(base_folder) in card
    )
    with pytest.raises(UserError, match="already exists"):
        export_text_half(folder / "model", out=tmp_path / "plain")


def test_a_trained_head_and_an_inserted_qk_norm_are_exported(start, tmp_path):
    """The head is untied and the layout Qwen3's."""
    folder = shutil.copytree(start("llama", "qk_norm=true") / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[7] += 0.5
    model.save_pretrained(folder)
    (folder / CHECKSUMS).unlink()
    summary = export_text_half(folder, out=tmp_path / "plain")
    assert "LlamaForCausalLM" in summary and "Qwen3" in summary
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is Qwen3ForCausalLM and not plain.config.tie_word_embeddings
    assert torch.equal(logits(tmp_path / "plain", entries=LLAMA_ENTRIES), logits(folder, entries=LLAMA_ENTRIES))


@pytest.mark.slow
def test_two_processes_distil_as_one_does(start, bases, qlip_folder, text, tmp_path):
    one = start("qwen2", "qk_norm=true")
    train_apart(command(bases["qwen2"], qlip_folder, text, tmp_path / "two", "qk_norm=true"), processes=2)
    two = record(tmp_path / "two")
    assert two["processes"] == 2 and two["divergences"] == pytest.approx(record(one)["divergences"], rel=1e-4)


def test_random_rows_have_the_bases_deviation_and_follow_the_seed(start, bases):
    base = AutoModelForCausalLM.from_pretrained(bases["qwen2"])
    heads = []
    for settings in (["loop.seed=0"], ["loop.seed=0", "data.num_sequences=3"], ["loop.seed=1"]):
        folder = start("qwen2", "new_token_init=random", "qk_norm=false", "subtokens=4", *settings)
        loaded = load_model(folder / "model")
        assert loaded.ids.bits_per_subtoken == 7
        embedding_VD, head_VD = loaded.model.model.embed_tokens.weight, loaded.model.lm_head.weight
        for table_VD, rows_VD in ((embedding_VD, base.model.embed_tokens.weight), (head_VD, base.lm_head.weight)):
            deviation = rows_VD[:QWEN_ENTRIES].std().item()
            assert table_VD[QWEN_ENTRIES:].std().item() == pytest.approx(deviation, rel=0.05)
            assert torch.equal(table_VD[:QWEN_ENTRIES], rows_VD[:QWEN_ENTRIES])
        assert not torch.equal(head_VD[QWEN_ENTRIES:], embedding_VD[QWEN_ENTRIES:])
        heads.append(head_VD)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(("stored", "dtype", "expected"), [
    (torch.bfloat16, "base", torch.bfloat16), (torch.float32, "bfloat16", torch.bfloat16),
    (torch.bfloat16, "float32", torch.float32),
])  # fmt: skip
def test_the_saved_type_and_the_loss_of_the_saved_weights(stored, dtype, expected, qlip_folder, text, tmp_path):
    save_base(tmp_path / "base", kind="qwen2").to(stored).save_pretrained(tmp_path / "base")
    train(command(tmp_path / "base", qlip_folder, text, tmp_path / "out", f"dtype={dtype}", "qk_norm=false"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    done = record(tmp_path / "out")
    lossless = stored == expected or expected == torch.float32
    assert (done["text_loss_after"]["base_entries"] == done["text_loss_before"]) == lossless


def test_the_model_card(start, qlip_folder, bases, text, tmp_path):
    folder = start("llama", "qk_norm=true") / "model"
    card = (folder / "README.md").read_text()
    stored = json.loads((folder / "config.json").read_text())["um3"]
    ids = UnifiedVocabulary.from_dict(stored)
    assert card.startswith("---\n") and "license: llama3.2\n" in card and "library_name: transformers\n" in card
    facts = [stored["tokenizer_fingerprint"], str(bases["llama"]), "a starting point", "Built with Llama"]
    facts += [f"| {ids.subtoken_range(s)[0]} .. {ids.subtoken_range(s)[1] - 1} |" for s in range(ids.subtokens)]
    facts += ["`Qwen3ForCausalLM`", f"| total | {record(folder.parent)['parameters']['total']:,} |"]
    assert not [fact for fact in facts if fact not in card]
    released = shutil.copytree(qlip_folder, tmp_path / "qlip")
    change_json(released / "config.json", weights_license=RELEASED_LICENSE)
    train(command(bases["qwen2"], released, text, tmp_path / "out"))
    card = (tmp_path / "out/model/README.md").read_text()
    assert RELEASED_LICENSE in card and "license: other\n" in card


def described(**config: Any) -> Callable[[Path], Any]:
    return lambda folder: write_json(folder / "config.json", config)


CLASSIFIER = "LlamaForSequenceClassification"
TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (described(model_type="gpt2"), "'gpt2' model.*llama"),
        (described(model_type="llama", architectures=[CLASSIFIER]), f"{CLASSIFIER}.*CausalLM"),
        (described(model_type="mystery"), "cannot load the base model .*mystery"),
        (lambda base: [file.unlink() for file in base.glob("tokenizer*")], "no text tokenizer at"),
        (lambda base: rewrite(base / WEIGHTS, **{TENSOR: None}), f"'{TENSOR}'"),
    ],
)
def test_an_invalid_base_is_a_one_line_error(change, message, qlip_folder, text, tmp_path):
    save_base(tmp_path / "base", kind="qwen2")
    change(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        train(command(tmp_path / "base", qlip_folder, text, tmp_path / "out"))
    assert not (tmp_path / "out/model").exists()


def test_other_mistakes_are_one_line(bases, qlip_folder, text, start, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    qwen, out, short = bases["qwen2"], tmp_path / "out", tmp_path / "short.txt"
    short.write_text("too short")

    def refused(message: str, *settings: str, **changes: Path | str) -> None:
        arguments: dict[str, Any] = {"base": qwen, "qlip": qlip_folder, "text": text, "out": out} | changes
        with pytest.raises(UserError, match=message):
            train(command(**arguments) + list(settings))

    refused("BASE=", base="''")
    refused("run `make stage2` first", qlip=tmp_path / "absent")
    refused("not a QLIP", qlip=qwen)
    refused("'nobody/llama'", base="nobody/llama")
    refused("already a UM3", base=start("llama", "qk_norm=false") / "model")
    refused("subtokens=3 x bits_per_subtoken=9 is not 28, the bits", "subtokens=3")
    refused("at most 20 bits", "subtokens=1")
    refused("subtokens is -1", "subtokens=-1")
    refused("none of its 1 samples is in the val split", text=short)
    refused("absent.txt", text=tmp_path / "absent.txt")
    refused("unknown key 'qknorm'", "qknorm=true")
    refused("qk_norm: False -> True", "qk_norm=true", base=bases["llama"], out=start("llama", "qk_norm=false"))
    (out / "model").mkdir(parents=True, exist_ok=True)
    (out / "model/thesis.txt").write_text("mine")
    refused("without done.json")
    assert [path.name for path in (out / "model").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="no 'um3' in its config"):
        export_text_half(qwen, out=tmp_path / "plain")
