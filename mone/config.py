"""Sizes of a model: the one place where widths, depths and token counts are decided and checked."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A ViViT factorised encoder whose spatial blocks are Mixtures of Nested Experts.

    The defaults are ViViT-FE-B/16x2 on 32 frames (ViViT, section 4.1). Saved as config.json beside the weights.

    Attributes:
        num_classes: Size of the classifier.
        num_frames: Frames T of a clip.
        height_px, width_px: Size of a frame.
        tubelet_frames, tubelet_px: A token covers tubelet_frames x tubelet_px x tubelet_px pixels.
        dim: Model dimension D, the width of the largest expert.
        num_heads: Attention heads; they split D, so nesting cuts through heads only in the projections.
        depth: Spatial blocks (nested).
        temporal_depth: Temporal blocks (always dense; MoNE section 4.2).
        mlp_ratio: Hidden width of the MLP over D. The hidden width is never nested (MoNE appendix A.1).
        num_experts: Experts E, of widths D / 2^(E-1), ..., D / 2, D (MoNE section 3.1).
        pooling: What the spatial encoder hands on for a frame: its class token, or the mean of its tokens. The
            paper leaves open whether a class token is routed; here it always takes the full expert, since it is one
            token and all others report to it.
        router: "learned" is the paper's; "motion" adds a prior from frame differences to it; "random" gives every token
            a pseudo-random preference, the baseline that a learned router has to beat.
        pixels: How uint8 becomes float. "scaled" is x / 127.5 - 1, as most public weights expect. "centred" takes
            off the frame's mean (one number) and divides by 64: a model trained from scratch on little data starts to
            learn much sooner when the common brightness does not drown what differs.
        span_s: Seconds of video that a training clip spanned, the default span when an archive is planned.
    """

    num_classes: int
    num_frames: int = 32
    height_px: int = 224
    width_px: int = 224
    tubelet_frames: int = 2
    tubelet_px: int = 16
    dim: int = 768
    num_heads: int = 12
    depth: int = 12
    temporal_depth: int = 4
    mlp_ratio: int = 4
    num_experts: int = 4
    pooling: Literal["cls", "mean"] = "cls"
    router: Literal["learned", "motion", "random"] = "learned"
    pixels: Literal["scaled", "centred"] = "scaled"
    span_s: float = 2.56

    def __post_init__(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: A size that does not fit the others, with the values.
        """
        sizes = dataclasses.asdict(self)
        for name, kind in self.__annotations__.items():
            value = sizes[name]
            if kind in (int, float) and (type(value) not in {kind, int} or not 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive {kind.__name__}, got {value!r}")
        self._require_multiple("num_frames", "tubelet_frames")
        self._require_multiple("height_px", "tubelet_px")
        self._require_multiple("width_px", "tubelet_px")
        self._require_multiple("dim", "num_heads")
        if self.dim % 2 ** (self.num_experts - 1):
            raise ValueError(
                f"dim {self.dim} cannot be halved {self.num_experts - 1} times for {self.num_experts} experts"
            )
        if self.router == "motion" and self.tubelet_frames < 2:
            raise ValueError("router 'motion' compares the frames of a tubelet, so tubelet_frames must be at least 2")
        choices = {
            "pooling": ("cls", "mean"),
            "router": ("learned", "motion", "random"),
            "pixels": ("scaled", "centred"),
        }
        for name, allowed in choices.items():
            if sizes[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {sizes[name]!r}")

    def _require_multiple(self, name: str, divisor: str) -> None:
        if getattr(self, name) % getattr(self, divisor):
            raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {divisor} {getattr(self, divisor)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Expert widths d_1 < ... < d_E = D (MoNE section 3.1)."""
        return tuple(self.dim >> shift for shift in reversed(range(self.num_experts)))

    @property
    def num_indices(self) -> int:
        """F: temporal indices of a clip, one per tubelet_frames frames."""
        return self.num_frames // self.tubelet_frames

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        return self.height_px // self.tubelet_px, self.width_px // self.tubelet_px

    @property
    def num_tokens(self) -> int:
        """N: routed tokens of one temporal index (a class token is not among them)."""
        rows, columns = self.grid
        return rows * columns

    @property
    def patch_values(self) -> int:
        """P: uint8 values of one token."""
        return self.tubelet_frames * self.tubelet_px**2 * 3

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Build a config from parsed JSON.

        Raises:
            ValueError: A key that is missing or unknown, or a size that does not fit; named.
        """
        if not isinstance(values, dict):
            raise ValueError(f"an object is needed, not {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown keys {', '.join(map(repr, sorted(unknown)))}")
        if "num_classes" not in values:
            raise ValueError("num_classes is missing")
        return cls(**values)


# Depth, width and heads of the ViT family: Ti and S from DeiT (Touvron et al., 2021, table 1), B and L from ViT
# (Dosovitskiy et al., 2021, table 1). The temporal encoder has 4 blocks throughout (ViViT, section 4.2).
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"depth": 12, "dim": 192, "num_heads": 3},
    "small": {"depth": 12, "dim": 384, "num_heads": 6},
    "base": {"depth": 12, "dim": 768, "num_heads": 12},
    "large": {"depth": 24, "dim": 1024, "num_heads": 16},
}


def preset(name: str, *, num_classes: int, **changes: Any) -> ModelConfig:
    """A named size, with changes: `preset("base", num_classes=174, height_px=256, width_px=256)`.

    Raises:
        ValueError: An unknown preset, or sizes that do not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return ModelConfig(num_classes=num_classes, **{**PRESETS[name], **changes})
