"""Trying again what may pass: for seconds, and for minutes where somebody is told that this is waited for."""

import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines import waiting

# How often something is tried at least, and how long a place may fail before what needs it does. It fails since the
# first failure in a row, so that a host which does not exist costs each process that time once, and not for each file.
ATTEMPTS, PATIENCE_S = 5, 180.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_away_since_s: dict[str, float] = {}

Answer = TypeVar("Answer")


class OutOfPatienceError(Exception):
    """It has failed for too long; the cause is the last failure.

    Attributes:
        attempts: How often it was tried.
    """

    def __init__(self, attempts: int) -> None:
        super().__init__(f"{attempts} attempts")
        self.attempts = attempts


def tried(do: Callable[[], Answer], place: str, passing: Callable[[Exception], str]) -> Answer:
    """Do something until it succeeds, with growing pauses.

    Args:
        do: May be done any number of times.
        place: What fails as a whole, for people: a bucket, a host, a folder.
        passing: The reason of a failure that may pass; "" of one that does not, which is raised at once.

    Raises:
        OutOfPatienceError: It has not passed.
    """
    try:
        for attempt in itertools.count(1):
            try:
                answer = do()
            except Exception as failure:
                reason = passing(failure)
                if not reason:
                    _away_since_s.pop(place, None)
                    raise
                away_s = time.monotonic() - _away_since_s.setdefault(place, time.monotonic())
                if attempt >= ATTEMPTS and not (waiting.is_told() and away_s < PATIENCE_S):
                    raise OutOfPatienceError(attempt) from failure
                waiting.tell(f"{place}: {reason}")
            else:
                _away_since_s.pop(place, None)
                return answer
            time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5))
        raise AssertionError
    finally:
        waiting.tell("")
