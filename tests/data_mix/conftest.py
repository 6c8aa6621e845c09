"""All tests of data retry at once and keep indexes to themselves; a fixture for large files."""

from pathlib import Path

import pytest

import data_mix.sources.tables
from data_mix.sources import bad_files


@pytest.fixture(autouse=True)
def short_waits_and_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after milliseconds, not seconds; indexes and copies of files are kept in `tmp_path`/cache."""
    monkeypatch.setattr(bad_files, "RETRY_WAITS_S", (0.01, 0.02, 0.03))
    monkeypatch.setenv("UM3_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["in memory", "mapped"])
def parquet_in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tests run once with parquet files that count as small, once with files that count as large."""
    if request.param == "mapped":
        monkeypatch.setattr(data_mix.sources.tables, "IN_MEMORY_BYTES", 0)
    return str(request.param) == "in memory"
