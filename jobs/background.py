"""Looking at something again and again while something else runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def looking(look: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call `look` in a thread, every so often, while the block runs.

    Args:
        look: Has ended, and is not called again, once the block is left.
        every_s: Seconds from one look to the next; the first is after as long.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
