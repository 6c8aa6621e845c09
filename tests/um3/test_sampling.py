"""Sampling: equal to stock greedy generation, legal, independent of the batch, from the right distribution."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from um3 import rows
from um3.core.errors import UserError
from um3.ids import IdSpace
from um3.model import ModelConfig, build_model
from um3.sampling import DrawnImages, Sampling, choose, draw_images, write_text

PROMPTS: tuple[list[int], ...] = ([10, 11, 12], [20], [30, 31, 32, 33, 34], [], [40, 41])


class Setup:
    """A loud random model with its id space and prompts of unequal length."""

    def __init__(self, ids: IdSpace, *, qk_norm: bool, num_kv_heads: int):
        torch.manual_seed(1)
        config = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads, head_dim=8)
        config.intermediate_size, config.max_position_embeddings, config.qk_norm = 48, 64, qk_norm
        self.ids = ids
        self.model: PreTrainedModel = build_model(config, ids=ids).eval()
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(8.0)
        self.prompts = [rows.image_prompt(caption, ids=ids) for caption in PROMPTS]
        self.uniforms = torch.rand(len(PROMPTS), ids.image_tokens, generator=torch.Generator().manual_seed(2))

    def draw(self, sampling: Sampling, *, which: Sequence[int] = range(len(PROMPTS))) -> DrawnImages:
        return draw_images(
            self.model,
            prompts=[self.prompts[index] for index in which],
            unconditional_prompt=rows.image_prompt([], ids=self.ids),
            ids=self.ids,
            sampling=sampling,
            uniforms_BP=self.uniforms[list(which)],
        )

    @torch.no_grad()
    def logits(self, prompt: Tensor, visual_ids: Tensor) -> Tensor:
        """Plain forward without cache: logits at every visual position, -inf outside its slot."""
        logits_PV = self.model(torch.cat([prompt, visual_ids]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        for position in range(len(visual_ids)):
            start, end = self.ids.slot_range(position % self.ids.slots)
            logits_PV[position, :start] = logits_PV[position, end:] = float("-inf")
        return logits_PV


@pytest.fixture(params=[(True, 4), (True, 2), (False, 2)], ids=["qwen3", "qwen3-gqa", "llama-gqa"])
def setup(request: pytest.FixtureRequest, make_ids: Callable[..., IdSpace]) -> Setup:
    qk_norm, num_kv_heads = request.param
    return Setup(make_ids(num_patches=4), qk_norm=qk_norm, num_kv_heads=num_kv_heads)


class OnlySlots(LogitsProcessor):
    """The grammar of an image for stock `generate()`."""

    def __init__(self, ids: IdSpace, *, prompt_tokens: int):
        self.ids, self.prompt_tokens = ids, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start, end = self.ids.slot_range((input_ids.shape[1] - self.prompt_tokens) % self.ids.slots)
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, start:end] = 0
        return scores + allowed


class OnlyText(LogitsProcessor):
    """Text entries without bos, padding and image marks for stock `generate()`."""

    def __init__(self, ids: IdSpace):
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.ids.text_vocab_size :] = float("-inf")
        scores[:, [0, 2, 3, 4]] = float("-inf")
        return scores


def stock_greedy(setup: Setup, prompt: Tensor, processor: LogitsProcessor, *, count: int) -> list[int]:
    output = setup.model.generate(  # type: ignore[operator]
        prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=count, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def test_greedy_images_equal_stock_generation(setup: Setup) -> None:
    drawn = setup.draw(Sampling(temperature=0)).visual_ids
    for prompt, visual_ids in zip(setup.prompts, drawn, strict=True):
        processor = OnlySlots(setup.ids, prompt_tokens=len(prompt))
        assert visual_ids.tolist() == stock_greedy(setup, prompt, processor, count=setup.ids.image_tokens)
    assert len({tuple(each) for each in drawn.tolist()}) > 1, "the prompts must matter"


def test_greedy_text_equals_stock_generation(setup: Setup) -> None:
    uniforms = torch.zeros(len(PROMPTS), 12)
    written = write_text(
        setup.model, prompts=setup.prompts, ids=setup.ids, sampling=Sampling(temperature=0), uniforms_BP=uniforms
    ).token_ids
    for prompt, text in zip(setup.prompts, written, strict=True):
        stock = stock_greedy(setup, prompt, OnlyText(setup.ids), count=12)
        assert text == (stock[: stock.index(1)] if 1 in stock else stock)


def test_text_stops_at_end_of_text_whatever_the_others_do(setup: Setup) -> None:
    """Make eos likely but not certain: rows end at different places, and none holds an entry it may not."""
    setup.model.lm_head.weight.data[:50].mul_(0.05)
    written = write_text(
        setup.model,
        prompts=setup.prompts * 8,
        ids=setup.ids,
        sampling=Sampling(temperature=1),
        uniforms_BP=torch.rand(40, 30, generator=torch.Generator().manual_seed(3)),
    ).token_ids
    assert len({len(text) for text in written}) > 3
    assert all(4 < token < setup.ids.text_vocab_size for text in written for token in text)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5}, {"guidance_scale": 3.0}, {"temperature": 0.0}])
def test_a_sample_does_not_depend_on_its_batch(setup: Setup, options: dict[str, float]) -> None:
    sampling = Sampling(**options)  # type: ignore[arg-type]
    together = setup.draw(sampling)
    for which in ([0], [3, 1], [4, 2, 0]):
        apart = setup.draw(sampling, which=which)
        assert torch.equal(apart.visual_ids, together.visual_ids[which])
        torch.testing.assert_close(apart.logprobs, together.logprobs[which], rtol=1e-4, atol=1e-3)


def test_every_draw_is_legal_and_logprobs_are_the_models(setup: Setup) -> None:
    drawn = setup.draw(Sampling(temperature=1.5, guidance_scale=2.0))
    setup.ids.ids_to_codes(drawn.visual_ids)
    for index, prompt in enumerate(setup.prompts):
        logprobs_PV = setup.logits(prompt, drawn.visual_ids[index]).log_softmax(-1)
        total = logprobs_PV.gather(-1, drawn.visual_ids[index, :, None]).sum()
        torch.testing.assert_close(drawn.logprobs[index], total, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_extrapolates_from_the_unconditional_row(setup: Setup, scale: float) -> None:
    drawn = setup.draw(Sampling(temperature=0, guidance_scale=scale)).visual_ids
    bare = rows.image_prompt([], ids=setup.ids)
    for prompt, visual_ids in zip(setup.prompts, drawn, strict=True):
        own, free = setup.logits(prompt, visual_ids), setup.logits(bare, visual_ids)
        guided = torch.where(own.isinf(), own, free + scale * (own - free))
        assert torch.equal(guided.argmax(-1), visual_ids)


def test_choose_inverts_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    levels = (torch.arange(2000) + 0.5) / 2000
    logits = probabilities.log().expand(2000, 4)

    def shares(**options: float) -> list[float]:
        drawn = choose(logits, sampling=Sampling(**options), uniforms_B=levels)  # type: ignore[arg-type]
        return [round(float(share), 3) for share in torch.bincount(drawn, minlength=4) / 2000]

    assert shares() == [0.05, 0.5, 0.15, 0.3]
    assert shares(top_k=2) == [0, 0.625, 0, 0.375]
    assert shares(top_p=0.81) == [
        0,
        pytest.approx(0.526, abs=2e-3),
        pytest.approx(0.158, abs=2e-3),
        pytest.approx(0.316, abs=2e-3),
    ]
    assert shares(top_p=0.79) == [0, 0.625, 0, 0.375]
    assert shares(top_p=1e-6) == shares(temperature=0) == shares(top_k=1) == [0, 1, 0, 0]
    squared = probabilities.square() / probabilities.square().sum()
    assert shares(temperature=0.5) == pytest.approx(squared.tolist(), abs=2e-3)


def test_bad_values_and_a_full_context_are_user_errors(setup: Setup) -> None:
    for options, message in (
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.1}, "top-p 1.1"),
        ({"top_k": -1}, "top-k -1"),
        ({"guidance_scale": -1.0}, "guidance scale -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            Sampling(**options)
    setup.prompts[0] = rows.image_prompt([10] * 50, ids=setup.ids)
    with pytest.raises(UserError, match="prompt 1 of 52 tokens leaves no room for 16 more in the model's context of 64"):
        setup.draw(Sampling())
