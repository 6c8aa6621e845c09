"""`make um3-init`: extend a Llama or Qwen to a UM3 for a visual tokenizer, with its language measured before and after.

If the base lacks query-key normalisation, it is inserted (`um3.model.qk_norm`); then the query and key projections and
the gains are distilled: they minimise KL(base || model) of the next token on text, until that stops falling or for
`loop.max_steps`. Nothing else is trained. A base that has the normalisation, or qk_norm=false, takes no step.

The model is computed in float32 and rounded to the saved type before the last measurement, so the loss is that of the
saved model.

Legend: B sequences, T positions of a sequence, X positions with a target, V vocabulary entries, D width.
"""

import dataclasses
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_mix.batches.packing import lay_out
from data_mix.batches.token_stream import sequences_of_sources
from data_mix.samples import Split
from data_mix.sources.files import looks_like_hub
from tokenizer.modeling import load_qlip
from train.checkpoint import full_weights
from train.engine import autocast, step_engine
from train.loop import Task, check_finite
from train.recipes.um3_start import calibration_length, with_qk_norm
from train.settings.um3 import UM3InitConfig
from um3.core.distributed import device, is_main, rank, sum_over_ranks, world_size
from um3.core.errors import UserError, make_command
from um3.core.files import short_hash
from um3.core.hub import weights_digest
from um3.core.progress import track
from um3.model.extend import check_vocabulary, extend_model, load_base, load_base_tokenizer, read_base_config
from um3.model.language_model import QLIP_FOLDER, count_parameters, save_model
from um3.model.qk_norm import inserts_qk_norm
from um3.model.sequences import TrainingSequence
from um3.model.text_tokenizer import make_vocabulary, vocabulary_digest
from um3.model.vocabulary import UnifiedVocabulary

MAX_BITS_PER_SUBTOKEN = 14
"""As in the paper: 28 bits are two sub-tokens of 14, with 16,384 vocabulary entries each."""
MIN_VAL_FRACTION = 0.1
"""Of the texts: more than in a long training, so that a short text has some."""
TRAINED = re.compile(r"\.self_attn\.[qk]_(proj|norm)\.")
SMALLEST_GAIN = 0.02
"""The divergence has stopped falling if it falls by a smaller share between two measurements."""


