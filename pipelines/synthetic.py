"""Motions: a labelled set of synthetic clips in which no single frame gives the class away.

Every clip shows a textured background, one textured object whose motion is the class (two for `crossing`),
and other objects that lie still, all filmed by a shaking, flickering, noisy camera. Objects, backgrounds and
cameras come from the same distributions in every class. The frames of a class and of its reverse (left and
right, growing and shrinking...) are alike as a set; their order tells the two apart.

Known limit: a model that knows a frame *and its index* can tell left from right, and up from down,
by position at either end of a clip (95 % of first frames, 55 % of middle ones), because an object that
will go left must start with room on its left. Single-frame baselines should look at the middle frame,
or at a random one.

Two clips of one seed and different labels share scene and camera: they differ in the motion (and, for
`crossing`, `appearing` and `vanishing`, in the number of still objects).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from pipelines import synthetic_scene as scene

MOTIONS: tuple[str, ...] = (
    *("left", "right", "up", "down", "clockwise", "counterclockwise"),
    *("growing", "shrinking", "appearing", "vanishing", "crossing", "bouncing"),
)

_STREAM = 20_240_719  # keys every generator; another value is another data set
_MOTION, _BACKGROUND, _CAMERA, _OBJECT, _DISTRACTOR = 0, 1, 2, 100, 200  # independent streams of one seed
_MAX_SPLIT = 2**39


@dataclass(kw_only=True, slots=True, frozen=True)
class MotionClip:
    """A rendered clip and what is true of it.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        label: one of MOTIONS.
        moving: bool [T, H, W], pixels covered by the object(s) whose motion defines the class. Empty in
            frames of `appearing` and `vanishing` where that object is invisible (opacity below 0.1).
    """

    frames: np.ndarray
    label: str
    moving: np.ndarray


def render(
    seed: int, *, label: str | None = None, num_frames: int = 16, size_px: int = 96, clutter: float = 1.0
) -> MotionClip:
    """Renders one clip; a pure function of its arguments.

    Args:
        seed: non-negative; names the clip.
        label: one of MOTIONS; None takes MOTIONS[seed % 12], so that consecutive seeds are balanced.
        num_frames: T, at least 2. More frames sample the same motion more finely.
        size_px: height and width, at least 32 (the smallest objects are then 5 px wide).
        clutter: 1 is the set as it is; towards 0 texture of the background, still objects, shake, flicker and noise
            fade away, down to one object before a plain wall. Easy clips are what a model starts to learn from.

    Raises:
        ValueError: for an unknown label, a negative seed, or a size out of range.
    """
    label = MOTIONS[seed % len(MOTIONS)] if label is None else label
    if label not in MOTIONS:
        raise ValueError(f"unknown motion {label!r}; known: {', '.join(MOTIONS)}")
    if seed < 0 or num_frames < 2 or size_px < 32 or not 0 <= clutter <= 1:
        raise ValueError(
            "need seed >= 0, num_frames >= 2, size_px >= 32, clutter in 0..1;"
            f" got {seed}, {num_frames}, {size_px}, {clutter}"
        )
    rng = _rng(seed, _MOTION)
    num_objects, coin = 2 + int(rng.uniform() < 0.3), int(rng.integers(2))
    moving = _TRAJECTORIES[label](_draw(rng, num_frames))
    still = _still_world(seed, round(clutter * _num_distractors(label, num_objects, coin)), size_px, clutter)
    world = np.repeat(still[None], num_frames, axis=0)
    for i, trajectory in enumerate(moving):
        scene.paint(world, scene.sprite(_rng(seed, _OBJECT + i)), trajectory, size_px=size_px)
    frames, covered = scene.film(world, _rng(seed, _CAMERA), size_px=size_px, clutter=clutter)
    return MotionClip(frames=frames, label=label, moving=covered)


def write_clip(clip: MotionClip, path: str | Path, *, fps: float = 8.0) -> None:
    """Writes the frames as an H.264 mp4 (libx264, yuv420p, crf 18, preset veryfast, one thread).

    Args:
        clip: of even height and width, which yuv420p needs.
        path: of the file to write; replaced if it exists.
        fps: frames per second.

    Raises:
        ValueError: for an odd height or width, or an fps that is not positive.
    """
    import av  # here, so that rendering needs numpy alone

    height_px, width_px = clip.frames.shape[1:3]
    if height_px % 2 or width_px % 2:
        raise ValueError(f"yuv420p needs even sides, got {width_px}x{height_px}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        stream.thread_count = 1  # x264's output depends on its thread count, and callers run many at once
        for pixels in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def split_seeds(split: str, count: int) -> range:
    """The first `count` seeds of a split; splits never meet, and each starts with MOTIONS[0].

    Args:
        split: "train", "val" or "test".
        count: how many, at most 2**39.

    Raises:
        ValueError: for an unknown split or a count out of range.
    """
    if split not in _SPLIT_STARTS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(_SPLIT_STARTS)}")
    if not 0 <= count <= _MAX_SPLIT:
        raise ValueError(f"count must be in 0..2**39, got {count}")
    start = _SPLIT_STARTS[split]
    return range(start, start + count)


def _multiple_of_motions(at_least: int) -> int:
    return -(-at_least // len(MOTIONS)) * len(MOTIONS)


_SPLIT_STARTS = {"train": 0, "val": _multiple_of_motions(2**40), "test": _multiple_of_motions(2**41)}


def _rng(seed: int, part: int) -> np.random.Generator:
    return np.random.default_rng([_STREAM, part, seed])


# --- what lies still ---


def _num_distractors(label: str, num_objects: int, coin: int) -> int:
    """Keeps the number of visible objects in a frame uninformative.

    `crossing` moves two objects, so one fewer lies still. In `appearing` and `vanishing` the object is
    missing from about half of the frames, so half of these clips get one more still object.
    """
    match label:
        case "crossing":
            return num_objects - 2
        case "appearing" | "vanishing":
            return num_objects - 1 + coin
        case _:
            return num_objects - 1


def _still_world(seed: int, num_distractors: int, size_px: int, clutter: float) -> np.ndarray:
    """Background and distractors, float32 [M, M, 4], no pixel marked as covered."""
    rng = _rng(seed, _BACKGROUND)
    side_px = size_px + 2 * scene.margin_px(size_px)
    colours = scene.texture(
        rng,
        size_px=side_px,
        num_cells=rng.uniform(4, 14),
        saturation=rng.uniform(0, 0.3),
        brightness=scene.BACKGROUND,
    )
    world = np.zeros((1, side_px, side_px, 4), np.float32)
    plain = colours.mean(axis=(0, 1))
    world[..., :3] = plain + np.float32(clutter) * (colours - plain)
    for i in range(num_distractors):
        rng = _rng(seed, _DISTRACTOR + i)
        scene.paint(world, scene.sprite(rng), _rest(rng), size_px=size_px)
    world[..., 3] = 0
    return world[0]


def _rest(rng: np.random.Generator) -> scene.Trajectory:
    """One frame of a still object.

    Its sizes reach as far as those of growing and shrinking objects, and half of them are half transparent
    like appearing and vanishing ones, so neither in one frame means anything.
    """
    diameter = 0.12 * (0.42 / 0.12) ** rng.uniform()
    x, y = rng.uniform(diameter / 2, 1 - diameter / 2, 2)
    opacity = rng.uniform(0.25, 0.9) if rng.uniform() < 0.5 else 1.0
    values = {"x": x, "y": y, "diameter": diameter, "angle_rad": rng.uniform(0, math.tau), "opacity": opacity}
    return scene.Trajectory(**{name: np.array([value]) for name, value in values.items()})


# --- what moves ---


@dataclass(kw_only=True, slots=True, frozen=True)
class _Draw:
    """Every random number of a motion, drawn alike for each class; lengths are shares of the frame side."""

    progress: np.ndarray  # float64 [T], 0 to 1: the eased clock of the motion
    fade: np.ndarray  # float64 [T], 0 to 1: a ramp with an onset of its own
    diameter: float
    partner_ratio: float  # the second object's diameter over the first's
    angle_rad: float
    partner_angle_rad: float
    place: np.ndarray  # float64 [2], where in the room that the path leaves, 0 to 1
    travel: float
    drift: float
    heading_rad: float
    sweep_rad: float  # of the arc of a circling object
    growth: float  # last scale over first
    turn: float  # share of the path at which a bouncing object meets its wall


def _draw(rng: np.random.Generator, num_frames: int) -> _Draw:
    clock = np.linspace(0, 1, num_frames)
    return _Draw(
        progress=_eased(rng, clock),
        fade=_ramp(rng, clock),
        diameter=rng.uniform(0.16, 0.30),
        partner_ratio=rng.uniform(0.85, 1.15),
        angle_rad=rng.uniform(0, math.tau),
        partner_angle_rad=rng.uniform(0, math.tau),
        place=rng.uniform(size=2),
        travel=rng.uniform(0.25, 0.55),
        drift=rng.uniform(-0.04, 0.04),
        heading_rad=rng.uniform(0, math.tau),
        sweep_rad=math.radians(rng.uniform(220, 340)),
        growth=rng.uniform(1.6, 2.4),
        turn=rng.uniform(0.42, 0.58),
    )


def _eased(rng: np.random.Generator, clock: np.ndarray) -> np.ndarray:
    """Constant, accelerating, decelerating, late or early; as a whole unchanged by playing it backwards."""
    power, wait = rng.uniform(1.3, 2.0), rng.uniform(0.1, 0.3)
    curves: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda t: t,
        lambda t: t**power,
        lambda t: 1 - (1 - t) ** power,
        lambda t: np.maximum(0, t - wait) / (1 - wait),
        lambda t: np.minimum(1, t / (1 - wait)),
    )
    return curves[rng.integers(len(curves))](clock)


def _ramp(rng: np.random.Generator, clock: np.ndarray) -> np.ndarray:
    """From 0 to 1 around the middle of the clip on average, so a ramp and its reverse are alike in shares."""
    duration = rng.uniform(0.2, 0.5)
    onset = rng.uniform(0.1, 0.9 - duration)
    return np.clip((clock - onset) / duration, 0, 1)


@dataclass(kw_only=True, slots=True, frozen=True)
class _Path:
    """An object's changes from its resting state; scalars hold for all frames."""

    dx: np.ndarray | float = 0.0
    dy: np.ndarray | float = 0.0
    scale: np.ndarray | float = 1.0
    opacity: np.ndarray | float = 1.0


