"""The decoder over stock weights gives the stock models' hidden states, whatever stands beside a row."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
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
from um3.inference.decoder import Body, Decoder, Product

PROMPTS = [torch.arange(length) + 7 for length in (5, 1, 9, 5)]
PROMPTS[3] = PROMPTS[0]
NEW_TP = torch.tensor([[3, 4, 5, 6], [60, 61, 62, 63], [9, 8, 7, 6]])
LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def make(config: type, model: type, **options: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    made: PreTrainedModel = model(config(**sizes | options)).eval()
    for name, parameter in made.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) if "norm" in name or "bias" in name else 0
        if parameter.dim() == 2:
            parameter.data *= 8
    return made


MODELS = {
    "llama": lambda: make(LlamaConfig, LlamaForCausalLM),
    "llama-one-head-each": lambda: make(LlamaConfig, LlamaForCausalLM, num_key_value_heads=4),
    "llama-biases": lambda: make(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: make(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True),
    "llama-3-rope": lambda: make(LlamaConfig, LlamaForCausalLM, rope_parameters=LLAMA_3_ROPE),
    "qwen2": lambda: make(Qwen2Config, Qwen2ForCausalLM),
    "qwen2-tied": lambda: make(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True),
    "qwen3": lambda: make(Qwen3Config, Qwen3ForCausalLM),
    "qwen3-one-kv-head": lambda: make(Qwen3Config, Qwen3ForCausalLM, num_key_value_heads=1),
    "qwen3-tied-wide-heads": lambda: make(Qwen3Config, Qwen3ForCausalLM, head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@torch.no_grad()
def decoded(model: PreTrainedModel, prompts: list[Tensor], new_TR: Tensor) -> Tensor:
    """Logits (T + 1, R, V) at the prompts' ends and after every new id."""
    body = Body(model)
    decoder = Decoder(body, prompts=prompts, num_new=len(new_TR))
    hidden = [decoder.prefill()]
    for count, ids_R in enumerate(new_TR, start=1):
        hidden.append(decoder.step(ids_R, window=decoder.window(count)))
    return body.head(slice(0, 96))(torch.cat(hidden)).view(len(hidden), len(prompts), -1)


@torch.no_grad()
def stock(model: PreTrainedModel, prompt: Tensor, new_T: Tensor) -> Tensor:
    """The same for one row by the model's own forward, without any cache."""
    return model(torch.cat([prompt, new_T]).unsqueeze(0)).logits[0, len(prompt) - 1 :]


def test_layers_need_no_activation_of_their_own() -> None:
    """As Liger's have none, which stand in for the stock ones where a training run on a GPU evaluates."""
    model = MODELS["qwen3"]()
    expected = decoded(model, PROMPTS[:1], NEW_TP[:, :1])
    for layer in model.model.layers:
        del layer.mlp.act_fn
    assert torch.equal(decoded(model, PROMPTS[:1], NEW_TP[:, :1]), expected)


def test_logits_are_the_stock_models(model: PreTrainedModel) -> None:
    found = decoded(model, PROMPTS, NEW_TP)
    for row, prompt in enumerate(PROMPTS):
        expected = stock(model, prompt, NEW_TP[:, row])
        torch.testing.assert_close(found[:, row], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_row_is_the_same_alone_and_past_the_first_window(model: PreTrainedModel) -> None:
    new_TR = torch.randint(5, 96, (80, len(PROMPTS)), generator=torch.Generator().manual_seed(1))
    together = decoded(model, PROMPTS, new_TR)
    for row, prompt in enumerate(PROMPTS[:3]):
        alone = decoded(model, [prompt], new_TR[:, row : row + 1])[:, 0]
        torch.testing.assert_close(alone, together[:, row], rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    torch.testing.assert_close(
        together[:, 1], stock(model, PROMPTS[1], new_TR[:, 1]), rtol=1e-3, atol=1e-3 * float(together.abs().max())
    )


def test_bfloat16_follows_float32(model: PreTrainedModel) -> None:
    exact = decoded(model, PROMPTS, NEW_TP)
    rounded = decoded(model.to(torch.bfloat16), PROMPTS, NEW_TP).float()
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).min() > 0.98


def test_every_distinct_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    body = Body(MODELS["qwen3"]())
    lengths: list[int] = []
    read = body.read
    monkeypatch.setattr(body, "read", lambda ids_T, **options: lengths.append(len(ids_T)) or read(ids_T, **options))
    with torch.no_grad():
        Decoder(body, prompts=[*PROMPTS * 3, *[torch.tensor([0, 3])] * 12], num_new=4).prefill()
    assert lengths == [5, 1, 9, 2]


def test_products_of_several_weights_with_and_without_bias() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(8, 4)
    for count in (1, 2, 5):
        x = torch.randn(count, 8)
        with torch.no_grad():
            expected = torch.cat([first(x), second(x)], dim=-1)
            torch.testing.assert_close(Product(first, second)(x), expected)
            torch.testing.assert_close(Product(second, rows=slice(1, 3), packed=False)(x), second(x)[:, 1:3])


def test_what_it_does_not_know_is_refused() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(UserError, match="not 'gpt2'"):
        Body(gpt)
    sliding = make(Qwen2Config, Qwen2ForCausalLM, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(UserError, match="use_sliding_window"):
        Body(sliding)

    class Adapted(torch.nn.Linear):
        """A layer whose weight is not the whole of it."""

    adapted: Any = MODELS["llama"]()
    adapted.model.layers[1].self_attn.o_proj = Adapted(32, 32)
    with pytest.raises(UserError, match="not a Adapted; merge or convert"):
        Body(adapted)
