"""Sampling: equal to stock greedy generation, legal, independent of the batch, from the right distribution."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from um3.core.errors import UserError
from um3.inference.decoder import Body
from um3.inference.generate import FREE, DrawnImages, draw_images, image_logprob, text_logprob, write_text
from um3.inference.grammar import GrammarProcessor
from um3.inference.sampling_params import Sampling, choose
from um3.model import sequences as rows
from um3.model.language_model import ModelConfig, build_model
from um3.model.vocabulary import UnifiedVocabulary

PROMPTS: tuple[list[int], ...] = ([10, 11, 12], [20], [30, 31, 32, 33, 34], [], [40, 41])


class Setup:
    """A loud random model with its id space and prompts of unequal length."""

    def __init__(self, ids: UnifiedVocabulary, *, qk_norm: bool, num_kv_heads: int):
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

    def draw(
        self, sampling: Sampling, *, which: Sequence[int] = range(len(PROMPTS)), kept_BP: Tensor | None = None
    ) -> DrawnImages:
        return draw_images(
            self.model,
            prompts=[self.prompts[index] for index in which],
            unconditional_prompt=rows.image_prompt([], ids=self.ids),
            ids=self.ids,
            sampling=sampling,
            uniforms_BP=self.uniforms[list(which)],
            kept_BP=kept_BP,
        )

    @torch.no_grad()
    def logits(self, prompt: Tensor, visual_ids: Tensor) -> Tensor:
        """Plain forward without cache: logits at every visual position, -inf outside its subtoken."""
        logits_PV = self.model(torch.cat([prompt, visual_ids]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        for position in range(len(visual_ids)):
            start, end = self.ids.subtoken_range(position % self.ids.subtokens)
            logits_PV[position, :start] = logits_PV[position, end:] = float("-inf")
        return logits_PV


@pytest.fixture(params=[(True, 4), (True, 2), (False, 2)], ids=["qwen3", "qwen3-gqa", "llama-gqa"])
def setup(request: pytest.FixtureRequest, make_ids: Callable[..., UnifiedVocabulary]) -> Setup:
    qk_norm, num_kv_heads = request.param
    return Setup(make_ids(num_patches=4), qk_norm=qk_norm, num_kv_heads=num_kv_heads)


def stock_greedy(setup: Setup, prompt: Tensor, *, count: int, drawing: bool) -> list[int]:
    processor = GrammarProcessor(setup.ids, drawing=drawing)
    output = setup.model.generate(  # type: ignore[operator]
        prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=count, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def test_greedy_images_equal_stock_generation(setup: Setup) -> None:
    drawn = setup.draw(Sampling(temperature=0)).visual_ids
    for prompt, visual_ids in zip(setup.prompts, drawn, strict=True):
        assert visual_ids.tolist() == stock_greedy(setup, prompt, count=setup.ids.image_tokens, drawing=True)
    assert len({tuple(each) for each in drawn.tolist()}) > 1, "the prompts must matter"


def test_greedy_text_equals_stock_generation(setup: Setup) -> None:
    uniforms = torch.zeros(len(PROMPTS), 12)
    prompts = [rows.text_prompt(each, ids=setup.ids) for each in PROMPTS]
    written = write_text(
        setup.model, prompts=prompts, ids=setup.ids, sampling=Sampling(temperature=0), uniforms_BP=uniforms
    ).token_ids
    for prompt, text in zip(prompts, written, strict=True):
        stock = stock_greedy(setup, prompt, count=12, drawing=False)
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


def test_a_guidance_schedule_runs_from_the_first_position_to_the_last(setup: Setup) -> None:
    assert Sampling(guidance_scale=(1.0, 4.0, 2.0)).scales(5) == [1.0, 2.5, 4.0, 3.0, 2.0]
    assert Sampling(guidance_scale=3).scales(2) == [3.0, 3.0] and not Sampling(guidance_scale=[1.0, 1.0]).guided
    sampling = Sampling(temperature=0, guidance_scale=(0.0, 4.0))
    bare = rows.image_prompt([], ids=setup.ids)
    scales = torch.tensor(sampling.scales(setup.ids.image_tokens))[:, None]
    for prompt, visual_ids in zip(setup.prompts, setup.draw(sampling).visual_ids, strict=True):
        own, free = setup.logits(prompt, visual_ids), setup.logits(bare, visual_ids)
        assert torch.equal(torch.where(own.isinf(), own, free + scales * (own - free)).argmax(-1), visual_ids)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"guidance_scale": 2.0}])
def test_kept_ids_stay_and_what_follows_knows_them(setup: Setup, options: dict[str, float]) -> None:
    sampling = Sampling(**options)  # type: ignore[arg-type]
    plain = setup.draw(sampling)
    kept = torch.full_like(plain.visual_ids, FREE)
    kept[:, 4:8] = setup.ids.codes_to_ids(torch.arange(5)[:, None])
    drawn = setup.draw(sampling, kept_BP=kept)
    assert torch.equal(drawn.visual_ids[:, :4], plain.visual_ids[:, :4])
    assert torch.equal(drawn.visual_ids[:, 4:8], kept[:, 4:8])
    assert not torch.equal(drawn.visual_ids[:, 8:], plain.visual_ids[:, 8:])
    whole = setup.draw(sampling, kept_BP=drawn.visual_ids)
    assert torch.equal(whole.visual_ids, drawn.visual_ids)
    torch.testing.assert_close(whole.logprobs, drawn.logprobs, rtol=1e-4, atol=1e-3)


def test_scores_of_finished_rows_are_those_of_the_draw(setup: Setup) -> None:
    body, drawn = Body(setup.model), setup.draw(Sampling())
    for index, prompt in enumerate(setup.prompts):
        scored = image_logprob(body, prompt=prompt, visual_ids=drawn.visual_ids[index], ids=setup.ids)
        assert scored == pytest.approx(float(drawn.logprobs[index]), rel=1e-4, abs=1e-3)
    setup.model.lm_head.weight.data[1] *= 0.05
    written = write_text(
        setup.model, prompts=setup.prompts, ids=setup.ids, sampling=Sampling(temperature=2.0),
        uniforms_BP=torch.rand(5, 30, generator=torch.Generator().manual_seed(4)),
    )  # fmt: skip
    ended = [index for index, end in enumerate(written.ends) if end == setup.ids.eos_id]
    assert ended
    body = Body(setup.model)
    for index in ended:
        tokens = torch.tensor(written.token_ids[index], dtype=torch.int64)
        scored = text_logprob(body, prompt=setup.prompts[index], token_ids=tokens, ids=setup.ids)
        assert scored == pytest.approx(written.logprobs[index], rel=1e-4, abs=1e-3)


def test_a_watcher_sees_the_image_grow(setup: Setup) -> None:
    seen: list[Tensor] = []
    drawn = draw_images(
        setup.model, prompts=setup.prompts, unconditional_prompt=setup.prompts[3], ids=setup.ids, sampling=Sampling(),
        uniforms_BP=setup.uniforms, watch=lambda ids_PB: seen.append(ids_PB.clone()),
    )  # fmt: skip
    assert [len(each) for each in seen] == list(range(2, setup.ids.image_tokens + 1))
    assert all(torch.equal(each, drawn.visual_ids.T[: len(each)]) for each in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_recorded_steps_on_a_gpu_draw_what_the_cpu_draws(setup: Setup, scale: float) -> None:
    sampling = Sampling(temperature=0, guidance_scale=scale)
    on_cpu = setup.draw(sampling).visual_ids
    setup.model.to("cuda")  # type: ignore[arg-type]
    assert torch.equal(setup.draw(sampling).visual_ids.cpu(), on_cpu)


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
    assert shares(min_p=0.5) == [0, 0.625, 0, 0.375] and shares(min_p=0.61) == [0, 1, 0, 0]
    assert shares(min_p=0.5, top_p=0.5) == [0, 1, 0, 0]
    assert shares(temperature=1e-300) == [0, 1, 0, 0]
    assert shares(temperature=1e300) == [0.25] * 4
    assert shares(temperature=0.5) == pytest.approx(squared.tolist(), abs=2e-3)


def test_bad_values_and_a_full_context_are_user_errors(setup: Setup) -> None:
    for options, message in (
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.1}, "top-p 1.1"),
        ({"top_k": -1}, "top-k -1"),
        ({"min_p": 1.5}, "min-p 1.5"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"guidance_scale": -1.0}, "guidance scale -1.0"),
        ({"guidance_scale": 1e30}, r"guidance scale 1e\+30"),
        ({"guidance_scale": (1.0, float("nan"))}, "guidance scale nan"),
        ({"guidance_scale": ()}, "guidance schedule is empty"),
    ):
        with pytest.raises(UserError, match=message):
            Sampling(**options)
    setup.prompts[0] = rows.image_prompt([10] * 50, ids=setup.ids)
    with pytest.raises(UserError, match=r"prompt 1 of 52 tokens leaves no room for 16 more in the .* context of 64"):
        setup.draw(Sampling())
