"""Fixtures for tests of unreadable files and of large ones."""

from pathlib import Path

import pytest

import data_mix.sources.tables
from data_mix.sources import bad_files


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after milliseconds, not seconds."""
    monkeypatch.setattr(bad_files, "RETRY_WAITS_S", (0.01, 0.02, 0.03))


@pytest.fixture(params=["in memory", "mapped"])
def parquet_in_memory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tests run once with parquet files that count as small, once with files that count as large."""
    monkeypatch.setenv("UM3_CACHE", str(tmp_path / "cache"))
    if request.param == "mapped":
        monkeypatch.setattr(data_mix.sources.tables, "IN_MEMORY_BYTES", 0)
    return str(request.param) == "in memory"
