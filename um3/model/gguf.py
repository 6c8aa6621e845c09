"""GGUF files of llama.cpp as bases: a Llama or Qwen in one file, dequantized by transformers.

transformers reads such a file without a complaint where it understands only a part of it (a rotary scaling, a tensor,
a pre-tokenizer's name). What would silently change the model is set right here, or refused in one line.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from um3.core.errors import UserError
from um3.core.hub import load_pretrained
from um3.core.text import printable

ARCHITECTURES = ("llama", "qwen2", "qwen3")
GPT2_PRE_TOKENIZERS = ("", "default", "gpt-2")
"""Names of GPT-2's rule, which transformers takes for every name that it does not know."""
DIGITS_PRE_TOKENIZER = "smollm"
"""GPT-2's rule after every digit is split off."""
LLAMA_3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1 and 3.2. A GGUF stores only the factors that follow from them and `factor`."""
ROPE_FACTORS = "rope_freqs.weight"
PART_OF_SPLIT = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$")
LINK = "model.gguf"
ORIGINAL = "use the folder or hub id of the original model"


class Header(NamedTuple):
    """Metadata without arrays, tensor shapes (torch's order) by name, and the factors of a rotary scaling (K/2)."""

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    rope_factors: Tensor | None


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return str(path).endswith(".gguf")


def read_gguf_config(path: str | Path) -> PreTrainedConfig:
    """The config of a GGUF file, checked against its tensors; UserError if the file cannot be read as a whole."""
    header = _read_header(path)
    with _linked(path) as options:
        config: PreTrainedConfig = load_pretrained(AutoConfig, kind="base model", **options)
    if head_dim := header.values.get(f"{config.model_type}.attention.key_length"):  # transformers reads it for few
        config.head_dim = head_dim
    if header.rope_factors is not None:
        _set_rope_scaling(config, header.rope_factors, path=path)
    _check_tensors(header, config, path=path)
    return config


def load_gguf(path: str | Path, *, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a GGUF file in float32, with the `config` of `read_gguf_config`.

    transformers marks it as quantized: build another one from its tensors.
    """
    with _linked(path) as options:
        options |= {"config": config, "dtype": torch.float32}
        model: PreTrainedModel = load_pretrained(AutoModelForCausalLM, kind="base model", **options)
    return model


def load_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file; UserError if it splits text in a way that transformers does not know."""
    values = _read_header(path).values
    name = str(values.get("tokenizer.ggml.pre", ""))
    is_byte_level = values.get("tokenizer.ggml.model") == "gpt2"
    if is_byte_level and name not in (*GPT2_PRE_TOKENIZERS, DIGITS_PRE_TOKENIZER, *GGUF_PRE_TOKENIZER_SPLITS):
        problem = f"{path} splits text by the rule '{printable(name)}', which is not known here"
        raise UserError(f"{problem}; {ORIGINAL}")
    with _linked(path) as options:
        read: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, kind="text tokenizer", **options)
    stored = json.loads(read.backend_tokenizer.to_str())
    # transformers adds GPT-2's end of text to a byte-level vocabulary that lacks it.
    entries = values.get("tokenizer.ggml.tokens", 0)
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < entries]
    backend = Tokenizer.from_str(json.dumps(stored))
    if is_byte_level and name == DIGITS_PRE_TOKENIZER:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    kept = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token", "chat_template")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{option: getattr(read, option) for option in kept})
    tokenizer.name_or_path = str(path)
    return tokenizer


def gguf_license(path: str | Path) -> str:
    """The licence that a GGUF file states; empty without."""
    return str(_read_header(path).values.get("general.license", ""))


def gguf_names(model: PreTrainedModel) -> dict[str, str]:
    """llama.cpp's names of a model's parameters."""
    names = get_tensor_name_map(MODEL_ARCH[model.config.model_type.upper()], model.config.num_hidden_layers)
    suffixes = (".weight", ".bias")
    return {name: names.get_name(name, try_suffixes=suffixes) or name for name, _ in model.named_parameters()}


