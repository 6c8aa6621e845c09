"""UM3 as a stock language model: build it from a config, count its parameters, save and load it.

The architecture is transformers' Qwen3ForCausalLM, without query-key normalisation LlamaForCausalLM or the base's own,
so that transformers, vLLM and lm-eval load a checkpoint as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from um3.core.errors import UserError
from um3.core.files import atomic_folder, read_json, write_text
from um3.core.hub import HUB_ID, load_pretrained, save_tokenizer, write_checksums
from um3.core.text import valid_text
from um3.model.configuration import ModelConfig, hugging_face_options
from um3.model.extend import check_logits, set_generation_defaults
from um3.model.text_tokenizer import BEGIN_OF_IMAGE, num_entries, read_text_tokenizer
from um3.model.visual_parts import DepthHead, load_depth_head, save_depth_head
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from tokenizer.images import QLIPImages

QLIP_FOLDER = "qlip"


class LoadedModel(NamedTuple):
    """A UM3 folder in memory, without its visual tokenizer."""

    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    ids: UnifiedVocabulary
    fingerprint: str
    depth: DepthHead | None = None


def build_model(config: ModelConfig, *, ids: UnifiedVocabulary) -> PreTrainedModel:
    """A model with fresh weights and the config's sizes; `um3.model.extend` handles a `base_model`.

    Works under `torch.device("meta")` for counting parameters.
    """
    assert not config.base_model, "a base brings its own sizes"
    shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    others = ("max_position_embeddings", "initializer_range", "tie_word_embeddings")
    sizes = hugging_face_options(config, *shape, *others)
    sizes |= {"vocab_size": ids.vocab_size, "bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if config.qk_norm else LlamaForCausalLM(LlamaConfig(**sizes))
    return set_generation_defaults(model, ids=ids)


def count_parameters(model: PreTrainedModel, *, ids: UnifiedVocabulary) -> dict[str, int]:
    """Parameters by part, the total last; a tied output head counts as 0. Also works on the meta device."""
    width = model.config.hidden_size
    text, visual = ids.text_vocab_size * width, ids.visual_vocab_size * width
    text_head, visual_head = (0, 0) if model.config.tie_word_embeddings else (text, visual)
    total = sum(parameter.numel() for parameter in model.parameters())
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    layers = total - text - visual - text_head - visual_head - norms
    parts = {"text embedding": text, "visual embedding": visual, "layers": layers, "norms": norms}
    return parts | {"text head": text_head, "visual head": visual_head, "total": total}


def save_model(
    folder: str | Path,
    *,
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    ids: UnifiedVocabulary,
    visual_tokenizer: "str | Path | QLIPImages",
    state_dict: dict[str, Tensor] | None = None,
    depth: Mapping[str, Tensor] | None = None,
    trained: bool = True,
    card: str = "",
) -> None:
    """Write a stock Hugging Face folder with a model card and the visual tokenizer in `qlip/`, atomically.

    `visual_tokenizer` is a QLIP, or its folder or hub id. `state_dict` replaces the model's own tensors (gathered from
    a sharded run). config.json stores the vocabulary, the visual tokenizer's fingerprint and the base under "um3", a
    key that other software ignores; generation_config.json stores the image sampling defaults under "image_sampling",
    SHA256SUMS the digests of the weights. `depth` are the tensors of the depth head, in `depth/`, if `ids` have one.
    `trained` decides what the card says of the visual rows; a `card` replaces it.
    """
    import tokenizer

    assert (depth is not None) == (ids.depth_layers > 0), "the tensors of the depth head"
    if isinstance(visual_tokenizer, str | Path):
        qlip, processor = tokenizer.load(visual_tokenizer)
    else:
        qlip, processor = visual_tokenizer
    with atomic_folder(folder) as partial:
        stored = getattr(model.config, "um3", None) or {}
        model.config.um3 = stored | ids.to_dict() | {"tokenizer_fingerprint": qlip.fingerprint()}
        model.save_pretrained(partial, state_dict=state_dict)
        write_checksums(partial)
        if depth is not None:
            save_depth_head(partial, depth)
        save_tokenizer(text_tokenizer, partial)
        qlip.save_pretrained(partial / QLIP_FOLDER)
        processor.save_pretrained(partial / QLIP_FOLDER)
        with torch.device("meta"):  # under ZeRO 3 the model's own tensors are on other ranks
            parts = count_parameters(AutoModelForCausalLM.from_config(model.config, trust_remote_code=False), ids=ids)
        facts: dict[str, Any] = {"qlip_license": qlip.config.weights_license, "trained": trained}
        facts["has_chat_template"] = bool(text_tokenizer.chat_template)
        write_text(partial / "README.md", card or model_card(model.config, ids=ids, parts=parts, **facts))


def model_card(
    config: PreTrainedConfig,
    *,
    ids: UnifiedVocabulary,
    parts: Mapping[str, int],
    qlip_license: str,
    trained: bool,
    has_chat_template: bool,
) -> str:
    """The folder's README.md, from `model_card.md`: the model, its ids and parameters, how to use it, licences."""
    base: dict[str, Any] = config.um3.get("base") or {}
    architecture = next(iter(config.architectures or []), config.model_type)
    changed = ", except for the inserted query-key normalisation" if base.get("architecture") != architecture else ""
    start = f"a starting point: the visual rows are untrained, text is as in the base{changed if base else ''}"
    facts: dict[str, Any] = {"ids": ids, "parts": dict(parts), "base": base, "architecture": architecture}
    facts |= {"state": "trained" if trained else start, "bos": "bos" if ids.bos_id != ids.eos_id else "eos"}
    facts |= {"conversations": ", ".join(stored_texts(config.um3, key="conversations"))}
    facts |= {"fingerprint": config.um3["tokenizer_fingerprint"], "has_chat_template": has_chat_template}
    template = Path(__file__).with_name("model_card.md")
    return render_card(template, pipeline_tag="any-to-any", qlip_license=qlip_license, **facts)


