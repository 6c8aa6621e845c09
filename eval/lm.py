"""UM3 as an lm-eval model. Importing this module imports lm-eval (seconds): do so only where language is scored.

python -m eval.lm --model um3 --model_args pretrained=runs/demo/um3/model --tasks piqa --device cpu
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from um3.core.progress import Progress
from um3.text_tokenizer import encode_texts

if TYPE_CHECKING:
    from um3.pipeline import UM3Pipeline

CHUNK = 256  # requests between two progress lines


@register_model("um3")
class UM3LM(HFLM):
    """lm-eval's own Hugging Face model with three differences.

    Only text ids are scored: the logits end where the visual entries begin, before the softmax. Every context begins
    with bos, as every text row in training did, whether or not the tokenizer adds one. Text is encoded the way the
    training text was. A folder without visual entries (a base Llama) is scored over its whole vocabulary.
    """

    def __init__(self, pretrained: Any, **options: Any) -> None:
        super().__init__(pretrained=pretrained, **{"backend": "causal", "softmax_dtype": "float32", **options})
        ids = getattr(self.model.config, "um3", None)
        self.num_text_ids = int(ids["text_vocab_size"]) if ids else int(self.model.config.vocab_size)
        if ids:
            self.custom_prefix_token_id = int(ids["bos_id"])

    @classmethod
    def of(cls, pipeline: "UM3Pipeline", *, batch_size: int, max_tokens: int = 0) -> "UM3LM":
        """The model of a pipeline that is already loaded; contexts are cut to `max_tokens`, 0 for the model's own."""
        limit = max_tokens or None
        return cls(pipeline.model, tokenizer=pipeline.text_tokenizer, batch_size=batch_size, max_length=limit)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Token ids of the text alone; bos is the context's business."""
        ids = encode_texts([string], tokenizer=self.tokenizer)[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return [self.prefix_token_id, *context_ids], continuation_ids

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._model_call(inps, *args, **kwargs)[..., : self.num_text_ids]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **kwargs: Any) -> list[Any]:
        """lm-eval's, but a continuation longer than the context window is scored piece by piece, not refused."""
        half = max(1, self.max_length // 2)
        pieces, counts = [], []
        for text, context_ids, ids in requests:
            starts = range(0, len(ids), half) if len(ids) > self.max_length else [0]
            step = half if len(starts) > 1 else len(ids)
            pieces += [(text, context_ids + ids[:start], ids[start : start + step]) for start in starts]
            counts.append(len(starts))
        scored = iter(super()._loglikelihood_tokens(pieces, disable_tqdm=True, **kwargs))
        results = []
        for count in counts:
            parts = [next(scored) for _ in range(count)]
            results.append((sum(value for value, _ in parts), all(greedy for _, greedy in parts)))
        return results

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation and whether greedy decoding would give it."""
        return self._in_chunks(requests, super().loglikelihood, label="choices")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole document after bos."""
        return self._in_chunks(requests, super().loglikelihood_rolling, label="documents")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("the um3 model scores text; to write some use `um3 complete`")

    def _in_chunks(self, requests: Sequence[Instance], score: Callable[..., list[Any]], *, label: str) -> list[Any]:
        """`score` in pieces, longest requests first, so that the remaining time is over- rather than underestimated."""
        order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index].args)))
        progress = Progress(len(requests), label=f"scoring {label}")
        results: list[Any] = [None] * len(requests)
        for start in range(0, len(order), CHUNK):
            piece = order[start : start + CHUNK]
            for index, result in zip(piece, score([requests[i] for i in piece], disable_tqdm=True), strict=True):
                results[index] = result
            progress.advance(len(piece))
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
