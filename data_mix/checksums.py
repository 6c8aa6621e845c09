"""Checksums of the files that the project writes; they are verified when the content is first read."""

import zlib
from collections.abc import Iterable

import pyarrow as pa


def columns_crc32(columns: Iterable[pa.Array]) -> int:
    """CRC-32 of the buffers of whole columns (no slices), which an Arrow file keeps as they are (about 1 GB/s)."""
    crc32 = 0
    for buffer in (buffer for column in columns for buffer in column.buffers() if buffer is not None):
        crc32 = zlib.crc32(buffer, crc32)
    return crc32
