"""The fast decoder gives the hidden states of the stock models, for every sequence of any batch."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.helpers.tiny_um3 import LLAMA_3_ROPE, make_base
from um3.core.errors import UserError
from um3.inference.decoder import DecodingBatch, FastDecoder

PROMPTS = [torch.arange(length) + 7 for length in (5, 1, 9, 5)]
PROMPTS[3] = PROMPTS[0]
NEW_TP = torch.tensor([[3, 4, 5, 6], [60, 61, 62, 63], [9, 8, 7, 6]])
MODELS = {
    "llama": {},
    "llama-one-kv-head-each": {"num_key_value_heads": 4},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-3-rope": {"rope_parameters": LLAMA_3_ROPE},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3-one-kv-head": {"num_key_value_heads": 1},
    "qwen3-tied-wide-heads": {"head_dim": 16, "tie_word_embeddings": True},
}


def make(kind, **options):
    base = kind.split("-")[0]
    sizes = {"vocab_size": 96, "max_position_embeddings": 256, "initializer_range": 0.02}
    model = make_base(base, **sizes | MODELS[kind] | options)
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() == 2 else 1
    return model


@pytest.fixture(params=list(MODELS))
def model(request):
    return make(request.param)


@torch.no_grad()
def decoded(model, prompts, new_TR):
    """Logits (T + 1, R, V) at the prompts' ends and after every new token."""
    decoder = FastDecoder(model)
    batch = DecodingBatch(decoder, num_sequences=len(prompts), capacity=128)
    hidden = [batch.start(prompts)]
    for count, ids_R in enumerate(new_TR, start=1):
        hidden.append(batch.step(ids_R, window=batch.window(count)))
    return decoder.head(0, 96)(torch.cat(hidden)).view(len(hidden), len(prompts), -1)


@torch.no_grad()
def stock(model, prompt, new_T):
    """The same for one sequence with the model's own forward, without a cache."""
    return model(torch.cat([prompt, new_T]).unsqueeze(0)).logits[0, len(prompt) - 1 :]


def assert_close(actual, expected, *, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_layers_need_no_activation_of_their_own():
    """Liger's MLPs, which replace the stock ones in a training run on a GPU, have none."""
    model = make("qwen3")
    expected = decoded(model, PROMPTS[:1], NEW_TP[:, :1])
    for layer in model.model.layers:
        del layer.mlp.act_fn
    assert torch.equal(decoded(model, PROMPTS[:1], NEW_TP[:, :1]), expected)


def test_logits_are_the_stock_models(model):
    logits = decoded(model, PROMPTS, NEW_TP)
    for index, prompt in enumerate(PROMPTS):
        assert_close(logits[:, index], stock(model, prompt, NEW_TP[:, index]))


def test_a_sequence_is_the_same_alone_and_past_the_first_window(model):
    new_TR = torch.randint(5, 96, (80, len(PROMPTS)), generator=torch.Generator().manual_seed(1))
    together = decoded(model, PROMPTS, new_TR)
    for index, prompt in enumerate(PROMPTS[:3]):
        assert_close(decoded(model, [prompt], new_TR[:, index : index + 1])[:, 0], together[:, index])
    assert_close(together[:, 1], stock(model, PROMPTS[1], new_TR[:, 1]), tolerance=1e-3)


def test_bfloat16_follows_float32(model):
    exact = decoded(model, PROMPTS, NEW_TP)
    rounded = decoded(model.to(torch.bfloat16), PROMPTS, NEW_TP).float()
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).min() > 0.98


def test_every_distinct_prompt_is_prefilled_once_and_a_batch_can_start_again(monkeypatch):
    decoder = FastDecoder(make("qwen3"))
    lengths = []
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda ids_T, **kw: lengths.append(len(ids_T)) or prefill(ids_T, **kw))
    prompts = [*PROMPTS * 3, *[torch.tensor([0, 3])] * 12]
    batch = DecodingBatch(decoder, num_sequences=len(prompts), capacity=64)
    with torch.no_grad():
        first = batch.start(prompts)
        assert lengths == [5, 1, 9, 2]
        step = batch.step(torch.arange(24), window=64)
        batch.start(prompts[::-1])
        batch.step(torch.arange(24), window=64)
        assert torch.equal(batch.start(prompts), first) and torch.equal(batch.step(torch.arange(24), window=64), step)


def test_unsupported_models_are_refused():
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(UserError, match="not 'gpt2'"):
        FastDecoder(gpt)
    with pytest.raises(UserError, match="use_sliding_window"):
        FastDecoder(make("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0))

    class Adapted(torch.nn.Linear):
        """A layer with more than its weight."""

    adapted = make("llama")
    adapted.model.layers[1].self_attn.o_proj = Adapted(32, 32)
    with pytest.raises(UserError, match="Adapted"):
        FastDecoder(adapted)
