"""Text for training: documents tokenised once into one stream of ids on disk, cut into rows of equal length.

The stream is `document eos bos document eos ...` as raw uint32 in one file, mapped into memory; where a tokenizer
has one entry for bos and eos, it stands between documents once. A row is bos and the next `seq_len - 1` ids,
so every id of the corpus is read once an epoch and every row begins the way a prompt does; it may begin within a
document, as in any packed pre-training. Where rows are packed (`data.packing`), the documents of a row are kept apart.

Documents whose file cannot be read are left out; the stream then says so in a .json beside it, and at every opening.
Once it is made, the documents are not needed any more: it may be made where a network is and used where none is.
"""

import hashlib
import itertools
import logging
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from data_mix.samples import BadSample
from data_mix.sources.bad_files import SetAside
from data_mix.sources.hub_streaming import PastTheEnd, streamed_part
from data_mix.sources.text import TextSource, readable_texts
from um3.core.distributed import is_main, wait_for_file
from um3.core.errors import UserError
from um3.core.files import read_json, write_json
from um3.core.progress import Progress
from um3.core.seeds import derive_seed
from um3.model.sequences import Row
from um3.model.text_tokenizer import encode_texts, vocabulary_digest
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENTS_AT_ONCE = 1000
SAVE_EVERY_S = 30.0


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
        ids: UnifiedVocabulary,
        seq_len: int,
        cache: str | Path,
        origin: str = "",
    ) -> None:
        """`origin`: says what the documents are made from, for where their number alone does not.

        Raises:
            UserError: the source holds no text, or this process cannot see the first rank's file.
        """
        self.name, self.ids, self.seq_len = documents.name, ids, seq_len
        path = Path(cache) / f"text-{documents.name}-{_key(origin, len(documents), tokenizer=tokenizer, ids=ids)}.bin"
        if is_main() and not path.exists():
            _write_stream(path, documents, tokenizer=tokenizer, ids=ids)
        wait_for_file(path)
        left_out = path.with_suffix(".json")
        self.set_aside: dict[str, str] = read_json(left_out)["set_aside"] if left_out.exists() else {}
        if self.set_aside:
            logger.warning("%s was made without %s; once they can be read, remove it", path, ", ".join(self.set_aside))
        if not path.stat().st_size:
            raise UserError(f"text source '{documents.name}' holds no text; point it at other data or leave it out")
        self.tokens: np.ndarray = np.memmap(path, dtype=np.uint32, mode="r")

    def __len__(self) -> int:
        """Rows in one epoch; the last may be shorter than the others."""
        return -(-len(self.tokens) // (self.seq_len - 1))

    def __getitem__(self, index: int) -> Row:
        """Row `index`: bos, which is no target, and the ids after it, which are (but for a bos among them)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * (self.seq_len - 1)
        return _row(self.tokens[start : start + self.seq_len - 1], ids=self.ids)


def scattered_rows(
    documents: TextSource,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    ids: UnifiedVocabulary,
    num_rows: int,
    seq_len: int,
    seed: int,
    cache: str | Path,
    origin: str = "",
) -> list[Row]:
    """Rows as a stream has them, from anywhere in `num_rows` documents, of which no more are tokenised; where there are
    fewer, several from each. The same for the same seed.

    Like a stream they are made once, by the first rank, and kept in `cache` (a collective call).

    Raises:
        UserError: no document holds text, or this process cannot see the first rank's file.
    """
    asked = (origin, len(documents), num_rows, seq_len, seed)
    path = Path(cache) / f"rows-{documents.name}-{_key(*asked, tokenizer=tokenizer, ids=ids)}.json"
    if is_main() and not path.exists():
        named = f"rows/{documents.name}"
        texts = list(itertools.islice(readable_texts(documents, seed=seed, name=named), num_rows))
        if not texts:
            raise UserError(f"text source '{documents.name}' holds no text; point it at other data or leave it out")
        tokens = encode_texts(texts, tokenizer=tokenizer)
        pieces = []
        for number in range(num_rows):
            document = [*tokens[number % len(tokens)], ids.eos_id]
            places = max(len(document) - (seq_len - 1), 0) + 1
            start = derive_seed(seed, "rows", documents.name, number) % places
            pieces.append(document[start : start + seq_len - 1])
        write_json(path, pieces)
    wait_for_file(path)
    return [_row(np.array(piece, dtype=np.uint32), ids=ids) for piece in read_json(path)]


def _row(piece: np.ndarray, *, ids: UnifiedVocabulary) -> Row:
    input_ids = torch.from_numpy(np.concatenate([[ids.bos_id], piece.astype(np.int64)]))
    targets = torch.ones_like(input_ids, dtype=torch.bool)
    targets[0] = False
    if ids.bos_id != ids.eos_id:
        targets &= input_ids != ids.bos_id
    return Row(input_ids=input_ids, targets=targets)


def _key(*values: str | int, tokenizer: "PreTrainedTokenizerBase", ids: UnifiedVocabulary) -> str:
    described = repr((values, platform.python_version(), vocabulary_digest(tokenizer), ids.bos_id, ids.eos_id))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _write_stream(
    path: Path, documents: TextSource, *, tokenizer: "PreTrainedTokenizerBase", ids: UnifiedVocabulary
) -> None:
    """Tokenise all documents into `path`. What an interrupted run did of it, up to its last SAVE_EVERY_S, is kept."""
    begun, notes = path.with_suffix(".begun"), path.with_suffix(".begun.json")
    done = _noted(documents, begun=begun, notes=notes)
    aside = getattr(documents, "set_aside", SetAside(documents.name))
    separator = [ids.eos_id] if ids.bos_id == ids.eos_id else [ids.eos_id, ids.bos_id]
    progress = Progress(len(documents), label=f"tokenising {documents.name}", unit="documents", start=done["documents"])
    begun.parent.mkdir(parents=True, exist_ok=True)
    with open(begun, "ab") as file:
        file.truncate(done["bytes"])
        file.seek(done["bytes"])
        saved = time.monotonic()
        while done["documents"] < len(documents):
            first, end = done["documents"], min(done["documents"] + DOCUMENTS_AT_ONCE, len(documents))
            texts: list[str | None] = []
            try:
                for index in range(first, end):
                    texts.append(_document(documents, index))
            except PastTheEnd:
                end = len(documents)
            for tokens in encode_texts([text or "" for text in texts], tokenizer=tokenizer):
                file.write(np.array([*tokens, *separator] if tokens else [], dtype=np.uint32).tobytes())
            done |= {"documents": end, "bytes": file.tell(), "left_out": done["left_out"] + texts.count(None)}
            done["set_aside"] |= {str(name): reason for name, reason in aside.reasons.items()}
            progress.advance(end - first)
            if time.monotonic() - saved > SAVE_EVERY_S:
                _save(file, notes, done=done, documents=documents)
                saved = time.monotonic()
        _save(file, notes, done=done, documents=documents)
    if done["left_out"] or done["set_aside"]:
        left_out = {"documents_left_out": done["left_out"], "set_aside": done["set_aside"]}
        write_json(path.with_suffix(".json"), left_out)
    else:
        path.with_suffix(".json").unlink(missing_ok=True)
    os.replace(begun, path)
    notes.unlink(missing_ok=True)
    logger.info(
        "%s: %d tokens in %s; %d documents left out", documents.name, done["bytes"] // 4, path, done["left_out"]
    )


def _noted(documents: TextSource, *, begun: Path, notes: Path) -> dict[str, Any]:
    """How far an interrupted run has come, or that there is nothing to go on from."""
    nothing = {"documents": 0, "bytes": 0, "left_out": 0, "set_aside": {}}
    if not (begun.exists() and notes.exists()):
        return nothing
    done = read_json(notes)
    streamed = streamed_part(documents)
    if begun.stat().st_size < done["bytes"]:
        return nothing
    if streamed is not None and not streamed.go_on(done["stream"]):
        logger.warning(
            "%s: has changed since %s was begun, which is made anew; owner/name@revision would keep to one state of it",
            *(streamed.where, begun),
        )
        return nothing
    return done


def _save(file: BinaryIO, notes: Path, *, done: dict[str, Any], documents: TextSource) -> None:
    """Note how far the file has come, once all of it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    streamed = streamed_part(documents)
    write_json(notes, done | ({"stream": streamed.state()} if streamed is not None else {}))


def _document(documents: TextSource, index: int) -> str | None:
    """A document, None where it cannot be read; PastTheEnd where there are no more."""
    try:
        return documents[index]
    except PastTheEnd:
        raise
    except BadSample:
        return None
