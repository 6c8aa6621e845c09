"""The model card: README.md of a UM3 folder, rendered from its config.json with `model_card.md`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from um3.model.vocabulary import UnifiedVocabulary


def model_card(
    config: PreTrainedConfig, *, ids: UnifiedVocabulary, parts: Mapping[str, int], qlip_license: str, trained: bool
) -> str:
    """The card as Markdown: what the model is, its ids and parameters, how to load and prompt it, licences."""
    base: dict[str, Any] = config.um3.get("base") or {}
    architecture = next(iter(config.architectures or []), config.model_type)
    state = "trained"
    if not trained:
        changed = base and base["architecture"] != architecture
        text = "as in the base, except for the inserted query-key normalisation" if changed else "as in the base"
        state = f"a starting point: the visual rows are untrained, text is {text}"
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="any-to-any",
            tags=["um3", "qlip"],
            license="other" if qlip_license else base.get("license") or None,
            license_name="non-commercial" if qlip_license else None,
        ),
        template_path=str(Path(__file__).with_suffix(".md")),
        state=state,
        architecture=architecture,
        base=base,
        fingerprint=config.um3["tokenizer_fingerprint"],
        ids=ids,
        parts=dict(parts),
        bos="bos" if ids.bos_id != ids.eos_id else "eos",
        qlip_license=qlip_license,
    )
    return str(card.content).rstrip() + "\n"
