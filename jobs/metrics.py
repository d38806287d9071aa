"""metrics.jsonl, a line per step or epoch, and the same numbers for TensorBoard."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.tensorboard import EventFile, scalars_of
from mone.checkpoint import write_whole
from pipelines.output import append_line, in_output

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to DIR/metrics.jsonl and, where tensorboardX is installed, to DIR/tensorboard; one writer a folder.

    A line is {"kind": "epoch", "step": 3, ...}: there is one of each kind and step, and a killed process leaves whole
    lines. The file is what counts: when it is opened again, or its disk had failed, TensorBoard's events are written
    anew from it, so that curves have neither gaps nor doubles.
    """

    def __init__(self, folder: Path, *, done: Mapping[str, int] | None = None) -> None:
        """Open, to begin or to continue.

        Args:
            folder: Of the run; exists.
            done: For each kind, the last step that the state to continue from has seen. Later lines tell of a run
                that was lost, and go. None keeps them, and they stay as they are when their steps are run again.

        Raises:
            ValueError: A file that no writer wrote.
        """
        self.path = folder / METRICS_FILE
        records = read_metrics(folder)
        if done is not None:
            records = [record for record in records if record["step"] <= done.get(record["kind"], math.inf)]
        self._seen = {(record["kind"], record["step"]) for record in records}
        write_whole(self.path, "".join(map(_line, records)).encode())
        self._board = self._new_board()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> bool:
        """Add a record; False where there is one of this kind and step.

        Args:
            kind: "step", "epoch": TensorBoard groups by it.
            step: Which.
            values: Numbers, text, or mappings of these. A number that is not finite becomes null.

        Raises:
            OutputFailedError: It cannot be written.
        """
        if (kind, step) in self._seen:
            return False
        record = _finite({"kind": kind, "step": step} | dict(values))
        in_output(self.path.parent, lambda: append_line(self.path, _line(record).encode()))
        self._seen.add((kind, step))
        if self._board:
            try:
                _show(self._board, record)
            except OSError:
                self._board = None
        else:
            self._board = self._new_board()
        return True

    def _new_board(self) -> EventFile | None:
        """With what the file has; None where that cannot be written, or nobody is there to."""
        try:
            board = EventFile(self.path.parent)
            for record in read_metrics(self.path.parent):
                _show(board, record)
        except (ImportError, OSError):
            return None
        return board

    def close(self) -> None:
        """Finish."""
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, without a last line that was cut short.

    Raises:
        ValueError: A line that no writer wrote, with its number.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str)):
            raise ValueError(f"{path}: line {number} is no record with kind and step")
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(board: EventFile, record: dict[str, Any]) -> None:
    board.add([(f"{record['kind']}/{name}", value) for name, value in scalars_of(record)], record["step"])
