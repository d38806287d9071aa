"""A small 2-D renderer: textures, shapes, sprites, trajectories, and the compositor that paints them.

Positions and diameters are shares of the frame side; x points right and y down, so a growing angle turns
clockwise as a viewer sees it. Colours are float32 in 0..1 until the camera turns them into bytes.

Only arithmetic that IEEE 754 fixes is used where a choice existed (triangle waves rather than sines, gathers
rather than matrix products), so that a seed gives the same bytes on every machine that numpy treats alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SPRITE_TEXELS = 96  # about four texels a pixel at 96 px frames: nearest-texel sampling stays under 1/4 px
EDGE_SOFTNESS = 0.12  # in sprite radii, not pixels: an edge then says nothing about how often it was rescaled
SHAKE_SHARE = 0.008  # the camera's largest excursion
VISIBLE_OPACITY = 0.1  # below it sensor noise hides the object, and its pixels don't count as covered

Brightness = tuple[tuple[float, float], tuple[float, float]]
# Objects stand out from backgrounds, as things that people film mostly do, moving or still. Without this a model has to
# find objects by their motion before it can learn anything from their motion, and small ones never start to.
BACKGROUND: Brightness = ((0.18, 0.245), (0.245, 0.335))
OBJECT: Brightness = ((0.40, 0.60), (0.80, 1.00))

Coverage = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]
Pattern = Callable[[np.random.Generator, int, float], np.ndarray]


@dataclass(kw_only=True, slots=True, frozen=True)
class Trajectory:
    """Where an object is and how it looks in each frame; every array is float64 [T].

    Attributes:
        x: centre, shares of the frame width.
        y: centre, shares of the frame height, downwards.
        diameter: of the circle around the object, shares of the frame side.
        angle_rad: rotation, clockwise on screen.
        opacity: 0 (not there) to 1 (nothing shines through).
    """

    x: np.ndarray
    y: np.ndarray
    diameter: np.ndarray
    angle_rad: np.ndarray
    opacity: np.ndarray


# --- textures ---


def texture(
    rng: np.random.Generator, *, size_px: int, num_cells: float, saturation: float, brightness: Brightness
) -> np.ndarray:
    """Draws a two-coloured pattern (value noise, grating or checkers) under a slanting light.

    The light breaks rotational symmetry: even a cross of checkers shows which way it turns.

    Args:
        rng: source of every choice.
        size_px: side N.
        num_cells: about how many stripes, squares or blobs lie side by side.
        saturation: of both colours, 0 (grey) to 1.
        brightness: ranges of the darker and of the brighter colour's value.

    Returns:
        float32 [N, N, 3] in 0..1.
    """
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng, size_px, num_cells)
    dark, bright = (_colour(rng, saturation, rng.uniform(*values)) for values in brightness)
    light = 0.8 + 0.2 * np.clip(_slanted(rng, size_px), -1, 1)
    return (dark + pattern[..., None] * (bright - dark)) * light[..., None]


def _colour(rng: np.random.Generator, saturation: float, value: float) -> np.ndarray:
    """A random hue as HSV defines it: one channel full, one empty, one between, then saturation and value."""
    hue = rng.permutation(np.array([0.0, rng.uniform(), 1.0]))
    return (value * (1 - saturation * hue)).astype(np.float32)


def _slanted(rng: np.random.Generator, size_px: int, *, angle_rad: float | None = None) -> np.ndarray:
    """float32 [N, N]: the coordinate along a direction (random if none is given), about -1 to 1."""
    angle_rad = rng.uniform(0, math.tau) if angle_rad is None else angle_rad
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    return axis * np.float32(math.cos(angle_rad)) + axis[:, None] * np.float32(math.sin(angle_rad))


def _wave(rng: np.random.Generator, along: np.ndarray, num_cells: float) -> np.ndarray:
    """Stripes across `along`, from a triangle wave (smooth) to nearly a square wave (crisp)."""
    phase = along * np.float32(num_cells / 2) + np.float32(rng.uniform())
    triangle = np.abs(2 * (phase - np.floor(phase)) - 1)
    return np.clip((triangle - 0.5) * np.float32(rng.uniform(1, 4)) + 0.5, 0, 1)


def _grating(rng: np.random.Generator, size_px: int, num_cells: float) -> np.ndarray:
    return _wave(rng, _slanted(rng, size_px), num_cells)


def _checkers(rng: np.random.Generator, size_px: int, num_cells: float) -> np.ndarray:
    """Two unequal gratings at right angles, joined by a soft exclusive or."""
    angle_rad = rng.uniform(0, math.tau)
    a = _wave(rng, _slanted(rng, size_px, angle_rad=angle_rad), num_cells / 2)
    b = _wave(rng, _slanted(rng, size_px, angle_rad=angle_rad + math.pi / 2), num_cells * rng.uniform(0.5, 1))
    return a * b + (1 - a) * (1 - b)


def _value_noise(rng: np.random.Generator, size_px: int, num_cells: float) -> np.ndarray:
    """Three octaves of interpolated random lattices, coarser along one axis than along the other."""
    rows, columns = rng.permutation(np.array([num_cells, num_cells * rng.uniform(0.4, 0.8)]))
    noise = np.zeros((size_px, size_px), np.float32)
    for octave in range(3):
        lattice = rng.random((int(rows * 2**octave) + 2, int(columns * 2**octave) + 2), dtype=np.float32)
        noise += _stretch(_stretch(lattice, size_px).T, size_px).T * np.float32(0.5**octave)
    noise -= noise.min()
    return noise / noise.max()


def _stretch(lattice: np.ndarray, size_px: int) -> np.ndarray:
    """Interpolates the rows of a lattice linearly: [n, M] to [N, M]."""
    position = np.linspace(0, len(lattice) - 1, size_px, endpoint=False)
    row = position.astype(np.intp)
    share = (position - row).astype(np.float32)[:, None]
    return lattice[row] * (1 - share) + lattice[row + 1] * share


_PATTERNS: tuple[Pattern, ...] = (_grating, _checkers, _value_noise)


# --- shapes: how far inside a point of the unit disc lies (negative: outside), in radii ---


def _ellipse(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    aspect = rng.uniform(0.5, 0.8)
    return (1 - np.sqrt(u**2 + (v / aspect) ** 2)) * aspect


def _rectangle(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    corner_rad = rng.uniform(math.pi / 7, math.pi / 4)
    return np.minimum(math.cos(corner_rad) - np.abs(u), math.sin(corner_rad) - np.abs(v))


def _triangle(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    slant = math.sqrt(0.75)
    return 0.5 - np.maximum(v, np.abs(u) * slant - v * 0.5)


def _star(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turn = np.arctan2(v, u) / math.tau * rng.integers(4, 7)
    spike = np.abs(2 * (turn - np.floor(turn)) - 1)
    return (0.5 + 0.5 * spike - np.hypot(u, v)) * 0.6


def _ring(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Open on one side: a closed ring with a coarse texture hardly shows that it turns."""
    radius, half_gap = np.hypot(u, v), rng.uniform(0.2, 0.4)
    closed = np.minimum(1 - radius, radius - rng.uniform(0.35, 0.5))
    return np.minimum(closed, np.maximum(np.abs(v) - half_gap, -u))


