"""Text for training: documents tokenised once into one stream of ids on disk, cut into rows of equal length.

The stream is `document eos bos document eos ...` as raw uint32 in one file, mapped into memory; where a tokenizer
has one entry for bos and eos, it stands between documents once. A row is bos and the next `row_tokens - 1` ids,
so every id of the corpus is read once an epoch and every row begins the way a prompt does; it may begin within a
document, as in any packed pre-training. Where rows are packed (`data.packing`), the documents of a row are kept apart.

Documents whose file cannot be read are left out; the stream then says so in a .json beside it, and at every opening.
"""

import hashlib
import itertools
import logging
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_mix.samples import BadSample
from data_mix.set_aside import SetAside
from data_mix.text import TextSource
from um3.core.distributed import barrier, is_main
from um3.core.errors import UserError
from um3.core.files import atomic_file, read_json, write_json
from um3.core.progress import Progress
from um3.ids import IdSpace
from um3.rows import Row
from um3.text_tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENTS_AT_ONCE = 1000


class TokenStream:
    """The rows of one text source.

    The file is made by the first rank when it is not there, and is named after everything it depends on:
    the documents' origin, the tokenizer and the special ids. All ranks must see the same `cache` folder.
    set_aside: the files that could not be read when it was made, with the reason.
    """

    def __init__(
        self,
        documents: TextSource,
        *,
        tokenizer: "PreTrainedTokenizerBase",
        ids: IdSpace,
        row_tokens: int,
        cache: str | Path,
        origin: str = "",
    ) -> None:
        """`origin`: says what the documents are made from, for where their number alone does not.

        Raises:
            UserError: the source holds no text, or this process cannot see the first rank's file.
        """
        self.name, self.ids, self.row_tokens = documents.name, ids, row_tokens
        path = Path(cache) / f"text-{documents.name}-{_key(origin, len(documents), tokenizer=tokenizer, ids=ids)}.bin"
        if is_main() and not path.exists():
            _write_stream(path, documents, tokenizer=tokenizer, ids=ids)
        barrier()
        if not path.exists():
            raise UserError(f"{path} cannot be seen by this process; put the run folder where every machine sees it")
        left_out = path.with_suffix(".json")
        self.set_aside: dict[str, str] = read_json(left_out)["set_aside"] if left_out.exists() else {}
        if self.set_aside:
            logger.warning("%s was made without %s; once they can be read, remove it", path, ", ".join(self.set_aside))
        if not path.stat().st_size:
            raise UserError(f"text source '{documents.name}' holds no text; point it at other data or leave it out")
        self.tokens: np.ndarray = np.memmap(path, dtype=np.uint32, mode="r")

    def __len__(self) -> int:
        """Rows in one epoch; the last may be shorter than the others."""
        return -(-len(self.tokens) // (self.row_tokens - 1))

    def __getitem__(self, index: int) -> Row:
        """Row `index`: bos, which is no target, and the ids after it, which are (but for a bos among them)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * (self.row_tokens - 1)
        piece = self.tokens[start : start + self.row_tokens - 1].astype(np.int64)
        input_ids = torch.from_numpy(np.concatenate([[self.ids.bos_id], piece]))
        targets = torch.ones_like(input_ids, dtype=torch.bool)
        targets[0] = False
        if self.ids.bos_id != self.ids.eos_id:
            targets &= input_ids != self.ids.bos_id
        return Row(input_ids=input_ids, targets=targets)


def _key(*values: str | int, tokenizer: "PreTrainedTokenizerBase", ids: IdSpace) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    described = repr((values, platform.python_version(), vocabulary, ids.bos_id, ids.eos_id))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _write_stream(path: Path, documents: TextSource, *, tokenizer: "PreTrainedTokenizerBase", ids: IdSpace) -> None:
    progress = Progress(len(documents), label=f"tokenising {documents.name}", unit="documents")
    left_out: Counter[str] = Counter()
    texts = (_document(documents, index, left_out=left_out) for index in range(len(documents)))
    separator = [ids.eos_id] if ids.bos_id == ids.eos_id else [ids.eos_id, ids.bos_id]
    with atomic_file(path) as partial, open(partial, "wb") as file:
        while batch := list(itertools.islice(texts, DOCUMENTS_AT_ONCE)):
            for tokens in encode_texts(batch, tokenizer=tokenizer):
                np.array([*tokens, *separator] if tokens else [], dtype=np.uint32).tofile(file)
            progress.advance(len(batch))
        aside = getattr(documents, "set_aside", SetAside(documents.name))
        if reasons := {str(file): reason for file, reason in aside.reasons.items()}:
            write_json(path.with_suffix(".json"), {"documents_left_out": left_out.total(), "set_aside": reasons})
        else:
            path.with_suffix(".json").unlink(missing_ok=True)
    logger.info("%s: %d tokens in %s", documents.name, path.stat().st_size // 4, path)


def _document(documents: TextSource, index: int, *, left_out: Counter[str]) -> str:
    """A document, or an empty one, counted, where its file cannot be read."""
    try:
        return documents[index]
    except BadSample as error:
        left_out[error.reason] += 1
        return ""