def rope_factors(config: PreTrainedConfig) -> Tensor:
    """What llama.cpp divides the rotary frequencies by, (K/2), for a config with Llama 3's scaling."""
    rope = config.rope_parameters
    with torch.device("cpu"):  # also while a model is built on the meta device
        scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return 1 / rope["rope_theta"] ** exponents / scaled


@contextmanager
def _linked(path: str | Path) -> Iterator[dict[str, Any]]:
    """Options of `load_pretrained` for a GGUF file, alone in a folder: transformers also reads others beside it."""
    remedy = f"copy the file again, or {ORIGINAL}"
    with TemporaryDirectory() as folder:
        (Path(folder) / LINK).symlink_to(Path(path).resolve())
        yield {"path_or_hub_id": folder, "gguf_file": LINK, "shown_as": path, "remedy": remedy}


def _read_header(path: str | Path) -> Header:
    """UserError: no whole GGUF file, a part of a split one, or one of another architecture or rotary scaling."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give an existing .gguf file")
    try:
        values, _ = read_gguf_metadata(str(path))  # first: unlike GGUFReader it stops at counts beyond the file's end
        architecture, tensors = values["general.architecture"], GGUFReader(path).tensors
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors}
        factors = [torch.from_numpy(tensor.data.copy()) for tensor in tensors if tensor.name == ROPE_FACTORS]
        num_layers = int(values.get(f"{architecture}.block_count", 0))
        num_parts = int(values.get("split.count", 1))
    except Exception as error:  # the readers raise almost anything on a damaged file
        raise UserError(f"{path} is not a whole GGUF file ({_reason(error)}); copy it again") from None
    if num_parts > 1 or PART_OF_SPLIT.search(str(path)):
        raise UserError(f"{path} is one part of a split file; join the parts with llama-gguf-split of llama.cpp")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path} is a '{printable(architecture)}' model; UM3 extends one of: {known}")
    if num_layers > len(shapes):
        raise UserError(f"{path} describes {num_layers:,} layers, but has {len(shapes)} tensors; copy it again")
    if (scaling := values.get(f"{architecture}.rope.scaling.type", "none")) != "none":
        problem = f"{path} has the rotary scaling '{printable(scaling)}', which cannot be read from a GGUF file"
        raise UserError(f"{problem}; {ORIGINAL}")
    return Header(values, shapes, rope_factors=next(iter(factors), None))


def _reason(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}".split("\n")[0])[:200]


def _set_rope_scaling(config: PreTrainedConfig, factors: Tensor, *, path: str | Path) -> None:
    """Give a config Llama 3's rotary scaling; UserError if the stored factors (K/2) are others."""
    config.rope_parameters |= {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA_3_SCALING}
    expected = rope_factors(config)
    is_llama_3 = isinstance(config, LlamaConfig) and expected.shape == factors.shape
    if not is_llama_3 or not torch.allclose(expected, factors.float(), rtol=1e-4):
        problem = f"{path} has rotary factors ({ROPE_FACTORS}) that are not those of Llama 3.1 or 3.2"
        raise UserError(f"{problem}; {ORIGINAL}")


def _check_tensors(header: Header, config: PreTrainedConfig, *, path: str | Path) -> None:
    """Compare names and shapes of a file's tensors with those of the config's model; UserError names a difference."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        names = gguf_names(model)
        expected = {names[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    except Exception as error:  # on absurd sizes transformers raises almost anything
        raise UserError(f"{path} describes no usable model ({_reason(error)}); copy it again") from None
    shapes = {name: shape for name, shape in header.shapes.items() if name != ROPE_FACTORS}
    for name in sorted(expected.keys() | shapes.keys()):
        stored, described = shapes.get(name, "missing"), expected.get(name, "none")
        if stored != described:
            problem = f"{path}: {printable(name)} is {stored}, but the described model has {described}"
            raise UserError(f"{problem}; {ORIGINAL}")
