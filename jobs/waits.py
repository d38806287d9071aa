"""Saying what a run waits for: a line on stderr, once for each time that a store or the output is away."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from jobs.background import looking
from jobs.cli import JobFailed
from pipelines.output import failure_of, told_in
from pipelines.waiting import Notices, told

_POLL_S = 1.0
_LOOKS_BEFORE_SAID = 3
# A hiccup is shorter; a mount that hangs is longer.
_NO_ANSWER_S = 5.0


@contextlib.contextmanager
def waiting_shown(output: Path) -> Iterator[None]:
    """Say in a line when the run begins to wait for a store or the output that is away, here or on its workers.

    Args:
        output: DIR, which has the run's description by now.

    Raises:
        JobFailed: The output has been away for too long.
    """
    notices, waits, probe, here = Notices(output), _Waits(), _Probe(output), dict[int, str]()
    notices.clear()

    def listen(text: str) -> None:  # not in the folder, which may be what is away
        here[threading.get_ident()] = text

    def say() -> None:
        if line := waits.seen([*notices.read(), *filter(None, [*here.values(), probe.said()])]):
            tqdm.write(line, file=sys.stderr)

    try:
        with looking(probe.ask, _POLL_S), looking(say, _POLL_S), told(listen):
            yield
    except Exception as error:
        if line := told_in(f"{type(error).__name__}: {error}"):
            raise JobFailed(line) from error
        raise
    finally:
        notices.clear()


class _Probe:
    """Whether the output can be written. A mount may also hang, and with it who asks."""

    def __init__(self, output: Path) -> None:
        self._output, self._reason, self._asked_s = output, "", math.inf

    def ask(self) -> None:
        self._asked_s = time.monotonic()
        self._reason = failure_of(self._output)
        self._asked_s = math.inf

    def said(self) -> str:
        hangs = time.monotonic() - self._asked_s > _NO_ANSWER_S
        reason = "it does not answer" if hangs else self._reason
        return f"{self._output}: {reason}" if reason else ""


class _Waits:
    """From what is waited for at each look to what is said: once for each time that a store is away."""

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}

    def seen(self, notices: list[str]) -> str:
        """A line where something has been away for some looks, longer than a hiccup."""
        reasons = {notice.partition(": ")[0]: notice for notice in notices}
        self.looks = {place: self.looks.get(place, 0) + 1 for place in reasons}
        new = [reason for place, reason in reasons.items() if self.looks[place] == _LOOKS_BEFORE_SAID]
        return f"waiting   for {'; '.join(new)}; goes on when that is over" if new else ""
