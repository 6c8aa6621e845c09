"""UM3 as an lm-eval model, and lm-eval's own command line with it. Importing this module imports lm-eval (seconds).

LM_EVAL_DATA=data/bench python -m eval lm --model um3 --model_args pretrained=runs/demo/um3/model --tasks piqa
"""

import argparse
import copy
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from eval.lm_eval_data import find_benchmarks, write_task_yamls
from eval.results_cache import ResultsCache
from um3.core.distributed import device
from um3.core.files import short_hash
from um3.core.hub import load_pretrained
from um3.core.progress import Progress
from um3.model.text_tokenizer import encode_texts, read_text_tokenizer

CHUNK = 256  # requests between two progress lines, and between two entries of the cache


@register_model("um3")
class UM3LM(HFLM):
    """lm-eval's Hugging Face model. For a UM3 it differs in three ways:

    - Only text ids are scored and generated. The logits are cut before the softmax after the base model's own
      entries (all text entries without a base), which are those that `make um3-export` keeps.
    - Every context starts with bos, as every text sequence in training did, whatever the tokenizer adds.
    - Text is encoded as the training text was.

    So a UM3 gets the log-likelihoods that lm-eval's `hf` gives its export. Any other model gets those of `hf`.

    `cache` stores the scored requests, so that a killed evaluation resumes. lm-eval's own CachingLM does not resume
    to the same bits: after a kill within a batch of 16, the remaining requests form other batches, and 7 to 14 of 599
    log-likelihoods of the demo's ARC differed (by up to 8e-6). It also unpickles its file.
    """

    tokenizer: Any

    def __init__(self, pretrained: Any, *, cache: ResultsCache | None = None, **options: Any) -> None:
        loading: dict[str, Any] = {"backend": "causal", "softmax_dtype": "float32"}
        if isinstance(pretrained, str):  # lm-eval loads it by itself, as its own options say
            load_pretrained(AutoConfig, pretrained, kind="language model")
            loading["use_safetensors"] = True
        try:
            super().__init__(pretrained=pretrained, **loading | options)
        except Exception:
            if isinstance(pretrained, str):
                load_language_model(pretrained)  # gives the reason in one line
            raise
        self.ids: dict[str, Any] | None = getattr(self.model.config, "um3", None)
        self.cache = cache
        self.own_max_tokens = int(options.get("max_length") or 0)
        """The requested context length; 0 for the model's own."""
        self.num_text_ids = int(self.model.config.vocab_size)
        if self.ids:
            self.num_text_ids = int((self.ids.get("base") or {}).get("entries", self.ids["text_vocab_size"]))
            self.custom_prefix_token_id = int(self.ids["bos_id"])
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.add_bos_token = True  # where lm-eval encodes by itself: contexts of generations

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids; without bos for a UM3, which `_encode_pair` adds to the context."""
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
        """lm-eval's, but a continuation longer than the context window is scored in pieces; lm-eval refuses it."""
        half = max(1, self.max_length // 2)
        pieces, counts = [], []
        for text, context_ids, ids in requests:
            starts = range(0, len(ids), half) if len(ids) > self.max_length else [0]
            step = half if len(starts) > 1 else len(ids)
            pieces += [(text, context_ids + ids[:start], ids[start : start + step]) for start in starts]
            counts.append(len(starts))
        scored = iter(super()._loglikelihood_tokens(pieces, disable_tqdm=True, **kwargs))
        parts = (list(itertools.islice(scored, count)) for count in counts)
        return [(sum(value for value, _ in part), all(greedy for _, greedy in part)) for part in parts]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would generate it."""
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
        """`score` in chunks, longest requests first, so that the remaining time is not underestimated.

        Chunks in the cache are not scored again. They do not depend on the cache, so the values are the same to
        the last bit.
        """
        order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index].args)))
        chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        cache = self.cache or ResultsCache()
        keys = [short_hash(kind, [requests[index].args for index in chunk]) for chunk in chunks]
        done = sum(len(chunk) for chunk, key in zip(chunks, keys, strict=True) if key in cache)
        names = ", ".join(dict.fromkeys(str(request.task_name) for request in requests))
        progress = Progress(len(requests), label=f"scoring {names} {kind}", start=done)
        results: list[Any] = [None] * len(requests)
        for chunk, key in zip(chunks, keys, strict=True):
            if key not in cache:
                cache.add({key: score([requests[index] for index in chunk], disable_tqdm=True)})
                progress.advance(len(chunk))
            for index, result in zip(chunk, cache[key], strict=True):
                results[index] = result
        return results


def load_language_model(path_or_hub_id: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model and its tokenizer to this process's device, in its stored precision.

    UserError if there is none, its weights are missing or damaged, or it has no text tokenizer.
    """
    model = load_pretrained(AutoModelForCausalLM, path_or_hub_id, dtype="auto", kind="language model")
    return model.to(device()).eval(), read_text_tokenizer(path_or_hub_id)


def main(arguments: Sequence[str]) -> None:
    """lm-eval's command line with the model `um3`; the paper's five tasks read their data from LM_EVAL_DATA first."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks.manager import TaskManager

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--include_path", nargs="+", default=[])
    options, _ = parser.parse_known_args(arguments)
    names = {name for argument in options.tasks for name in argument.split(",")}
    data = find_benchmarks(os.environ.get("LM_EVAL_DATA", ""))
    # The index of all of lm-eval's tasks takes 11 s; it is not needed if every requested task is local.
    is_local = bool(names) and names <= data.keys()
    with TemporaryDirectory() as folder:
        write_task_yamls(Path(folder), data=data)
        paths = [folder, *options.include_path]

        def local_manager(include_path: Any = None, **settings: Any) -> TaskManager:
            return TaskManager(include_path=paths, include_defaults=not is_local, **settings)

        lm_eval.tasks.TaskManager = local_manager  # the command line has no option for either
        sys.argv = ["lm_eval", *arguments]  # where lm-eval reads its command line
        cli_evaluate()
