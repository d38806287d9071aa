"""Choosing tilings by measuring: one part of a block after the other, each against the best so far."""

from collections.abc import Callable
from typing import Any

from mone.engine.tilings import NARROW_ROLES, Attending, Tiling, Tilings

_PRODUCTS = (
    Tiling(128, 128, 64, 4, 3, 2, True),
    Tiling(128, 128, 64, 8, 3, 2, True),
    Tiling(128, 128, 64, 8, 4),
    Tiling(128, 128, 64, 4, 4),
    Tiling(128, 128, 64, 8, 3),
    Tiling(128, 256, 64, 8, 3, 1, True),
    Tiling(128, 256, 64, 8, 4, 1, True),
    Tiling(64, 256, 64, 4, 2, 2, True),
    Tiling(128, 128, 32, 8, 3),
    Tiling(64, 128, 64, 4, 3, 3),
    Tiling(64, 128, 64, 4, 4, 2),
)
_NARROW = (
    (),
    NARROW_ROLES,
    *[
        ((128, narrow), (192, wide))
        for narrow in (
            Tiling(128, 64, 64, 8, 3, 2),
            Tiling(64, 64, 64, 4, 2, 3),
            Tiling(128, 128, 64, 8, 3),
            Tiling(128, 128, 64, 8, 2),
        )
        for wide in (Tiling(128, 64, 64, 8, 2), Tiling(128, 128, 64, 8, 3), Tiling(64, 128, 64, 4, 2))
    ],
)
_ATTENTION = (
    Attending(128, 64, 8, 2),
    Attending(128, 64, 8, 2, roles=True),
    Attending(256, 64, 16, 2),
    Attending(64, 64, 4, 3, whole=False),
    Attending(64, 64, 4, 2, whole=False),
)
# In the order of their share of the time.
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "narrow": _NARROW,
    "norm_inside": (True, False),
    "up": _PRODUCTS,
    "down": _PRODUCTS,
    "qkv": _PRODUCTS,
    "out": _PRODUCTS,
    "attention": _ATTENTION,
}
# What is faster by less is noise, and the default is better known.
_LEAST_GAIN = 0.003


def fastest(
    seconds: Callable[[Tilings], float],
    start: Tilings,
    told: Callable[[str], object] = lambda _: None,
) -> tuple[Tilings, float]:
    """Search part by part; a candidate that does not run on this card is passed over.

    Args:
        seconds: Measures.
        start: What to begin with; runs.
        told: Takes a line for each part.

    Returns:
        The best, and its time in seconds.
    """
    best, best_s = start, seconds(start)
    for part, candidates in CANDIDATES.items():
        for candidate in candidates:
            trial = best._replace(**{part: candidate})
            if trial == best:
                continue
            try:
                trial_s = seconds(trial)
            except Exception:  # too much shared memory, or a compiler that does not know how
                continue
            if trial_s < best_s * (1 - _LEAST_GAIN):
                best, best_s = trial, trial_s
        told(f"{part}: {best_s * 1e3:.3f} ms with {getattr(best, part)}")
    return best, best_s
