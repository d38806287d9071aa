"""What each of the engine's kernels is worth."""

import statistics
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from jobs.benchmarks.engine_blocks import EngineBlocks, engine_blocks, model_on_gpu, replaying
from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError
from mone.engine.kernels.gemm import num_processors
from mone.engine.tilings import Attending, Tilings, defaults_for

_CALLS = 20
_AS_IT_IS = "as it is"
_ONLINE = Attending(64, 64, 4, 2, whole=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Take one of the engine's kernels away at a time, and measure how much slower the blocks get.

    Blocks run on random tokens from CUDA graphs, in bfloat16, with this card's default tilings. What takes the place of
    a kernel is the one that was there before it. All rows of a capacity take turns; "times slower" compares within a
    turn.

    python -m jobs.benchmark kernels --preset base --batch-size 16 --capacity 0.2 0.3 0.4 1
    """

    model: str = ""
    """Model folder; without one, a --preset."""
    preset: str = "base"
    """tiny, small, base or large."""
    capacity: tuple[float, ...] = (0.2, 0.3, 0.4, 1.0)
    """Effective capacities."""
    batch_size: int = 16
    """Clips of a batch."""
    repeats: int = 7
    """Turns; odd, so that the median is one of them."""

    def measure(self) -> Report:
        """Run the benchmark."""
        if self.repeats < 1 or self.repeats % 2 == 0:
            raise UserError(f"--repeats must be odd, got {self.repeats}")
        model = model_on_gpu(self.model, self.preset, self.capacity, self.batch_size)
        rows = [
            row
            for capacity in tqdm(self.capacity, "kernels", unit="capacity")
            for row in _rows(engine_blocks(model, capacity, self.batch_size), capacity, self.repeats)
        ]
        header = ("without", "capacity", "ms", "min..max", "times slower", "min..max")
        table = aligned(header, [_cells(row) for row in rows])
        return Report(table=table, rows=rows, device=model.embed.weight.device)


def variants_of(start: Tilings, plain: Tilings, *, has_narrow: bool) -> dict[str, Tilings]:
    """Tilings as they are, then without one kind of kernel each, by its name; those that change nothing are left out.

    Args:
        start: As they are.
        plain: Where no kernel has warps with roles.
        has_narrow: Whether there are experts whose MLP is one launch.
    """
    found = {_AS_IT_IS: start}
    if start.attention.whole:
        found |= {
            "attention whose warps have roles": start._replace(attention=start.attention._replace(roles=False)),
            "attention of whole heads": start._replace(attention=_ONLINE),
        }
    if has_narrow:
        found |= {
            "LayerNorm beside products": start._replace(norm_inside=False),
            "narrow MLPs whose warps have roles": start._replace(narrow=plain.narrow),
            "narrow MLPs in one launch": start._replace(narrow=()),
            "all of these": start._replace(narrow=(), attention=_ONLINE),
        }
    return {name: tilings for name, tilings in found.items() if name == _AS_IT_IS or tilings != start}


def _rows(blocks: EngineBlocks, capacity: float, repeats: int) -> list[dict[str, Any]]:
    config, device, runs = blocks.model.config, blocks.x_SND.device, blocks.runs
    start, plain = (defaults_for(device, runs, config.dim, roles=roles) for roles in (True, False))
    hidden, processors = config.mlp_ratio * config.dim, num_processors(device)
    has_narrow = any(start.narrow_of(run.width, hidden, run.stop - run.start, processors) for run in runs)
    variants = variants_of(start, plain, has_narrow=has_narrow)
    calls = {name: replaying(lambda tilings=tilings: blocks(tilings)) for name, tilings in variants.items()}
    turns = [{name: seconds(_CALLS) for name, seconds in calls.items()} for _ in range(repeats + 1)][1:]
    return [_row(name, capacity, [turn[name] for turn in turns], [turn[_AS_IT_IS] for turn in turns]) for name in calls]


def _row(name: str, capacity: float, own_s: list[float], start_s: list[float]) -> dict[str, Any]:
    slower = [own / start for own, start in zip(own_s, start_s, strict=True)]
    return {
        "without": name,
        "capacity": capacity,
        "ms": statistics.median(own_s) * 1e3,
        "ms_repeats": [seconds * 1e3 for seconds in own_s],
        "times_slower": statistics.median(slower),
        "times_slower_min": min(slower),
        "times_slower_max": max(slower),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["without"],
        f"{row['capacity']:.3g}",
        f"{row['ms']:.2f}",
        f"{min(row['ms_repeats']):.2f}..{max(row['ms_repeats']):.2f}",
        f"{row['times_slower']:.3f}",
        f"{row['times_slower_min']:.3f}..{row['times_slower_max']:.3f}",
    )
