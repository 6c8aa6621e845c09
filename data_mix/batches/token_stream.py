"""Text for training: documents are tokenised once into a stream of ids on disk, which is cut into sequences.

The stream is `document eos bos document eos ...` as uint32 in one file that is mapped into memory. If a tokenizer has
one id for bos and eos, that id stands between documents once. A sequence is bos and the next `seq_len - 1` ids, so each
id is read once an epoch and each sequence begins like a prompt. It may begin within a document, as in any packed
pre-training; with `data.packing=documents`, the documents of a sequence do not attend to each other.

A finished stream does not need its documents any more: it can be made where a network is and used where none is.
Documents of unreadable files are skipped; the .json beside the stream lists them, with a warning at every opening.
"""

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
from data_mix.sources.bad_files import BadFiles
from data_mix.sources.hub_streaming import PastTheEnd, hub_stream
from data_mix.sources.text import TextSource, readable_texts
from um3.core.distributed import make_once
from um3.core.errors import UserError
from um3.core.files import read_json, short_hash, write_json
from um3.core.progress import Progress
from um3.core.seeds import derive_seed
from um3.model.sequences import TrainingSequence
from um3.model.text_tokenizer import encode_texts, vocabulary_digest
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENTS_AT_ONCE = 1000
SAVE_EVERY_S = 30.0


class TokenStream:
    """The sequences of one text source.

    The first rank makes the file unless it exists. Its name is a hash of everything that the ids depend on: the
    documents' origin, the tokenizer and the special token ids. All ranks must see the same `cache` folder.
    `bad_files` holds the files that could not be read when the stream was made, with the reason.
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
        """`origin`: hash of what the documents are made from; without it only their number tells streams apart.

        Raises:
            UserError: the source holds no text, or this process cannot see the first rank's file.
        """
        self.name, self.ids, self.seq_len = documents.name, ids, seq_len
        key = _key(origin, len(documents), tokenizer=tokenizer, ids=ids)
        path = Path(cache) / f"text-{documents.name}-{key}.bin"
        make_once(path, lambda: _write_stream(path, documents, tokenizer=tokenizer, ids=ids))
        record = path.with_suffix(".json")
        self.bad_files: dict[str, str] = read_json(record)["bad_files"] if record.exists() else {}
        if self.bad_files:
            logger.warning("%s lacks documents of %s; to add them, delete it", path, ", ".join(self.bad_files))
        if not path.stat().st_size:
            raise _no_text(documents)
        self.tokens: np.ndarray = np.memmap(path, dtype=np.uint32, mode="r")

    def __len__(self) -> int:
        """Sequences in one epoch; the last may be shorter than the others."""
        return -(-len(self.tokens) // (self.seq_len - 1))

    def __getitem__(self, index: int) -> TrainingSequence:
        """Sequence `index`: bos, which is no target, and the ids after it, which are targets except for a bos."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * (self.seq_len - 1)
        return _sequence(self.tokens[start : start + self.seq_len - 1], ids=self.ids)


def scattered_sequences(
    documents: TextSource,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    ids: UnifiedVocabulary,
    num_sequences: int,
    seq_len: int,
    seed: int,
    cache: str | Path,
    origin: str = "",
) -> list[TrainingSequence]:
    """Sequences from random places of `num_sequences` documents, the same for the same seed.

    Only these documents are tokenised. If there are fewer, each gives several sequences. The first rank makes the
    sequences once and keeps them in `cache` (a collective call).

    Raises:
        UserError: no document holds text, or this process cannot see the first rank's file.
    """
    key = _key(origin, len(documents), num_sequences, seq_len, seed, tokenizer=tokenizer, ids=ids)
    path = Path(cache) / f"sequences-{documents.name}-{key}.json"

    def make() -> None:
        texts = list(
            itertools.islice(readable_texts(documents, seed=seed, name=f"rows/{documents.name}"), num_sequences)
        )
        if not texts:
            raise _no_text(documents)
        tokens = encode_texts(texts, tokenizer=tokenizer)
        pieces = []
        for number in range(num_sequences):
            document = [*tokens[number % len(tokens)], ids.eos_id]
            num_starts = max(len(document) - (seq_len - 1), 0) + 1
            start = derive_seed(seed, "rows", documents.name, number) % num_starts
            pieces.append(document[start : start + seq_len - 1])
        write_json(path, pieces)

    return [_sequence(np.array(piece), ids=ids) for piece in read_json(make_once(path, make))]


