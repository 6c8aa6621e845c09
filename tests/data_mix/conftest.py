"""Fixtures for tests of unreadable files."""

import pytest

from data_mix import retry


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after milliseconds, not seconds."""
    monkeypatch.setattr(retry, "RETRY_WAITS_S", (0.01, 0.02, 0.03))
