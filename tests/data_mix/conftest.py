"""What tests of unreadable files share."""

import pytest

from data_mix.sources import bad_files as set_aside


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are tried again after milliseconds, not seconds."""
    monkeypatch.setattr(set_aside, "RETRY_WAITS_S", (0.01, 0.02, 0.03))