def _no_text(documents: TextSource) -> UserError:
    return UserError(f"text source '{documents.name}' holds no text; check its path, or remove it from data.texts")


def _sequence(piece: np.ndarray, *, ids: UnifiedVocabulary) -> TrainingSequence:
    input_ids = torch.from_numpy(np.concatenate([[ids.bos_id], piece.astype(np.int64)]))
    targets = torch.ones_like(input_ids, dtype=torch.bool)
    targets[0] = False
    if ids.bos_id != ids.eos_id:
        targets &= input_ids != ids.bos_id
    return TrainingSequence(input_ids=input_ids, targets=targets)


def _key(*values: str | int, tokenizer: "PreTrainedTokenizerBase", ids: UnifiedVocabulary) -> str:
    # The Python version: the embedded prose (python_docs) differs between versions.
    return short_hash(*values, platform.python_version(), vocabulary_digest(tokenizer), ids.bos_id, ids.eos_id)


def _write_stream(
    path: Path, documents: TextSource, *, tokenizer: "PreTrainedTokenizerBase", ids: UnifiedVocabulary
) -> None:
    """Tokenise all documents into `path`. An interrupted run resumes from its last save (every SAVE_EVERY_S)."""
    unfinished = path.with_suffix(".unfinished")
    done = _load_progress(path, unfinished=unfinished, documents=documents)
    bad_files = getattr(documents, "bad_files", BadFiles(documents.name))
    separator = [ids.eos_id] if ids.bos_id == ids.eos_id else [ids.eos_id, ids.bos_id]
    progress = Progress(len(documents), label=f"tokenising {documents.name}", unit="documents", start=done["documents"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "ab") as file:
        file.truncate(done["bytes"])
        file.seek(done["bytes"])
        saved = time.monotonic()
        while done["documents"] < len(documents):
            first, end = done["documents"], min(done["documents"] + DOCUMENTS_AT_ONCE, len(documents))
            texts: list[str | None] = []
            for index in range(first, end):
                try:
                    texts.append(documents[index])
                except PastTheEnd:
                    end = len(documents)
                    break
                except BadSample:
                    texts.append(None)
            for tokens in encode_texts([text or "" for text in texts], tokenizer=tokenizer):
                file.write(np.array([*tokens, *separator] if tokens else [], dtype=np.uint32).tobytes())
            done |= {"documents": end, "bytes": file.tell(), "skipped": done["skipped"] + texts.count(None)}
            done["bad_files"] |= {str(name): reason for name, reason in bad_files.reasons.items()}
            progress.advance(end - first)
            if time.monotonic() - saved > SAVE_EVERY_S:
                _save_progress(file, path, done=done, documents=documents)
                saved = time.monotonic()
        _save_progress(file, path, done=done, documents=documents)
    os.replace(unfinished, path)
    logger.info("%s: %d tokens in %s; %d documents skipped", documents.name, done["bytes"] // 4, path, done["skipped"])


def _load_progress(path: Path, *, unfinished: Path, documents: TextSource) -> dict[str, Any]:
    """The progress of an interrupted run from the .json of the stream, or that of a new run."""
    record, streamed = path.with_suffix(".json"), hub_stream(documents)
    if unfinished.exists() and record.exists():
        done: dict[str, Any] = read_json(record)
        if unfinished.stat().st_size >= done["bytes"]:
            if streamed is None or streamed.resume(done["stream"]):
                return done
            logger.warning("%s changed, so %s is made again; owner/name@revision pins it", streamed.where, path)
    record.unlink(missing_ok=True)  # of an older stream that was deleted: it must not describe the new one
    return {"documents": 0, "bytes": 0, "skipped": 0, "bad_files": {}}


def _save_progress(file: BinaryIO, path: Path, *, done: dict[str, Any], documents: TextSource) -> None:
    """Save the progress to the .json of the stream, after the ids are on disk."""
    file.flush()
    os.fsync(file.fileno())
    streamed = hub_stream(documents)
    write_json(path.with_suffix(".json"), done | ({"stream": streamed.state()} if streamed is not None else {}))
