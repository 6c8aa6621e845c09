"""`make um3-init` and `make um3-export`: text as before, stock folders, the way there and back, one-line errors.

The Llama here has Llama-3.2's vocabulary in full, 128,256 rows, and nothing else of its size.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokenizer.configuration import RELEASED_LICENSE
from train.recipes.um3_init import main as init
from um3.core.errors import UserError
from um3.inference.pipeline import UM3Pipeline
from um3.model.export import main as export
from um3.model.language_model import load_model
from um3.model.vocabulary import UnifiedVocabulary

LLAMA_ENTRIES = 128_256
LLAMA_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|r0|>", "<|r1|>", "<|finetune_right_pad_id|>"]
SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
SIZES |= dict(max_position_embeddings=128, initializer_range=0.3)
PROSE = "The quick brown fox jumps over the lazy dog; nobody asks why. " * 60


def byte_tokenizer(*, words: int, specials: list[str], bos: bool, padding: bool) -> PreTrainedTokenizerFast:
    """Bytes, entries that no text uses up to `words`, then special entries."""
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
    """A base with random weights and its tokenizer: Llama of the real vocabulary, Qwens with a padded one."""
    torch.manual_seed(0)
    base: PreTrainedModel
    if kind == "llama":
        specials = LLAMA_SPECIALS + [f"<|reserved_{i}|>" for i in range(251)]
        text_tokenizer = byte_tokenizer(words=LLAMA_ENTRIES - 256, specials=specials, bos=True, padding=False)
        assert len(text_tokenizer) == LLAMA_ENTRIES
        base = LlamaForCausalLM(LlamaConfig(vocab_size=LLAMA_ENTRIES, tie_word_embeddings=True, **SIZES))
    else:
        specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        text_tokenizer = byte_tokenizer(words=300, specials=specials, bos=False, padding=True)
        config, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
        tied = kind == "qwen3"
        base = model_class(
            config(vocab_size=320, tie_word_embeddings=tied, **SIZES, **({"head_dim": 8} if tied else {}))
        )
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    base.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\nA base.\n")
    return base.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with 128,256 tied rows."""
    folder = tmp_path_factory.mktemp("llama")
    save_base(folder, kind="llama")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 whose vocabulary of 303 entries is padded to 320 rows."""
    folder = tmp_path_factory.mktemp("qwen")
    save_base(folder, kind="qwen2")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose in a file."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture(scope="module")
def start(llama: Path, qlip_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the start of a Llama, or gives the one that was made for these settings."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*settings: str) -> Path:
        if settings not in made:
            folder = tmp_path_factory.mktemp("run") / "um3-init"
            init(command(llama, qlip_folder, text, folder, *settings))
            made[settings] = folder
        return made[settings]

    return make


def command(base: Path | str, qlip: Path | str, text: Path | str, out: Path, *settings: str) -> list[str]:
    options = [f"base_model={base}", f"visual_tokenizer={qlip}", f"output_dir={out}", "rows=2", "seq_len=64"]
    return [*options, *([f"text={text}"] if text else []), *settings]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


@torch.no_grad()
def logits(folder: Path, *, entries: int) -> torch.Tensor:
    """Text logits of a folder, as stock transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = torch.randint(0, entries, (2, 24), generator=torch.Generator().manual_seed(0))
    return model(input_ids).logits[..., :entries]


def test_the_start_of_a_llama_speaks_as_before(start: Callable[..., Path], llama: Path) -> None:
    folder = start("qk_norm=false")
    assert torch.equal(logits(folder / "model", entries=LLAMA_ENTRIES), logits(llama, entries=LLAMA_ENTRIES))
    loaded, base = load_model(folder / "model"), AutoModelForCausalLM.from_pretrained(llama)
    assert isinstance(loaded.model, LlamaForCausalLM) and not loaded.model.config.tie_word_embeddings
    ids = loaded.ids
    assert (ids.begin_of_image_id, ids.end_of_image_id, ids.pad_id) == (LLAMA_ENTRIES, LLAMA_ENTRIES + 1, 128_004)
    assert (ids.text_vocab_size, ids.subtokens, ids.bits_per_subtoken) == (LLAMA_ENTRIES + 2, 2, 14)
    rows_VD = base.model.embed_tokens.weight
    for table_VD in (loaded.model.model.embed_tokens.weight, loaded.model.lm_head.weight):
        assert torch.equal(table_VD[:LLAMA_ENTRIES], rows_VD) and len(table_VD) == ids.vocab_size
        new_VD = table_VD[LLAMA_ENTRIES:]
        torch.testing.assert_close(new_VD, rows_VD.mean(0).expand_as(new_VD), rtol=1e-4, atol=1e-6)
    done = record(folder)
    assert done["text_loss_after"]["base_entries"] == done["text_loss_before"] > 1
    assert 0 <= done["text_loss_after"]["text_vocab_size"] - done["text_loss_before"] < 1e-4
    counted = sum(parameter.numel() for parameter in loaded.model.parameters())
    norms = 32 * (2 * 2 + 1)
    assert done["parameters"] == {
        "text embedding": 128_258 * 32,
        "visual embedding": 32_768 * 32,
        "layers": counted - 2 * (128_258 + 32_768) * 32 - norms,
        "norms": norms,
        "text head": 128_258 * 32,
        "visual head": 32_768 * 32,
        "total": counted,
    }