class DistillationObjective(nn.Module):
    """KL(base || model) of the next token, the sum over all positions that are not padding."""

    def __init__(self, model: PreTrainedModel, *, base: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._base = [base]  # in a list: the engine must not see it

    def forward(self, input_ids_BT: torch.Tensor, is_real_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_XV = self._base[0](input_ids=input_ids_BT, use_cache=False).logits[is_real_BT].log_softmax(-1)
        student_XV = self.model(input_ids=input_ids_BT, use_cache=False).logits[is_real_BT].log_softmax(-1)
        return F.kl_div(student_XV, teacher_XV, log_target=True, reduction="sum")


class UM3InitTask(Task[UM3InitConfig]):
    """The base with an inserted normalisation, distilled on text, then extended by the image tokens."""

    unit = "sequences"

    def __init__(self, config: UM3InitConfig) -> None:
        self.config = config
        stored = read_base_config(config.base_model)
        self.text_tokenizer, self.entries = load_base_tokenizer(config.base_model)
        check_vocabulary(self.entries, rows=stored.vocab_size)
        self.ids = _vocabulary(config, text_tokenizer=self.text_tokenizer)
        self.inserts = inserts_qk_norm(stored, qk_norm=config.qk_norm)
        self.seq_len = self.tokens_per_sample = min(config.data.seq_len, stored.max_position_embeddings)
        self.measured = self._sequences(config.data.num_sequences, split="val")
        base = load_base(config.base_model).to(device())  # type: ignore[arg-type]
        self.base = base.requires_grad_(False)
        self.dtype = str(stored.dtype or "float32").removeprefix("torch.") if config.dtype == "base" else config.dtype
        self.model, self.sequences = self.base, self.measured
        if self.inserts:
            needed = calibration_length(stored.hidden_size, seq_len=self.seq_len)
            self.sequences = self._sequences(max(needed, config.loop.max_steps * config.loop.batch_size), split="train")
            cache = Path(config.loop.output_dir) / "cache"
            self.model = with_qk_norm(base, [sequence.input_ids for sequence in self.sequences[:needed]], cache=cache)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(TRAINED.search(name) is not None)
        dtype: torch.dtype = getattr(torch, self.dtype)
        for name, parameter in self.model.named_parameters():
            if not parameter.to(dtype).isfinite().all():
                fits = f"does not fit {self.dtype}; set dtype=bfloat16 or dtype=float32"
                raise UserError(f"{name} of {config.base_model} {fits}")
        self.objective = DistillationObjective(self.model, base=self.base)
        self.divergences: list[float] = []

    def _sequences(self, count: int, *, split: Split) -> list[TrainingSequence]:
        """Sequences of all texts, by turns, the same number from each (to within one)."""
        texts = []
        for number, source in enumerate(self.config.data.texts):
            source = dataclasses.replace(source, val_fraction=max(source.val_fraction, MIN_VAL_FRACTION))
            if looks_like_hub(source.path) and not source.stream:
                source.stream = len(range(number, count, len(self.config.data.texts)))
            texts.append(source)
        by_source = sequences_of_sources(
            texts,
            split=split,
            num_sequences=count,
            tokenizer=self.text_tokenizer,
            ids=self.ids,
            seq_len=self.seq_len,
            seed=self.config.loop.seed,
            cache=Path(self.config.loop.output_dir) / "cache",
        )
        return [sequence for turn in itertools.zip_longest(*by_source) for sequence in turn if sequence is not None]

    @property
    def finished(self) -> bool:
        """There is nothing to train, or the divergence has stopped falling."""
        last = self.divergences[-2:]
        return not self.inserts or (len(last) == 2 and last[1] > (1 - SMALLEST_GAIN) * last[0])

    def modules(self) -> dict[str, nn.Module]:
        return super().modules() if self.inserts else {}

    def build_engines(self) -> dict[str, Any]:
        return super().build_engines() if self.inserts else {}

    def train_step(self, step: int) -> dict[str, float]:
        config, size = self.config, self.config.loop.batch_size
        if not self.divergences:
            self.divergences.append(self._measure())
        learning_rate = self.set_rate(self.engine, config.optimizer, step=step)
        batch = self.sequences[step * size : (step + 1) * size]
        own, count, total = batch[rank() :: world_size()], num_positions(batch), torch.zeros((), device=device())
        for part in range(self.accumulation):
            loss = self._divergence(own[part :: self.accumulation])
            check_finite({"divergence": float(loss.detach())}, source="text sequences")
            # DeepSpeed averages gradients over ranks and accumulation steps.
            self.engine.backward(loss * (world_size() * self.accumulation / count))
            norm = step_engine(self.engine)
            total += loss.detach()
        mean = float(sum_over_ranks(total)) / count
        return {"train/loss": mean, "optim/lr": learning_rate, "optim/grad_norm": norm}

    def _divergence(self, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
        padded = lay_out(sequences, seq_len=self.seq_len, packed=False, pad_id=self.ids.pad_id)
        lengths_B = torch.tensor([len(sequence.input_ids) for sequence in sequences])
        is_real_BT = torch.arange(padded.input_ids_BT.shape[1]) < lengths_B[:, None]
        with autocast(self.config.engine):
            loss: torch.Tensor = self.engine(padded.input_ids_BT.to(device()), is_real_BT.to(device()))
        return loss

    @torch.no_grad()
    def _measure(self) -> float:
        """The mean divergence over the validation sequences (a collective call)."""
        self.engine.eval()
        own = self.measured[rank() :: world_size()]
        total = torch.tensor([float(self._divergence([sequence])) for sequence in own], device=device()).sum()
        self.engine.train()
        return float(sum_over_ranks(total)) / num_positions(self.measured)

    def evaluate(self, step: int) -> dict[str, float]:
        if step % self.config.evaluate_every_steps and step != self.config.loop.max_steps:
            return {}
        self.divergences.append(self._measure())
        return {"val/divergence": self.divergences[-1]}

    def fingerprints(self) -> dict[str, str]:
        return {"texts": _digest(self.measured), "vocabulary": vocabulary_digest(self.text_tokenizer)}

    def state(self, step: int) -> dict[str, Any]:
        seen = step * self.config.loop.batch_size
        return {"divergences": self.divergences, "seen": seen, "texts": _digest(self.sequences[:seen])}

    def load_state(self, state: dict[str, Any]) -> None:
        if _digest(self.sequences[: state["seen"]]) != state["texts"]:
            raise UserError(f"{self.config.loop.output_dir} was trained on other texts; use another RUN=")
        self.divergences = list(state["divergences"])

    def finish(self, folder: Path) -> dict[str, Any]:
        """Extend the model, round it, measure it, and write it."""
        config, sizes = self.config, {"base_entries": self.entries}
        if self.inserts:
            trained = {name.removeprefix("model."): tensor for name, tensor in full_weights(self.engine).items()}
            self.model.load_state_dict(trained, strict=False)
        if not is_main():
            return {}
        facts: dict[str, Any] = {"base_architecture": type(self.base).__name__, "divergences": self.divergences}
        before = text_loss(self.base, sequences=self.measured, sizes=sizes)["base_entries"]
        options: dict[str, Any] = {"new_token_init": config.new_token_init, "seed": config.loop.seed}
        model = extend_model(self.model, ids=self.ids, base_entries=self.entries, **options).eval()
        del self.base, self.model, self.objective
        dtype: torch.dtype = getattr(torch, self.dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).to(torch.float32)
        after = text_loss(model, sequences=self.measured, sizes=sizes | {"text_vocab_size": self.ids.text_vocab_size})
        facts |= {"text_loss_before": before, "text_loss_after": after, "dtype": str(dtype)}
        facts |= {"text_tokens": sum(int(sequence.targets.sum()) for sequence in self.measured)}
        facts |= {"architecture": type(model).__name__, "parameters": count_parameters(model, ids=self.ids)}
        model.to("cpu", dtype)
        save_model(
            folder / "model",
            model=model,
            text_tokenizer=self.text_tokenizer,
            ids=self.ids,
            visual_tokenizer=config.visual_tokenizer,
            trained=False,
        )
        _print(facts, config=config, ids=self.ids)
        return facts


build_task = UM3InitTask


def _digest(sequences: Sequence[TrainingSequence]) -> str:
    return short_hash(*[sequence.input_ids.tolist() for sequence in sequences])


def num_positions(sequences: Sequence[TrainingSequence]) -> int:
    return sum(len(sequence.input_ids) for sequence in sequences)


@torch.no_grad()
def text_loss(
    model: PreTrainedModel, *, sequences: Sequence[TrainingSequence], sizes: dict[str, int]
) -> dict[str, float]:
    """Nats per token of text sequences under the softmax over the first `size` entries, for each of `sizes`."""
    sums, count = dict.fromkeys(sizes, 0.0), 0
    head_VD = model.get_output_embeddings().weight
    for sequence in track(sequences, total=len(sequences), label="text loss", unit="sequences"):
        input_ids_T, is_target_T = (part.to(model.device) for part in sequence)
        hidden_TD = model.model(input_ids=input_ids_T[None, :-1], use_cache=False).last_hidden_state[0]
        hidden_XD, targets_X = hidden_TD[is_target_T[1:]], input_ids_T[1:][is_target_T[1:]]
        for name, size in sizes.items():
            sums[name] += float(F.cross_entropy(F.linear(hidden_XD, head_VD[:size]), targets_X, reduction="sum"))
        count += len(targets_X)
    return {name: total / count for name, total in sums.items()}


def _vocabulary(config: UM3InitConfig, *, text_tokenizer: PreTrainedTokenizerBase) -> UnifiedVocabulary:
    """The vocabulary of the configured sub-tokens, or of the fewest that divide a code's bits evenly."""
    qlip = load_qlip(config.visual_tokenizer)
    bits, subtokens, size = qlip.num_bits, config.subtokens, config.bits_per_subtoken
    if not subtokens:
        fewest = range(-(-bits // MAX_BITS_PER_SUBTOKEN), bits + 1)
        subtokens = bits // size if size else next(count for count in fewest if bits % count == 0)
    size = size or bits // subtokens
    if subtokens * size != bits:
        raise UserError(
            f"subtokens={subtokens} x bits_per_subtoken={size} is not {bits}, the bits of a code of "
            f"{config.visual_tokenizer}; set factors of {bits}, or neither"
        )
    try:
        return make_vocabulary(
            text_tokenizer, subtokens=subtokens, bits_per_subtoken=size, num_patches=qlip.num_patches
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _print(record: dict[str, Any], *, config: UM3InitConfig, ids: UnifiedVocabulary) -> None:
    folder = config.loop.output_dir
    architectures = f"{record['base_architecture']} -> {record['architecture']}"
    print(f"{folder}/model: {architectures}, saved as {record['dtype']}")
    print(
        f"  {ids.text_vocab_size:,} text entries + {ids.visual_vocab_size:,} visual entries "
        f"({ids.subtokens} sub-tokens of {ids.bits_per_subtoken} bits); an image is {ids.image_tokens} tokens"
    )
    for part, count in record["parameters"].items():
        print(f"  {part:<30} {count:>13,}")
    before, after = record["text_loss_before"], record["text_loss_after"].values()
    if divergences := record["divergences"]:
        print(f"  divergence from the base {divergences[0]:.4f} -> {divergences[-1]:.4f} nats per token")
    texts = ", ".join(source.name for source in config.data.texts)
    print(f"  text loss on {record['text_tokens']:,} tokens of {texts}, nats per token")
    for name, value in zip(("before", "after", "after, with the image tokens"), (before, *after), strict=True):
        print(f"  {name:<30} {value:>13.6f}  {value - before:+.6f}")
    settings = [f"model.base_model={folder}/model", f"model.qk_norm={str(config.qk_norm).lower()}"]
    settings += [f"vocabulary.subtokens={ids.subtokens}", f"vocabulary.bits_per_subtoken={ids.bits_per_subtoken}"]
    train = make_command("make um3", also=["TEXT", "VAL_FRACTION"])
    if weights_digest(config.visual_tokenizer) != (weights_digest(Path(folder).parent / "stage2" / "model") or "none"):
        # make codes and make um3 use the tokenizer of stage 2 otherwise.
        own = f"QLIP={shlex.quote(f'{folder}/model/{QLIP_FOLDER}')}"
        print(f"encode its images: {make_command('make codes', also=['DATA', 'VAL_FRACTION'])} {own}")
        train = f"{train} {own}"
    print(f"train it: {train} ARGS={shlex.quote(shlex.join(settings))}")
