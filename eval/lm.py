"""UM3 as an lm-eval model, and lm-eval's own command line with it. Importing this imports lm-eval (seconds).

LM_EVAL_DATA=data/bench python -m eval lm --model um3 --model_args pretrained=runs/demo/um3/model --tasks piqa
"""

import argparse
import copy
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from eval.journal import Journal
from eval.tasks.lm_eval_data import TASKS, local_benchmarks, paper_tasks
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.progress import Progress
from um3.model.text_tokenizer import encode_texts, read_text_tokenizer

CHUNK = 256  # requests between two progress lines, and between two entries of the journal
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


@register_model("um3")
class UM3LM(HFLM):
    """lm-eval's own Hugging Face model; for a UM3 with three differences.

    Only text ids are scored and written: the logits end, before the softmax, where the base's own entries end (all text
    entries where there was no base), which is what `make um3-export` keeps. Every context begins with bos, as every
    text row in training did, whether or not the tokenizer adds one. Text is encoded the way the training text was. So a
    UM3 gets the log-likelihoods that lm-eval's `hf` gives its export. Any other model gets those that `hf` gives it.

    `journal` keeps what has been scored, so that a killed evaluation goes on where it was.
    """

    tokenizer: Any

    def __init__(self, pretrained: Any, *, journal: Journal | None = None, **options: Any) -> None:
        try:
            super().__init__(pretrained=pretrained, **{"backend": "causal", "softmax_dtype": "float32", **options})
        except LOADING_ERRORS as error:
            if not isinstance(pretrained, str):
                raise
            raise _not_loadable(pretrained, error) from None
        self.ids: dict[str, Any] | None = getattr(self.model.config, "um3", None)
        self.journal = journal
        self.own_max_tokens = int(options.get("max_length") or 0)
        """The context's limit where one was given, 0 for the model's own."""
        self.num_text_ids = int(self.model.config.vocab_size)
        if self.ids:
            self.num_text_ids = int((self.ids.get("base") or {}).get("entries", self.ids["text_vocab_size"]))
            self.custom_prefix_token_id = int(self.ids["bos_id"])
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.add_bos_token = True  # where lm-eval encodes by itself: contexts to write on from

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_tokens: int = 0,
        journal: Journal | None = None,
    ) -> "UM3LM":
        """A model that is already loaded; contexts are cut to `max_tokens`, 0 for the model's own."""
        # Only what is wrong, not what is going on: the progress is shown here.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        limit = max_tokens or None
        return cls(model, tokenizer=tokenizer, batch_size=batch_size, max_length=limit, journal=journal)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids; of a UM3's text alone, since bos is the context's business."""
        if not self.ids:
            return list(super().tok_encode(string, add_special_tokens, left_truncate_len, **options))
        ids = encode_texts([string], tokenizer=self.tokenizer)[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return ([self.prefix_token_id, *context_ids] if self.ids else context_ids), continuation_ids

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
        scored = self._in_chunks(requests, super().loglikelihood, kind="choices")
        return [(float(value), bool(greedy)) for value, greedy in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole document after bos."""
        return self._in_chunks(requests, super().loglikelihood_rolling, kind="documents")

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        visual = range(self.num_text_ids, int(self.model.config.vocab_size))
        options |= {"suppress_tokens": list(visual)} if visual else {}
        return super()._model_generate(context, max_length, stop, **options)

    def _in_chunks(self, requests: Sequence[Instance], score: Callable[..., list[Any]], *, kind: str) -> list[Any]:
        """`score` in pieces, longest requests first, so that the remaining time is over- rather than underestimated.

        What the journal has is not scored again. The pieces are the same with and without it, so that the values are
        the same to the last bit.
        """
        order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index].args)))
        pieces = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        journal = self.journal or Journal()
        keys = [journal.key(kind, [requests[index].args for index in piece]) for piece in pieces]
        done = sum(len(piece) for piece, key in zip(pieces, keys, strict=True) if key in journal)
        names = ", ".join(dict.fromkeys(str(request.task_name) for request in requests))
        progress = Progress(len(requests), label=f"scoring {names} {kind}", start=done)
        results: list[Any] = [None] * len(requests)
        for piece, key in zip(pieces, keys, strict=True):
            if key not in journal:
                journal.add(key, score([requests[index] for index in piece], disable_tqdm=True))
                progress.advance(len(piece))
            for index, result in zip(piece, journal[key], strict=True):
                results[index] = result
        return results


def load_language_model(path_or_hub_id: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal language model and its tokenizer, on this process's device, in the precision it is stored in.

    Raises:
        UserError: nothing there, no causal language model, or weights that are missing or damaged.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_hub_id, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise _not_loadable(path_or_hub_id, error) from None
    model, report = loaded
    if wrong := sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"]):
        raise UserError(f"the weights in '{path_or_hub_id}' do not fit its config.json ({wrong[0]}); write it again")
    tokenizer = read_text_tokenizer(path_or_hub_id)
    if not encode_texts(["a"], tokenizer=tokenizer)[0]:  # transformers makes an empty one where there are no files
        raise UserError(f"no text tokenizer in '{path_or_hub_id}' (it makes no tokens of a text); copy the model's own")
    return model.to(device()).eval(), tokenizer


def _not_loadable(path_or_hub_id: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(
        f"no language model can be loaded from '{path_or_hub_id}' ({reason}); give a folder with config.json and "
        "model.safetensors, or a hub id"
    )


def main(arguments: Sequence[str]) -> None:
    """lm-eval's command line, with the model `um3`; every task finds its data in the folder LM_EVAL_DATA first."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    tasks = {name for given in parser.parse_known_args(arguments)[0].tasks for name in given.split(",")}
    if tasks and tasks <= TASKS.keys():
        lm_eval.tasks.TaskManager = paper_tasks
    with local_benchmarks(os.environ.get("LM_EVAL_DATA", "")):
        sys.argv = ["lm_eval", *arguments]  # where lm-eval reads its command line
        cli_evaluate()
