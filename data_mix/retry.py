"""Repeat an action that may fail for a few seconds, such as a read from a file server or over the network."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (0.5, 2.0, 8.0)  # before each retry; a file server that recovers does so within seconds
ResultT = TypeVar("ResultT")


def retry(
    action: Callable[[], ResultT], *, where: str, is_worth_it: Callable[[Exception, int], bool] = lambda *_: True
) -> ResultT:
    """Return `action()`. After an exception, wait and call it again, at most once for each of RETRY_WAITS_S.

    where: what is read, for the log. is_worth_it: whether to retry after an exception, given the number of retries so
    far. The exception of the last call is raised.
    """
    for num_retries, wait_s in enumerate(RETRY_WAITS_S):
        try:
            return action()
        except Exception as error:
            if not is_worth_it(error, num_retries):
                raise
            logger.info("%s: trying again in %g s: %s", where, wait_s, one_line(error))
            time.sleep(wait_s)
    return action()


def one_line(error: Exception) -> str:
    """Type and message of an exception, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