def test_the_losses_are_those_of_the_two_models_on_text_that_calibrated_nothing(
    start: Callable[..., Path], llama: Path
) -> None:
    """Against transformers' own loss on the third and fourth row of the text."""
    done = record(start("qk_norm=true"))
    ids = AutoTokenizer.from_pretrained(llama)(PROSE.strip(), add_special_tokens=False)["input_ids"]
    rows_BT = torch.tensor([[128_000, *ids[63 * row : 63 * row + 63]] for row in (2, 3)])
    base = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        assert done["text_loss_before"] == pytest.approx(base(rows_BT, labels=rows_BT).loss.item(), rel=1e-5)
        model = load_model(start("qk_norm=true") / "model").model
        scores_BTV = model(rows_BT).logits[:, :-1, :LLAMA_ENTRIES]
        after = torch.nn.functional.cross_entropy(scores_BTV.flatten(0, 1), rows_BT[:, 1:].flatten()).item()
    assert done["text_loss_after"]["base_entries"] == pytest.approx(after, rel=1e-5)
    assert done["text_tokens"] == 2 * 63


def test_inserted_qk_norm_is_calibrated_and_its_shift_reported(
    start: Callable[..., Path], capsys: pytest.CaptureFixture[str], llama: Path, qlip_folder: Path, text: Path
) -> None:
    done = record(start("qk_norm=true"))
    model = load_model(start("qk_norm=true") / "model").model
    assert isinstance(model, Qwen3ForCausalLM) and done["architecture"] == "Qwen3ForCausalLM"
    attention = model.model.layers[0].self_attn
    assert attention.q_norm.weight.std() > 0 and (attention.q_norm.weight.mean() - 1).abs() > 0.05
    shift = done["text_loss_after"]["base_entries"] - done["text_loss_before"]
    assert shift != 0
    capsys.readouterr()
    init(command(llama, qlip_folder, text, start("qk_norm=true"), "qk_norm=true"))
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_stock_transformers_loads_the_start_without_our_code(start: Callable[..., Path], tmp_path: Path) -> None:
    folder = start("qk_norm=true") / "model"
    script = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
assert tokenizer.chat_template is None and tokenizer.convert_tokens_to_ids("<|begin_of_image|>") == {LLAMA_ENTRIES}
assert model.generation_config.eos_token_id == 128001 and model.generation_config.pad_token_id == 128004
with torch.no_grad():
    torch.save(model(torch.tensor([[128000, 5, 6, {LLAMA_ENTRIES}, 130000]])).logits, {str(tmp_path / "logits.pt")!r})
assert not {{"um3", "tokenizer", "train"}} & set(sys.modules), "our code was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = load_model(folder).model(torch.tensor([[128000, 5, 6, LLAMA_ENTRIES, 130000]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_without_a_text_the_embedded_prose_serves(qwen: Path, qlip_folder: Path, tmp_path: Path) -> None:
    init(command(qwen, qlip_folder, "", tmp_path / "out"))
    assert record(tmp_path / "out")["text_tokens"] == 2 * 63


