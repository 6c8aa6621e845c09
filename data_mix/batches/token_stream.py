"""Text for training: documents are tokenised once into a stream of ids on disk, which is cut into sequences.

The stream is `document eos bos document eos ...` as uint32 in one file with checksums. If a tokenizer has one id for
bos and eos, that id stands between documents once. A sequence is bos and the next `seq_len - 1` ids, so each id is read
once an epoch and each sequence begins like a prompt. It may begin within a document, as in any packed pre-training;
with `data.packing=documents`, the documents of a sequence do not attend to each other.

A finished stream does not need its documents any more: it can be made where a network is and used where none is.
Documents of unreadable files are skipped; the .json beside the stream lists them, with a warning at every opening.
"""

import contextlib
import itertools
import logging
import os
import platform
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch

from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles, DamagedFile
from data_mix.sources.fingerprint import source_fingerprint
from data_mix.sources.hub_streaming import PastTheEnd, hub_stream
from data_mix.sources.text import TextSource, TextSourceConfig, open_text_source, readable_texts
from um3.core.distributed import is_main, make_once
from um3.core.errors import UserError
from um3.core.files import read_json, short_hash, write_json
from um3.core.progress import Progress
from um3.core.seeds import derive_seed
from um3.model.sequences import TrainingSequence
from um3.model.text_tokenizer import encode_texts, splitting_digest, vocabulary_digest
from um3.model.vocabulary import UnifiedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENTS_AT_ONCE = 1000
SAVE_EVERY_S = 30.0
ID_BYTES, CHUNK_BYTES = 4, 2**14