def render_card(
    template: Path,
    *,
    pipeline_tag: str,
    qlip_license: str,
    base: Mapping[str, Any] | None = None,
    library_name: str | None = "transformers",
    **facts: Any,
) -> str:
    """A model card from a template, with the hub's metadata: licence, base model (if it is a hub id), pipeline tag."""
    base = base or {}
    metadata: dict[str, Any] = {"license": base.get("license") or None}
    if qlip_license:
        metadata = {"license": "other", "license_name": "non-commercial"}
    name = str(base.get("name", ""))
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        metadata["base_model"] = name
    data = ModelCardData(library_name=library_name, pipeline_tag=pipeline_tag, tags=["um3", "qlip"], **metadata)
    facts |= {"base": base, "qlip_license": qlip_license}
    return str(ModelCard.from_template(data, template_path=str(template), **facts).content).rstrip() + "\n"


def stored_texts(stored: Mapping[str, Any], *, key: Literal["conversations", "examples"]) -> list[str]:
    """From the "um3" of a model's config.json: the names of the conversations that it was trained on, or captions of
    its training as examples of prompts; empty for none."""
    texts = stored.get(key)
    return [valid_text(str(text)) for text in texts] if isinstance(texts, list) else []


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a folder that `save_model` wrote, in eval mode; UserError if it is not a whole, sound UM3."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; give the folder of a trained one, such as that of make demo")
    described = read_json(folder / "config.json", dict)
    if (stored := described.get("um3")) is None:
        model_type = valid_text(str(described.get("model_type")))
        only = "; a LlamaGen generates images only" if model_type == "llamagen" else ""
        raise UserError(f"{folder} is a model of type {model_type}, not a UM3 (no 'um3' in its config.json){only}")
    model = load_pretrained(AutoModelForCausalLM, folder, dtype=dtype, kind="UM3 model", strict=True).eval()
    ids = UnifiedVocabulary.from_dict(stored, where=folder / "config.json")
    if (rows := model.config.vocab_size) != ids.vocab_size:
        problem = f"vocab_size is {rows}, but 'um3' describes {ids.vocab_size} entries"
        raise UserError(f"{folder}/config.json: {problem}; restore the config.json that was saved with the model")
    check_logits(model, folder)
    text_tokenizer = read_text_tokenizer(folder)
    vocabulary = text_tokenizer.get_vocab()
    if vocabulary.get(BEGIN_OF_IMAGE) != ids.begin_of_image_id or num_entries(text_tokenizer) > ids.text_vocab_size:
        expected = (
            f"text tokenizer of {ids.text_vocab_size} entries with {BEGIN_OF_IMAGE} as id {ids.begin_of_image_id}"
        )
        raise UserError(f"{folder} has no {expected}; restore its tokenizer.json and tokenizer_config.json")
    base = stored.get("base") or {"entries": ids.text_vocab_size, "architecture": ""}
    is_base = isinstance(base, dict) and type(base.get("entries")) is int and isinstance(base.get("architecture"), str)
    is_base = is_base and 0 < base["entries"] <= ids.text_vocab_size
    if not is_base or not isinstance(stored.get("tokenizer_fingerprint"), str):
        name = "tokenizer_fingerprint" if is_base else "base"
        raise UserError(f"{folder}/config.json, 'um3': {name} is {stored.get(name)!r}; restore that file")
    model.to(torch.device(device))
    depth = load_depth_head(folder, ids=ids, model=model) if ids.depth_layers else None
    return LoadedModel(model, text_tokenizer, ids=ids, fingerprint=stored["tokenizer_fingerprint"], depth=depth)
