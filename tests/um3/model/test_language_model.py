"""The stock language model: extension, query-key normalisation, parameter counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from um3.core.errors import UserError
from um3.model.extend import extend_model, fit_gains, load_base
from um3.model.language_model import ModelConfig, build_model, count_parameters
from um3.model.vocabulary import UnifiedVocabulary

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TEXT_BT = torch.randint(5, 48, (4, 20), generator=torch.Generator().manual_seed(0))


def make_base(kind: str, *, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        rope["original_max_position_embeddings"] = 32
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, rope_parameters=rope)).eval()
    if kind == "qwen2":
        base = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)).eval()
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return base
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied)).eval()


@torch.no_grad()
def text_logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TEXT_BT).logits[..., :48]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_extension_alone_changes_no_text_logit(
    kind: str, tied: bool, make_ids: Callable[..., UnifiedVocabulary]
) -> None:
    base = make_base(kind, tied=tied)
    before = text_logits(base)
    model = extend_model(base, ids=make_ids(), qk_norm=kind == "qwen3")
    assert type(model) is type(base)
    assert torch.equal(text_logits(model), before)


def test_new_rows_are_the_mean_and_the_head_is_untied(make_ids: Callable[..., UnifiedVocabulary]) -> None:
    base, ids = make_base("llama"), make_ids()
    rows = base.model.embed_tokens.weight[:44].mean(0)
    # The base's tokenizer has 44 entries: its last four rows are padding.
    model = extend_model(base, ids=ids, qk_norm=False, base_entries=44)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert len(table) == ids.vocab_size
        assert torch.equal(table[:44], base.model.embed_tokens.weight[:44])
        for new in (44, 47, 48, 49, ids.text_vocab_size, ids.vocab_size - 1):
            torch.testing.assert_close(table[new], rows)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    model.model.embed_tokens.weight.data.add_(1.0)
    torch.testing.assert_close(model.lm_head.weight[48], rows)


def test_a_padded_vocabulary_is_cut(make_ids: Callable[..., UnifiedVocabulary]) -> None:
    ids = make_ids(text_vocab_size=40)
    model = extend_model(make_base("qwen3"), ids=ids, qk_norm=True)
    assert len(model.lm_head.weight) == ids.vocab_size == 40 + 512


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_inserted_qk_norm_is_qwen3_and_calibration_brings_it_closer(
    kind: str, make_ids: Callable[..., UnifiedVocabulary]
) -> None:
    base = make_base(kind)
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(2.0)
        layer.self_attn.k_proj.weight.data.mul_(3.0)
    before = text_logits(base).log_softmax(-1)

    def divergence(**options: Any) -> float:
        model = extend_model(base, ids=make_ids(), qk_norm=True, **options).eval()
        assert isinstance(model, Qwen3ForCausalLM)
        return float((before.exp() * (before - text_logits(model).log_softmax(-1))).sum(-1).mean())

    assert divergence(gains=fit_gains(base, calibration=[TEXT_BT])) < 0.75 * divergence()


def test_gains_restore_a_base_whose_queries_and_keys_have_constant_norm(
    make_ids: Callable[..., UnifiedVocabulary],
) -> None:
    """When rms(q) and rms(k) are the same everywhere, insertion must be exact: biases dominate to make it so."""
    base = make_base("qwen2")
    for layer in base.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.mul_(1e-4)
            projection.bias.data = torch.linspace(0.5, 1.5, 8).repeat(len(projection.bias) // 8)
    before = text_logits(base)
    gains = fit_gains(base, calibration=[TEXT_BT])
    model = extend_model(base, ids=make_ids(), qk_norm=True, gains=gains).eval()
    torch.testing.assert_close(text_logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_fresh_model_trains_and_has_the_asked_shape(
    qk_norm: bool, make_ids: Callable[..., UnifiedVocabulary]
) -> None:
    ids = make_ids()
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=qk_norm)
    model = build_model(config, ids=ids)
    assert isinstance(model, Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)
    assert model.config.to_dict()["rope_parameters"]["rope_theta"] == 10_000.0
    assert model.generation_config.pad_token_id == ids.pad_id
    model(TEXT_BT, labels=TEXT_BT).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_paper_size_on_the_meta_device() -> None:
    """Llama-3.2-1B: 1,235,814,400 parameters, then an untied head and 2 x 32,768 visual rows of width 2,048."""
    ids = UnifiedVocabulary(
        text_vocab_size=128_258,
        subtokens=2,
        bits_per_subtoken=14,
        num_patches=256,
        bos_id=128_000,
        eos_id=128_001,
        pad_id=128_004,
        begin_of_image_id=128_256,
        end_of_image_id=128_257,
    )
    llama = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(llama)
        assert sum(parameter.numel() for parameter in base.parameters()) == 1_235_814_400
        model = extend_model(base, ids=ids, qk_norm=True)
    counts = count_parameters(model, ids=ids)
    assert counts.visual_rows_in == counts.visual_rows_out == 32_768 * 2048
    assert counts.text_rows_in == counts.text_rows_out == 128_258 * 2048
    assert counts.body == 1_235_814_400 - 128_256 * 2048 + 16 * 2 * 64
    assert counts.norms == (16 * 2 + 1) * 2048 + 16 * 2 * 64
    assert list(counts.by_part().values())[-1] == counts.total
    assert counts.total == sum(parameter.numel() for parameter in model.parameters()) == 1_632_710_656


def test_a_tied_head_counts_once(make_ids: Callable[..., UnifiedVocabulary]) -> None:
    ids = make_ids()
    model = build_model(ModelConfig(hidden_size=32, num_layers=1, tie_word_embeddings=True), ids=ids)
    counts = count_parameters(model, ids=ids)
    assert counts.text_rows_out == counts.visual_rows_out == 0
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())


def test_a_base_on_disk_and_the_mistakes_around_it(tmp_path: Path, make_ids: Callable[..., UnifiedVocabulary]) -> None:
    make_base("llama").save_pretrained(tmp_path / "llama")
    base = load_base(str(tmp_path / "llama"))
    model = extend_model(base, ids=make_ids(), qk_norm=True, gains=fit_gains(base, calibration=[TEXT_BT]))
    model.save_pretrained(tmp_path / "extended")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    assert torch.equal(text_logits(reloaded), text_logits(model))
    with pytest.raises(UserError, match="absent"):
        load_base(str(tmp_path / "absent"))
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="'gpt2' model; UM3 extends one of: llama"):
        load_base(str(tmp_path / "gpt2"))
    with pytest.raises(UserError, match="qk_norm=true"):
        extend_model(make_base("qwen3"), ids=make_ids(), qk_norm=False)
    with pytest.raises(UserError, match="49 entries, but the base only 48 rows"):
        extend_model(make_base("llama"), ids=make_ids(), qk_norm=False, base_entries=49)
    with pytest.raises(ValueError, match="multiple"):
        ModelConfig(num_heads=6, num_kv_heads=4)
