"""Which tilings are fastest on this card; kept for processes that start later."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device, load_model
from mone.capacity import check_capacity
from mone.config import preset
from mone.engine.fused import run_on_rows
from mone.engine.graphs import captured
from mone.engine.rows import runs_of
from mone.engine.tilings import Tilings, defaults_for, keep, key_of
from mone.engine.tokens import Tokens
from mone.engine.tuning import fastest
from mone.model import ViViT
from mone.nested import segments_of

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
        device = choose_device("")
        if device.type != "cuda":
            raise UserError("tilings are those of a GPU, and there is none")
        if self.batch_size < 1:
            raise UserError("--batch-size must be at least 1")
        with checking_input():
            config = load_model(self.model).config if self.model else preset(self.preset, num_classes=400)
            for capacity in self.capacity:
                check_capacity(capacity, config.num_experts)
            if config.joint:
                raise ValueError("a joint encoder has no tilings of its own yet: its defaults serve")
        with device:
            model = ViViT(config).eval().requires_grad_(False).bfloat16()
        rows = [self._row(model, capacity, device) for capacity in tqdm(self.capacity, "tune", unit="capacity")]
        header = ("capacity", "default ms", "tuned ms", "times faster")
        table = aligned(header, [_cells(row) for row in rows])
        return Report(table=f"{rows[0]['file']}\n{table}", rows=rows, device=device)

    def _row(self, model: ViViT, capacity: float, device: torch.device) -> dict[str, Any]:
        config = model.config
        classes = config.num_class_tokens
        sequences = self.batch_size * config.num_indices
        counts = config.token_counts(capacity)
        segments = segments_of(counts, config.widths, classes)
        runs = runs_of(segments, sequences)
        x_SND = torch.randn(sequences, sum(counts) + classes, config.dim, dtype=torch.bfloat16, device=device)
        gain_LSN1 = torch.ones(config.depth, *x_SND.shape[:2], 1, dtype=torch.bfloat16, device=device)

        def seconds(tilings: Tilings) -> float:
            blocks, tokens = model.encoder.blocks, Tokens(x_SND)
            with torch.inference_mode():
                return _seconds(lambda: run_on_rows(blocks, tokens, segments, gain_LSN1, None, classes, tilings))

        start = defaults_for(device, runs, config.dim)
        best, _ = fastest(seconds, start, tqdm.write)
        before_s, after_s = seconds(start), seconds(best)  # again, side by side
        file = keep(key_of(device, runs, config.dim), best)
        return {
            "capacity": capacity,
            "default_ms": before_s * 1e3,
            "tuned_ms": after_s * 1e3,
            "times_faster": before_s / after_s,
            "tilings": best._asdict(),
            "file": str(file),
        }


def _seconds(run: Callable[[], object]) -> float:
    """Of a call from a CUDA graph, where the host does not count; the median of a few means."""
    graph, _ = captured(run)
    graph.replay()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(times)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['capacity']:.3g}",
        f"{row['default_ms']:.2f}",
        f"{row['tuned_ms']:.2f}",
        f"{row['times_faster']:.3f}",
    )
