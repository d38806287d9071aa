"""The plot: top-1 against operations per clip, a line per method, bars and bands from the worst seed to the best."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.curve_rows import Row
from mone.baselines import METHODS
from mone.checkpoint import write_whole

# Text as outlines and no date: the same rows give the same file.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "mone",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# A method looks the same in every plot. Colours of Okabe and Ito (2008), which the colour-blind can tell apart, but for
# their yellow, which is too pale for a line; and a marker each, for prints without colour.
_LOOKS = {
    "dense": ("#000000", "s"),
    "mone": ("#0072B2", "o"),
    "random_router": ("#D55E00", "X"),
    "uniform": ("#CC79A7", "P"),
    "proportionate": ("#8C6D00", "d"),
    "submodel": ("#009E73", "^"),
    "token_drop": ("#E69F00", "v"),
    "tome": ("#56B4E9", "D"),
}
_DASHES = ("-", "--", ":", "-.")
_PANEL_IN = (6.4, 4.3)
_LEGEND_IN = 2.5


def draw_curves(rows: Sequence[Row], path: Path) -> Path:
    """Draw the rows, a panel for each set of clips, and write the file; the suffix decides the format."""
    sets = list(dict.fromkeys((row.series.data, row.series.split) for row in rows))
    width_in, height_in = _PANEL_IN
    with mpl.rc_context(_STYLE):
        size = ((width_in + _LEGEND_IN) * len(sets), height_in)
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        for axes, names in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
            _panel(axes, [row for row in rows if row.series[:2] == names])
        file, suffix = io.BytesIO(), path.suffix.removeprefix(".")
        figure.savefig(file, format=suffix, dpi=160, metadata={"Date": None} if suffix == "svg" else {"Software": None})
    return write_whole(path, file.getvalue())


def _panel(axes: Axes, rows: list[Row]) -> None:
    every = list(dict.fromkeys(row.series for row in rows))
    for series in every:
        alike = [other for other in every if other.method == series.method]
        label = series.name + f", {series.epochs} epochs" * (len({other.epochs for other in every}) > 1)
        _line(axes, [row for row in rows if row.series == series], label, alike.index(series))
    first = rows[0]
    dense_gflop, most_gflop = first.dense_flops_per_clip / 1e9, max(row.flops_per_clip for row in rows) / 1e9
    axes.set_xlim(0, 1.04 * max(dense_gflop, most_gflop))
    axes.set_xlabel("GFLOP per clip")
    axes.set_ylabel("top-1 accuracy, %")
    share = axes.secondary_xaxis("top", functions=(_times(100 / dense_gflop), _times(dense_gflop / 100)))
    share.set_xlabel("% of dense")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    name = Path(first.series.data).name or first.series.data
    title = f"{name}, {first.series.split}: {first.num_clips:,} clips; mean, min to max of {_runs(rows)}"
    axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda values: values * factor


def _runs(rows: list[Row]) -> str:
    counts = sorted({row.num_runs for row in rows})
    spoken = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{spoken} run{'s' * (counts[-1] > 1)}"


def _line(axes: Axes, rows: list[Row], label: str, variant: int) -> None:
    """One series; of several of a method the first is solid, the others are dashed and hollow."""
    series, dash = rows[0].series, _DASHES[variant % len(_DASHES)]
    colour, marker = _LOOKS[series.method]
    top1 = [100 * row.top1 for row in rows]
    low, high = [100 * row.top1_min for row in rows], [100 * row.top1_max for row in rows]
    if series.is_dense:
        axes.axhspan(low[0], high[0], color=colour, alpha=0.10, linewidth=0, zorder=1)
        axes.axhline(top1[0], color=colour, linestyle=dash, linewidth=1.0, zorder=1.5)
    bars = [[mean - end for mean, end in zip(top1, low, strict=True)], [e - m for m, e in zip(top1, high, strict=True)]]
    axes.errorbar(
        [row.flops_per_clip / 1e9 for row in rows],
        top1,
        yerr=None if all(row.num_runs == 1 for row in rows) else [[max(0.0, gap) for gap in side] for side in bars],
        label=label,
        color=colour,
        marker=marker,
        linestyle=dash,
        linewidth=1.6,
        markersize=6.5,
        markerfacecolor="white" if variant else colour,
        markeredgecolor=colour if variant else "white",
        markeredgewidth=1.2 if variant else 0.6,
        elinewidth=1.1,
        capsize=2.5,
        zorder=4 if series.method == "mone" else 3,
    )


assert _LOOKS.keys() == METHODS.keys()