def test_the_start_is_a_um3_that_writes_and_draws(start: Callable[..., Path]) -> None:
    pipeline = UM3Pipeline.from_pretrained(start("qk_norm=true") / "model")
    assert len(pipeline.complete(["a red"], max_new_tokens=4)) == 1
    assert pipeline.generate(["a red disk"], seed=1).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_there_and_back_again(
    kind: str, start: Callable[..., Path], llama: Path, qlip_folder: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    entries = LLAMA_ENTRIES if kind == "llama" else 303
    if kind == "llama":
        base_folder, folder = llama, start("qk_norm=false")
    else:
        base_folder, folder = tmp_path / "base", tmp_path / "um3-init"
        save_base(base_folder, kind=kind)
        init(command(base_folder, qlip_folder, text, folder, f"qk_norm={str(kind == 'qwen3').lower()}"))
    capsys.readouterr()
    export(["--model", str(folder / "model"), "--out", str(tmp_path / "plain")])
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is type(base) and plain.config.vocab_size == entries
    assert plain.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert not hasattr(plain.config, "um3") and "inserted" not in capsys.readouterr().out
    assert torch.equal(logits(tmp_path / "plain", entries=entries), logits(base_folder, entries=entries))
    before, after = (AutoTokenizer.from_pretrained(each) for each in (base_folder, tmp_path / "plain"))
    assert before.get_vocab() == after.get_vocab() and after.pad_token == ("<|endoftext|>" if kind != "llama" else
                                                                          "<|finetune_right_pad_id|>")  # fmt: skip
    assert before(PROSE)["input_ids"] == after(PROSE)["input_ids"]
    assert not (tmp_path / "plain/qlip").exists()
    with pytest.raises(UserError, match="exists already"):
        export(["--model", str(folder / "model"), "--out", str(tmp_path / "plain")])


def test_with_inserted_qk_norm_the_text_half_is_exported_as_qwen3(
    start: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = start("qk_norm=true") / "model"
    capsys.readouterr()
    export(["--model", str(folder), "--out", str(tmp_path / "plain")])
    assert "base was a LlamaForCausalLM" in (said := capsys.readouterr().out) and "Qwen3" in said
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is Qwen3ForCausalLM
    assert torch.equal(logits(tmp_path / "plain", entries=LLAMA_ENTRIES), logits(folder, entries=LLAMA_ENTRIES))


def test_a_trained_head_is_exported_untied(start: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(start("qk_norm=false") / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[7] += 0.5
    model.save_pretrained(folder)
    export(["--model", str(folder), "--out", str(tmp_path / "plain")])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not plain.config.tie_word_embeddings
    assert torch.equal(logits(tmp_path / "plain", entries=LLAMA_ENTRIES), logits(folder, entries=LLAMA_ENTRIES))


def test_random_rows_have_the_bases_deviation_and_the_seed_decides(
    qwen: Path, qlip_folder: Path, text: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(qwen)
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = ["new_token_init=random", "qk_norm=false", f"seed={seed}", "subtokens=4"]
        init(command(qwen, qlip_folder, text, tmp_path / name, *settings))
        loaded = load_model(tmp_path / name / "model")
        assert loaded.ids.bits_per_subtoken == 7
        for table_VD, rows_VD in zip(
            (loaded.model.model.embed_tokens.weight, loaded.model.lm_head.weight),
            (base.model.embed_tokens.weight, base.lm_head.weight),
            strict=True,
        ):
            assert table_VD[303:].std().item() == pytest.approx(rows_VD[:303].std().item(), rel=0.05)
            assert torch.equal(table_VD[:303], rows_VD[:303])
        heads.append(loaded.model.lm_head.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0][303:], loaded.model.model.embed_tokens.weight[303:])


@pytest.mark.parametrize(("stored", "asked", "expected"), [
    (torch.bfloat16, "base", torch.bfloat16), (torch.float32, "bfloat16", torch.bfloat16),
    (torch.bfloat16, "float32", torch.float32),
])  # fmt: skip
def test_the_saved_type_and_the_loss_of_what_was_saved(
    stored: torch.dtype, asked: str, expected: torch.dtype, qlip_folder: Path, text: Path, tmp_path: Path
) -> None:
    save_base(tmp_path / "base", kind="qwen2").to(stored).save_pretrained(tmp_path / "base")
    init(command(tmp_path / "base", qlip_folder, text, tmp_path / "out", f"dtype={asked}", "qk_norm=false"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    done = record(tmp_path / "out")
    lossless = stored == expected or expected == torch.float32
    assert (done["text_loss_after"]["base_entries"] == done["text_loss_before"]) == lossless


def test_the_card_says_what_it_is(
    start: Callable[..., Path], qlip_folder: Path, llama: Path, qwen: Path, text: Path, tmp_path: Path
) -> None:
    folder = start("qk_norm=true") / "model"
    card = (folder / "README.md").read_text()
    stored = json.loads((folder / "config.json").read_text())["um3"]
    ids = UnifiedVocabulary.from_dict(stored)
    assert card.startswith("---\nlibrary_name: transformers\n") and "license: llama3.2\n" in card
    for fact in (
        stored["tokenizer_fingerprint"],
        str(llama),
        "a starting point",
        "Built with Llama",
        "`Qwen3ForCausalLM`",
    ):
        assert fact in card, fact
    for start_id, end_id in (ids.subtoken_range(subtoken) for subtoken in range(ids.subtokens)):
        assert f"| {start_id} .. {end_id - 1} |" in card
    assert f"| total | {record(folder.parent)['parameters']['total']:,} |" in card
    released = tmp_path / "qlip"
    shutil.copytree(qlip_folder, released)
    config = json.loads((released / "config.json").read_text()) | {"weights_license": RELEASED_LICENSE}
    (released / "config.json").write_text(json.dumps(config))
    init(command(qwen, released, text, tmp_path / "out"))
    card = (tmp_path / "out/model/README.md").read_text()
    assert RELEASED_LICENSE in card and "license: other\n" in card


def spoiled(folder: Path, kind: str) -> Path:
    """A base folder with one thing wrong."""
    base = save_base(folder, kind="qwen2")
    if kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)).save_pretrained(folder)
    elif kind == "bert":
        BertModel(BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)).save_pretrained(folder)
    elif kind == "classifier":
        LlamaForSequenceClassification(LlamaConfig(vocab_size=320, **SIZES)).save_pretrained(folder)
    elif kind == "unknown":
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "mystery"}
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "vocabulary":
        byte_tokenizer(words=400, specials=["<s>", "</s>"], bos=True, padding=False).save_pretrained(folder)
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "weights":
        state = base.state_dict()
        del state["model.layers.0.mlp.up_proj.weight"]
        base.save_pretrained(folder, state_dict=state)
    elif kind == "damaged":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("gpt2", "is a 'gpt2' model; UM3 extends one of: llama"),
        ("bert", "is a 'bert' model"),
        ("classifier", "is a LlamaForSequenceClassification, no causal language model"),
        ("unknown", "cannot load the base model .*mystery"),
        ("vocabulary", "tokenizer has 40. entries, but the base only 320 rows"),
        ("no tokenizer", "no text tokenizer at"),
        ("weights", "lack 'model.layers.0.mlp.up_proj.weight'"),
        ("damaged", "cannot load the base model"),
    ],
)
def test_a_base_with_something_wrong_is_one_line(
    kind: str, line: str, qlip_folder: Path, text: Path, tmp_path: Path
) -> None:
    base = spoiled(tmp_path / "base", kind)
    with pytest.raises(UserError, match=line) as caught:
        init(command(base, qlip_folder, text, tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line(
    qwen: Path, qlip_folder: Path, text: Path, start: Callable[..., Path], tmp_path: Path
) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    short.write_text("too short")

    def refused(
        line: str, *settings: str, base: Path | str = qwen, qlip: Path = qlip_folder, text: Path = text, out: Path = out
    ) -> None:
        with pytest.raises(UserError, match=line) as caught:
            init(command(base, qlip, text, out, *settings))
        assert "\n" not in str(caught.value)

    refused("BASE=FOLDER_OR_HUB_ID", base="''")
    refused("run `make stage2` first", qlip=tmp_path / "absent")
    refused("not a QLIP", qlip=qwen)
    refused("cannot load the base model 'nobody/llama'", base="nobody/llama")
    refused("is a UM3 already", base=start("qk_norm=false") / "model")
    refused("subtokens=3 x bits_per_subtoken=9 is not the 28 bits", "subtokens=3")
    refused("at most 20 bits", "subtokens=1")
    refused("subtokens is -1", "subtokens=-1")
    refused("has fewer than 128 tokens", "seq_len=4000", text=short)
    refused("absent.txt", text=tmp_path / "absent.txt")
    refused("unknown key 'qknorm'", "qknorm=true")
    assert not out.exists()
    refused("holds something else", "qk_norm=true", out=start("qk_norm=false"))
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused("holds something else")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="no 'um3' in its config"):
        export(["--model", str(qwen), "--out", str(tmp_path / "plain")])
