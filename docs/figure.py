"""The figure of docs/mone.md: nested slices of one weight, a real clip's expert map, the tokens in expert-major order.

python -m docs.figure            # writes docs/mone.svg
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mone.capacity import effective_capacity
from mone.checkpoint import read_checkpoint
from mone.config import ModelConfig
from pipelines.archive import Video
from pipelines.decode import decode_clips
from pipelines.decoded import Clip
from pipelines.manifest import plan_video, source_of
from pipelines.patches import view_of
from pipelines.preview import draw, expert_colours, expert_maps
from pipelines.timeline import ClipPlan
from pipelines.view import View

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "bundled/motions_model"
CLIP = ROOT / "bundled/clips/motions/crossing_2199023255566.mp4"  # both objects are easy to see
CAPACITY = 0.4
MOMENTS = (0, 2, 4, 7)  # temporal indices
PICTURE_PX = 100

# Inches, which are also the units of the one axes that covers the figure.
WIDTH, HEIGHT = 10.4, 3.3
TITLE_Y, TOP_Y, BOTTOM_Y = 3.08, 2.60, 0.22
# Text as outlines and no date: the file is the same wherever it is shown, and whenever it is made.
STYLE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "mone", "font.size": 8.5, "font.family": "DejaVu Sans"}
GREY, LIGHT = "0.35", "0.90"


def make_figure(path: Path) -> Path:
    """Draw the figure and write it; the suffix decides the format.

    Raises:
        DecodeFailure: The clip cannot be decoded.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.set_axis_off()
        checkpoint = read_checkpoint(MODEL)
        config, colours = checkpoint.config, expert_colours(checkpoint.config.num_experts) / 255
        frames_THWC, shown_THWC = (_decode(config, size_px) for size_px in (config.height_px, PICTURE_PX))
        maps_FRC = expert_maps(checkpoint.build(), frames_THWC, CAPACITY)
        _slices(axes, 0.2, config, colours)
        _strip(axes, 3.62, config, colours, shown_THWC, maps_FRC)
        _segments(axes, 7.9, config, colours, maps_FRC[MOMENTS[0]])
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _decode(config: ModelConfig, size_px: int) -> np.ndarray:
    (clip,) = plan_video(Video(uri=str(CLIP)), ClipPlan(span_s=config.span_s))
    view = View(num_frames=view_of(config).num_frames, height_px=size_px, width_px=size_px)
    outcome = decode_clips(source_of(clip), [(clip.start_s, clip.end_s)], view)[0]
    if not isinstance(outcome, Clip):
        raise outcome
    return outcome.frames_THWC


def _title(axes: Axes, x: float, title: str, line: str) -> None:
    axes.text(x, TITLE_Y, title, fontsize=10, fontweight="bold", va="center")
    axes.text(x, TITLE_Y - 0.24, line, color=GREY, va="center")


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: Any, **style: Any) -> None:
    style = {"edgecolor": "white", "linewidth": 0.8} | style
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, **style))


def _slices(axes: Axes, x: float, config: ModelConfig, colours: np.ndarray) -> None:
    """Two weights as torch stores them, [out, in], with a bar for what each expert uses of it."""
    _title(axes, x, "1  One weight, four nested experts", "an expert of width d uses the slice up to d")
    side, bar, top = 1.05, 0.08, TOP_Y - 0.2
    left, right = x, x + 1.52
    axes.text(left, TOP_Y - 0.06, "Q, K, V and MLP in", va="center")
    axes.text(right, TOP_Y - 0.06, "attention and MLP out", va="center")
    axes.text(left + side / 2, top - side - 0.12, "input features", color=GREY, ha="center", va="center")
    axes.text(right - 0.12, top - side / 2, "output features", color=GREY, ha="center", va="center", rotation=90)
    for expert, width in reversed(list(enumerate(config.widths))):
        length, colour = side * width / config.dim, colours[expert]
        _box(axes, left, top - side, length, side, colour)
        _box(axes, right, top - length, side, length, colour)
        y = top - side - 0.42 - 0.2 * expert
        _box(axes, left, y, length, bar, colour)
        axes.text(left + length + 0.07, y + bar / 2 - 0.01, _name(config, expert), va="center")
        _box(axes, right + side + 0.07 + 0.12 * expert, top - length, bar, length, colour)


def _name(config: ModelConfig, expert: int) -> str:
    divisor = config.dim // config.widths[expert]
    return "D" if divisor == 1 else f"D/{divisor}"


def _strip(
    axes: Axes, x: float, config: ModelConfig, colours: np.ndarray, shown_THWC: np.ndarray, maps_FRC: np.ndarray
) -> None:
    """Frames of the clip above, the experts of their patches below."""
    rows, columns = config.grid
    _title(
        axes,
        x,
        "2  Routed once, frame by frame",
        f"a bundled clip at capacity {CAPACITY:g}, {rows} x {columns} tokens a frame",
    )
    side, gap = 0.93, 0.07
    for column, moment in enumerate(MOMENTS):
        first = moment * config.tubelet_frames
        frame_HWC = shown_THWC[first]
        left = x + column * (side + gap)
        for row, picture in enumerate((frame_HWC, draw(frame_HWC, maps_FRC[moment], config.num_experts))):
            upper = TOP_Y - row * (side + gap)
            axes.imshow(picture, extent=(left, left + side, upper - side, upper), interpolation="none")
        last = first + config.tubelet_frames - 1
        caption_y = TOP_Y - 2 * side - gap - 0.12
        axes.text(left + side / 2, caption_y, f"frames {first}, {last}", color=GREY, ha="center", va="center")
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")  # imshow changes them
    for expert, colour in enumerate(colours):
        left = x + expert * (side + gap)
        _box(axes, left, BOTTOM_Y - 0.06, 0.16, 0.12, colour)
        count = int((maps_FRC[MOMENTS[0]] == expert).sum())
        axes.text(left + 0.22, BOTTOM_Y - 0.01, f"{_name(config, expert)}: {count}", va="center")


def _segments(axes: Axes, x: float, config: ModelConfig, colours: np.ndarray, map_RC: np.ndarray) -> None:
    """Tokens of one frame sorted by expert: heights are counts, widths are features."""
    counts = tuple(np.bincount(map_RC.ravel(), minlength=config.num_experts).tolist())
    _title(axes, x, "3  Sorted once, expert-major", f"a frame: {sum(counts)} tokens, D = {config.dim}")
    width, height, y = 1.25, 1.93, TOP_Y
    for count, expert_width, colour in zip(counts, config.widths, colours, strict=True):
        tall = height * count / sum(counts)
        y -= tall
        _box(axes, x, y, width, tall, LIGHT)
        _box(axes, x, y, width * expert_width / config.dim, tall, colour)
        axes.text(x + width + 0.08, y + tall / 2, f"{count} tokens\nwidth {expert_width}", va="center", linespacing=1.1)
    used = effective_capacity(counts)
    axes.text(x, BOTTOM_Y + 0.2, f"coloured: {used:.1%} of the linear work", color=GREY, va="center")
    axes.text(x, BOTTOM_Y, "grey: features that pass unchanged", color=GREY, va="center")


def main() -> int:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).with_name("mone.svg"))
    print(make_figure(parser.parse_args().path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
