"""The model card: README.md of a UM3 folder, from what its config.json says."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from um3.model.text_tokenizer import BEGIN_OF_IMAGE, END_OF_IMAGE
from um3.model.vocabulary import UnifiedVocabulary

LLAMA_TERMS = (
    " Llama's licence asks to show 'Built with Llama' and to begin the name of a model made from it with 'Llama'."
)


def model_card(
    config: PreTrainedConfig, *, ids: UnifiedVocabulary, parts: Mapping[str, int], qlip_license: str, trained: bool
) -> str:
    """The card as markdown: what the model is, its ids and parameters, how to load and prompt it, licences."""
    about: dict[str, Any] = config.um3
    base: dict[str, Any] = about.get("base") or {}
    architecture = next(iter(config.architectures or []), config.model_type)
    changed = base and base["architecture"] != architecture
    text = "as in the base but for the query-key normalisation put in" if changed else "as in the base"
    state = "trained" if trained else f"a starting point: the visual rows are untrained, text is {text}"
    counts = "\n".join(f"| {part} | {count:,} |" for part, count in parts.items())
    bos = "bos" if ids.bos_id != ids.eos_id else "eos"
    return f"""{_front_matter(base, qlip_license=qlip_license)}
# UM3: one model of text and images

A language model that reads and writes images as codes of the QLIP tokenizer in `qlip/` (arXiv 2502.05178).

- state: {state}
- architecture: `{architecture}`, a stock one: no code of UM3 is needed to load it
- base: {_base_line(base)}
- visual tokenizer: {about["tokenizer_fingerprint"]}
- an image: {ids.num_patches} codes of {ids.num_bits} bits, {ids.image_tokens} tokens

## Ids

| ids | what |
|---|---|
| 0 .. {ids.text_vocab_size - 1} | text: beginning {ids.bos_id}, end {ids.eos_id}, padding {ids.pad_id}, words |
| {ids.begin_of_image_id}, {ids.end_of_image_id} | `{BEGIN_OF_IMAGE}` and `{END_OF_IMAGE}`, among the text entries |
{_subtoken_lines(ids)}

A code is {ids.subtokens} x {ids.bits_per_subtoken} bits, high bits first, each subtoken with ids of its own. Text is predicted
among the text entries, an image token among those of its subtoken.

## Parameters

| part | parameters |
|---|---|
{counts}

## Loading and prompting

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

With UM3 installed, `um3 generate "a prompt" --model THIS_FOLDER` draws and `um3 caption` describes.
There is no chat template; a prompt is the beginning of a row as it was trained (`{bos}` is id {ids.bos_id}):

| task | prompt | answer |
|---|---|---|
| continue text | `{bos} text` | text, end of text |
| draw | `{bos} caption {BEGIN_OF_IMAGE}` | {ids.image_tokens} image tokens, `{END_OF_IMAGE}` |
| describe | `{bos} {BEGIN_OF_IMAGE} image tokens {END_OF_IMAGE}` | caption, end of text |

## Licences

- base: {_license_line(base)}
- visual tokenizer: {qlip_license or "its weights name no restriction; whoever trained them decides"}
"""


def _front_matter(base: Mapping[str, Any], *, qlip_license: str) -> str:
    lines = ["library_name: transformers", "pipeline_tag: any-to-any", "tags: [um3, qlip]"]
    if qlip_license:
        lines += ["license: other", "license_name: non-commercial"]
    elif base.get("license"):
        lines += [f"license: {base['license']}"]
    return "\n".join(["---", *lines, "---"])


def _base_line(base: Mapping[str, Any]) -> str:
    if not base:
        return "none, trained from fresh weights"
    tied = ", output head tied there and untied here" if base["tied"] else ""
    return f"`{base['name']}`, a `{base['architecture']}` with {base['entries']:,} text entries{tied}"


def _license_line(base: Mapping[str, Any]) -> str:
    if not base:
        return "none"
    if not base["license"]:
        return f"the licence of `{base['name']}` holds for this model as well; its card was not at hand"
    terms = LLAMA_TERMS if base["license"].startswith("llama") else ""
    return f"`{base['license']}`, as the card of `{base['name']}` says; it holds for this model as well.{terms}"


def _subtoken_lines(ids: UnifiedVocabulary) -> str:
    ranges = [ids.subtoken_range(subtoken) for subtoken in range(ids.subtokens)]
    return "\n".join(
        f"| {start} .. {end - 1} | image tokens of subtoken {subtoken} |"
        for subtoken, (start, end) in enumerate(ranges)
    )