def _placed(draw: _Draw, *paths: _Path) -> tuple[scene.Trajectory, ...]:
    """Puts the paths, as one rigid figure, uniformly wherever all objects stay inside the frame."""
    diameters = (draw.diameter, draw.diameter * draw.partner_ratio)
    angles_rad = (draw.angle_rad, draw.partner_angle_rad)
    radii = [path.scale * d / 2 for path, d in zip(paths, diameters, strict=False)]
    shift_x = _fit([p.dx for p in paths], radii, draw.place[0])
    shift_y = _fit([p.dy for p in paths], radii, draw.place[1])
    still = np.zeros_like(draw.progress)
    return tuple(
        scene.Trajectory(
            x=still + path.dx + shift_x,
            y=still + path.dy + shift_y,
            diameter=still + 2 * radius,
            angle_rad=still + angle_rad,
            opacity=still + path.opacity,
        )
        for path, radius, angle_rad in zip(paths, radii, angles_rad, strict=False)
    )


def _fit(offsets: Sequence, radii: Sequence, place: float) -> float:
    """The shift that puts offsets with their radii inside the frame and clear of the shaking edge."""
    low = min(float(np.min(o - r)) for o, r in zip(offsets, radii, strict=True))
    high = max(float(np.max(o + r)) for o, r in zip(offsets, radii, strict=True))
    first, last = scene.SHAKE_SHARE - low, 1 - scene.SHAKE_SHARE - high
    return first + place * (last - first)


