"""What all tests need: a SIGINT that is heard, the CPU, where most of them compare to the bit, and one-line errors."""

import os
import signal
from collections.abc import Iterator

import pytest

from um3.core.errors import UserError

# A shell starts background jobs (`make test &`) with SIGINT ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """No GPU, even if there are some, but for `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has AMX for bf16, by what torch says of it."""
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)


@pytest.fixture(autouse=True)
def no_launcher_variables() -> Iterator[None]:
    """Remove the launcher's variables, which training in this process sets: later processes must not inherit them."""
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def errors_of_one_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every UserError that a test's process makes is one line."""
    messages: list[str] = []
    initialise = UserError.__init__

    def record(self: UserError, *arguments: object, **options: str) -> None:
        initialise(self, *arguments, **options)
        messages.append(str(self))

    monkeypatch.setattr(UserError, "__init__", record)
    yield
    assert [message for message in messages if "\n" in message] == []
