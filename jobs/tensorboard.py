"""TensorBoard's event file."""

import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TENSORBOARD_DIR = "tensorboard"


class EventFile:
    """DIR/tensorboard with one file of events, written by who calls.

    (tensorboardX's own writer has a thread, which ends at the first error of a disk; then its queue fills up, and the
    next event waits for ever.)
    """

    def __init__(self, folder: Path) -> None:
        """Begin anew.

        Raises:
            ImportError: tensorboardX is not installed.
            OSError: It cannot be written.
        """
        from tensorboardX import event_file_writer

        shutil.rmtree(folder / TENSORBOARD_DIR, ignore_errors=True)
        (folder / TENSORBOARD_DIR).mkdir(exist_ok=True)
        self._events = event_file_writer.EventsWriter(str(folder / TENSORBOARD_DIR / "events"))

    def add(self, scalars: Iterable[tuple[str, float]], step: int) -> None:
        """Show values of a step.

        Raises:
            OSError: They cannot be written; nor can what follows, in this file.
        """
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        new_event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue] - made at run time
        for name, value in scalars:
            self._events.write_event(new_event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        """Finish the file."""
        self._events.close()


def scalars_of(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers with their names; those of a mapping within have both."""
    found = list[tuple[str, float]]()
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += scalars_of(value, f"{prefix}{name}/")
        elif type(value) in (int, float) and (prefix or name != "step"):
            found.append((prefix + name, float(value)))
    return found