class TokenFile:
    """The ids of a finished stream, and after them the CRC-32 of every CHUNK_BYTES of them; a .json describes the file.

    Every access reads the file and checks its chunks (10 us). A memory map would end the process if the file is cut.
    bad_files: why files could not be read when the stream was made. fingerprint: hash of the ids.
    """

    def __init__(self, path: Path) -> None:
        """DamagedFile if the file does not have the length or the checksums that the .json names."""
        self.path = path
        try:
            record = read_json(path.with_suffix(".json"))
            self._num_bytes, self.bad_files = record["bytes"], record["bad_files"]
            self._file = path.open("rb")
            self._checksums = np.fromfile(path, np.uint32, offset=self._num_bytes)
            found = (len(self._checksums), zlib.crc32(self._checksums.tobytes()))
            is_whole = found == (-(-self._num_bytes // CHUNK_BYTES), record["crc32"])
        except (UserError, FileNotFoundError, LookupError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise self._damage("its .json does not describe it")
        self.fingerprint = short_hash(*found)

    def __len__(self) -> int:
        return int(self._num_bytes) // ID_BYTES

    def __getitem__(self, ids: slice) -> np.ndarray:
        """A range of ids (uint32). DamagedFile if their chunks do not have their checksums."""
        start, stop, _ = ids.indices(len(self))
        first = start * ID_BYTES // CHUNK_BYTES
        end = min(-(-stop * ID_BYTES // CHUNK_BYTES) * CHUNK_BYTES, self._num_bytes)
        data = os.pread(self._file.fileno(), end - first * CHUNK_BYTES, first * CHUNK_BYTES)
        for number, begin in enumerate(range(0, end - first * CHUNK_BYTES, CHUNK_BYTES), start=first):
            if zlib.crc32(data[begin : begin + CHUNK_BYTES]) != self._checksums[number]:
                raise self._damage(f"other content at byte {number * CHUNK_BYTES}")
        return np.frombuffer(data, np.uint32)[start - first * CHUNK_BYTES // ID_BYTES :][: stop - start]

    def check(self) -> None:
        """Read everything; DamagedFile if a checksum differs."""
        for start in range(0, len(self), CHUNK_BYTES):
            self[start : start + CHUNK_BYTES]

    def _damage(self, reason: str) -> DamagedFile:
        return DamagedFile(f"{self.path} is damaged ({reason}); delete it, and the next run makes it again")


class TokenStream:
    """The sequences of one text source.

    The first rank makes the file unless it exists and is whole. Its name is a hash of everything that the ids depend
    on: the documents' origin, the tokenizer and the special token ids. All ranks must see the same `cache` folder.
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
        UserError if the source holds no text, or this process cannot see the first rank's file."""
        self.name, self.ids, self.seq_len = documents.name, ids, seq_len
        key = _key(origin, len(documents), tokenizer=tokenizer, ids=ids)
        path = Path(cache) / f"text-{documents.name}-{key}.bin"
        if is_main() and path.exists():
            try:
                TokenFile(path)
            except DamagedFile as error:
                logger.warning("making the tokens of '%s' again: %s", documents.name, error)
                path.unlink()
        make_once(path, lambda: _write_stream(path, documents, tokenizer=tokenizer, ids=ids))
        self.tokens = TokenFile(path)
        if bad_files := self.tokens.bad_files:
            logger.warning("%s lacks documents of %s; to add them, delete it", path, ", ".join(bad_files))
        if not len(self.tokens):
            raise _no_text(documents)

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
    sequences once and keeps them in `cache` (a collective call). UserError if no document holds text.
    """
    key = _key(origin, len(documents), num_sequences, seq_len, seed, tokenizer=tokenizer, ids=ids)
    path = Path(cache) / f"sequences-{documents.name}-{key}.json"

    def make() -> None:
        readable = readable_texts(documents, seed=seed, name=f"rows/{documents.name}")
        texts = list(itertools.islice(readable, num_sequences))
        if not texts:
            raise _no_text(documents)
        tokens = encode_texts(texts, tokenizer=tokenizer)
        pieces = []
        for number in range(num_sequences):
            document = [*tokens[number % len(tokens)], ids.eos_id]
            num_starts = max(len(document) - (seq_len - 1), 0) + 1
            start = derive_seed(seed, "rows", documents.name, number) % num_starts
            pieces.append(document[start : start + seq_len - 1])
        write_json(path, {"sequences": pieces, "digest": short_hash(pieces)})

    return [_sequence(np.array(piece), ids=ids) for piece in read_sequences(make_once(path, make))]


def sequences_of_sources(
    sources: Sequence[TextSourceConfig], *, split: Split, num_sequences: int, **options: Any
) -> list[list[TrainingSequence]]:
    """`scattered_sequences` of each source, with its `options`.

    They are `num_sequences` in all, the same number of each source to within one.
    """
    if num_sequences < len(sources):
        raise UserError(f"{num_sequences} sequences for {len(sources)} texts; raise num_sequences, or use fewer texts")
    return [
        scattered_sequences(
            open_text_source(source, split=split),
            num_sequences=len(range(number, num_sequences, len(sources))),
            origin=source_fingerprint(source, split),
            **options,
        )
        for number, source in enumerate(sources)
    ]


def read_sequences(path: Path) -> list[list[int]]:
    """The ids that `scattered_sequences` keeps; DamagedFile if they do not have their digest."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("digest") != short_hash(content.get("sequences")):
        raise DamagedFile(f"{path} is damaged; delete it, and the next run makes it again")
    return cast(list[list[int]], content["sequences"])


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
    # The built-in prose (python_docs) differs between Python versions.
    digests = vocabulary_digest(tokenizer), splitting_digest(tokenizer)
    return short_hash(*values, platform.python_version(), *digests, ids.bos_id, ids.eos_id)


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
    with open(unfinished, "a+b") as file:
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
        file.seek(0)
        checksums = np.array([zlib.crc32(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")], np.uint32)
        file.write(checksums.tobytes())
        _save_progress(file, path, done=done | {"crc32": zlib.crc32(checksums.tobytes())}, documents=documents)
    os.replace(unfinished, path)
    logger.info("%s: %d tokens in %s; %d documents skipped", documents.name, done["bytes"] // 4, path, done["skipped"])


def _load_progress(path: Path, *, unfinished: Path, documents: TextSource) -> dict[str, Any]:
    """The progress of an interrupted run from the .json of the stream, or that of a new run."""
    record, streamed = path.with_suffix(".json"), hub_stream(documents)
    if unfinished.exists() and record.exists():
        with contextlib.suppress(UserError, LookupError, TypeError):  # a damaged record
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
