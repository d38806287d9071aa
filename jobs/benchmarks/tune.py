"""Which tilings are fastest on this card; kept for processes that start later."""

import statistics
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from jobs.benchmarks.engine_blocks import engine_blocks, model_on_gpu, replaying
from jobs.benchmarks.report import Report, aligned
from mone.engine.tilings import Tilings, defaults_for, keep, key_of
from mone.engine.tuning import fastest
from mone.model import ViViT

_CALLS, _REPEATS = 8, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    """Measure how the engine's kernels should cut their work for a model on this card, and keep the choice.

    For each capacity, the blocks run on random tokens with one tiling after the other; minutes, most of them Triton's.
    The choices go into a file (MONE_TILINGS, else ~/.cache/mone/tilings.json) that every later process reads once; it
    holds for this card, Triton, width, mean width of the tokens and number of rows, to a power of two. Without it there
    are defaults.

    python -m jobs.benchmark tune --preset base --batch-size 16 --capacity 0.2 0.3 0.4 1
    """

    model: str = ""
    """Model folder; without one, a --preset."""
    preset: str = "base"
    """tiny, small, base or large."""
    capacity: tuple[float, ...] = (0.2, 0.3, 0.4, 1.0)
    """Effective capacities."""
    batch_size: int = 16
    """Clips of a batch."""

    def measure(self) -> Report:
        """Run the benchmark."""
        model = model_on_gpu(self.model, self.preset, self.capacity, self.batch_size)
        rows = [self._row(model, capacity) for capacity in tqdm(self.capacity, "tune", unit="capacity")]
        header = ("capacity", "default ms", "tuned ms", "times faster")
        table = aligned(header, [_cells(row) for row in rows])
        return Report(table=f"{rows[0]['file']}\n{table}", rows=rows, device=model.embed.weight.device)

    def _row(self, model: ViViT, capacity: float) -> dict[str, Any]:
        blocks = engine_blocks(model, capacity, self.batch_size)
        device, dim = blocks.x_SND.device, model.config.dim

        def seconds(tilings: Tilings) -> float:
            measured = replaying(lambda: blocks(tilings))
            return statistics.median(measured(_CALLS) for _ in range(_REPEATS))

        start = defaults_for(device, blocks.runs, dim)
        best, _ = fastest(seconds, start, tqdm.write)
        before_s, after_s = seconds(start), seconds(best)  # again, side by side
        file = keep(key_of(device, blocks.runs, dim), best)
        return {
            "capacity": capacity,
            "default_ms": before_s * 1e3,
            "tuned_ms": after_s * 1e3,
            "times_faster": before_s / after_s,
            "tilings": best._asdict(),
            "file": str(file),
        }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['capacity']:.3g}",
        f"{row['default_ms']:.2f}",
        f"{row['tuned_ms']:.2f}",
        f"{row['times_faster']:.3f}",
    )