def _moving(draw: _Draw, heading_rad: float, along: np.ndarray) -> tuple[scene.Trajectory, ...]:
    """Along a heading (0 is right, a quarter turn is down), drifting a little to the side."""
    cosine, sine = math.cos(heading_rad), math.sin(heading_rad)
    forward, sideways = draw.travel * along, draw.drift * draw.progress
    return _placed(draw, _Path(dx=cosine * forward - sine * sideways, dy=sine * forward + cosine * sideways))


def _bouncing(draw: _Draw) -> tuple[scene.Trajectory, ...]:
    """As far in all as the objects that only go one way, and as fast, but there and back."""
    quarter = math.floor(draw.heading_rad / (math.pi / 2)) * (math.pi / 2)
    return _moving(draw, quarter, draw.turn - np.abs(draw.progress - draw.turn))


def _circling(draw: _Draw, progress: np.ndarray) -> tuple[scene.Trajectory, ...]:
    """Most of a turn around a centre; on screen y points down, so angles grow clockwise."""
    angle = draw.heading_rad + draw.sweep_rad * progress
    radius = 0.4 * draw.travel
    return _placed(draw, _Path(dx=radius * np.cos(angle), dy=radius * np.sin(angle)))


def _crossing(draw: _Draw) -> tuple[scene.Trajectory, ...]:
    """Two objects, point-symmetric about the place where they meet and far enough apart to start clear."""
    largest = draw.diameter * max(1, draw.partner_ratio)
    forward = (draw.progress - 0.5) * max(draw.travel, 1.25 * largest)
    cosine, sine = math.cos(draw.heading_rad), math.sin(draw.heading_rad)
    dx, dy = cosine * forward - sine * draw.drift / 2, sine * forward + cosine * draw.drift / 2
    return _placed(draw, _Path(dx=dx, dy=dy), _Path(dx=-dx, dy=-dy))


def _resized(draw: _Draw, progress: np.ndarray) -> tuple[scene.Trajectory, ...]:
    return _placed(draw, _Path(scale=draw.growth ** (progress - 0.5)))


_TRAJECTORIES: dict[str, Callable[[_Draw], tuple[scene.Trajectory, ...]]] = {
    "left": lambda draw: _moving(draw, math.pi, draw.progress),
    "right": lambda draw: _moving(draw, 0.0, draw.progress),
    "up": lambda draw: _moving(draw, -math.pi / 2, draw.progress),
    "down": lambda draw: _moving(draw, math.pi / 2, draw.progress),
    "clockwise": lambda draw: _circling(draw, draw.progress),
    "counterclockwise": lambda draw: _circling(draw, -draw.progress),
    "growing": lambda draw: _resized(draw, draw.progress),
    "shrinking": lambda draw: _resized(draw, 1 - draw.progress),
    "appearing": lambda draw: _placed(draw, _Path(opacity=draw.fade)),
    "vanishing": lambda draw: _placed(draw, _Path(opacity=1 - draw.fade)),
    "crossing": _crossing,
    "bouncing": _bouncing,
}