def _cross(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    arm = rng.uniform(0.3, 0.45)
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.minimum(0.93 - long, arm - short)


_SHAPES: tuple[Coverage, ...] = (_ellipse, _rectangle, _triangle, _star, _ring, _cross)


def sprite(rng: np.random.Generator) -> np.ndarray:
    """Draws an object: a random shape cut out of a random saturated texture.

    Returns:
        float32 [N, N, 4]: red, green, blue, coverage (1 inside, soft at the edge), N = SPRITE_TEXELS.
    """
    u = np.linspace(-1, 1, SPRITE_TEXELS, dtype=np.float32)
    inside = _SHAPES[rng.integers(len(_SHAPES))](rng, u, u[:, None])
    coverage = np.clip(inside / EDGE_SOFTNESS + 0.5, 0, 1)
    colours = texture(
        rng,
        size_px=SPRITE_TEXELS,
        num_cells=rng.uniform(2, 4.5),
        saturation=rng.uniform(0.4, 0.8),
        brightness=OBJECT,
    )
    return np.concatenate([colours, coverage[..., None]], axis=-1, dtype=np.float32)


# --- compositor ---


def margin_px(size_px: int) -> int:
    """How far the world reaches beyond the frame on each side, so that the shaking camera never leaves it."""
    return math.ceil(size_px * SHAKE_SHARE) + 1


def paint(world: np.ndarray, sprite_rgba: np.ndarray, trajectory: Trajectory, *, size_px: int) -> None:
    """Blends an object into every frame of the world, in place.

    Args:
        world: float32 [T, M, M, 4], M = size_px + 2 * margin_px(size_px): red, green, blue, and the
            coverage by whatever was painted (with an opacity of at least VISIBLE_OPACITY).
        sprite_rgba: from `sprite`.
        trajectory: of T frames.
        size_px: side of the frame.
    """
    margin = margin_px(size_px)
    texels = sprite_rgba.reshape(-1, 4)
    for t, frame in enumerate(world):
        opacity = float(trajectory.opacity[t])
        if opacity <= 0:
            continue
        x_px, y_px = (margin + size_px * float(c[t]) for c in (trajectory.x, trajectory.y))
        radius_px = size_px * float(trajectory.diameter[t]) / 2
        box = frame[_span(y_px, radius_px, len(frame)), _span(x_px, radius_px, len(frame))]
        rows = _centres(y_px, radius_px, len(frame))
        columns = _centres(x_px, radius_px, len(frame))
        index, hit = _texel_index(columns, rows, radius_px, float(trajectory.angle_rad[t]))
        rgba = texels[index]
        coverage = rgba[..., 3:] * hit[..., None]
        box[..., :3] += coverage * np.float32(opacity) * (rgba[..., :3] - box[..., :3])
        if opacity >= VISIBLE_OPACITY:
            np.maximum(box[..., 3:], coverage, out=box[..., 3:])


def _span(centre_px: float, radius_px: float, limit_px: int) -> slice:
    """The pixels that a disc can touch along one axis."""
    return slice(max(0, math.floor(centre_px - radius_px)), min(limit_px, math.ceil(centre_px + radius_px)))


def _centres(centre_px: float, radius_px: float, limit_px: int) -> np.ndarray:
    """The centres of those pixels, counted from the disc's centre; float32."""
    span = _span(centre_px, radius_px, limit_px)
    return (np.arange(span.start, span.stop) + (0.5 - centre_px)).astype(np.float32)


def _texel_index(dx: np.ndarray, dy: np.ndarray, radius_px: float, angle_rad: float):
    """Undoes rotation and scale: the nearest texel of each pixel (intp [h, w]) and whether there is one."""
    scale = SPRITE_TEXELS / (2 * radius_px)
    cosine, sine = np.float32(math.cos(angle_rad) * scale), np.float32(math.sin(angle_rad) * scale)
    half = np.float32(SPRITE_TEXELS / 2)
    u = (dx * cosine + dy[:, None] * sine + half).astype(np.intp)
    v = (dy[:, None] * cosine - dx * sine + half).astype(np.intp)
    last = SPRITE_TEXELS - 1
    hit = (u > 0) & (u < last) & (v > 0) & (v < last)
    return np.clip(v, 0, last) * SPRITE_TEXELS + np.clip(u, 0, last), hit


def film(world: np.ndarray, rng: np.random.Generator, *, size_px: int, clutter: float) -> tuple[np.ndarray, np.ndarray]:
    """Looks at the world through a camera that shakes, flickers and has a noisy sensor.

    Args:
        world: float32 [T, M, M, 4], as `paint` leaves it.
        rng: source of shake, flicker and noise.
        size_px: side S of the frame.
        clutter: factor on shake, flicker and noise, 0 to 1.

    Returns:
        frames uint8 [T, S, S, 3], and bool [T, S, S]: the pixels at least half covered by painted objects.
    """
    gain = 1 + clutter * rng.uniform(-0.011, 0.011, len(world))
    noise_sigma = clutter * rng.uniform(1.2, 3.5)
    seen = _shifted(world, clutter * _shake(rng, len(world)) * size_px + margin_px(size_px), size_px)
    colours = seen[..., :3] * (255 * gain).astype(np.float32)[:, None, None, None]
    noise = rng.standard_normal(colours.shape, dtype=np.float32)
    noise *= np.float32(noise_sigma)
    noise += colours
    np.clip(np.rint(noise, out=noise), 0, 255, out=noise)
    return noise.astype(np.uint8), seen[..., 3] >= 0.5


def _shake(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """A smoothed random walk, float64 [T, 2] (x, y), whose excursions stay within SHAKE_SHARE."""
    steps = rng.standard_normal((num_frames + 2, 2))
    walk = np.cumsum(steps[:-2] + steps[1:-1] + steps[2:], axis=0)
    walk -= (walk.min(axis=0) + walk.max(axis=0)) / 2
    peak = max(float(np.abs(walk).max()), 1e-9)
    return walk * (rng.uniform(0, SHAKE_SHARE) / peak)


def _shifted(world: np.ndarray, corner_px: np.ndarray, size_px: int) -> np.ndarray:
    """Cuts a window out of each frame at a fractional corner, by bilinear interpolation: [T, S, S, 4]."""
    seen = np.empty((len(world), size_px, size_px, world.shape[-1]), np.float32)
    for t, (x, y) in enumerate(corner_px):
        column, row = int(x), int(y)
        window = world[t, row : row + size_px + 1, column : column + size_px + 1]
        wide = window[:, :-1] + np.float32(x - column) * (window[:, 1:] - window[:, :-1])
        seen[t] = wide[:-1] + np.float32(y - row) * (wide[1:] - wide[:-1])
    return seen
