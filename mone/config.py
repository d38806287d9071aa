"""Sizes of a model: the one place where widths, depths and token counts are decided and checked."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mone.capacity import Allocation, token_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A ViViT whose blocks are Mixtures of Nested Experts.

    The defaults are ViViT-FE-B/16x2 on 32 frames (ViViT, section 4.1). Saved as config.json beside the weights.

    Attributes:
        num_classes: Size of the classifier.
        num_frames: Frames T of a clip.
        height_px, width_px: Size of a frame.
        tubelet_frames, tubelet_px: A token covers tubelet_frames x tubelet_px x tubelet_px pixels.
        dim: Model dimension D, the width of the largest expert.
        num_heads: Attention heads; they split D, so nesting cuts through heads only in the projections.
        encoder: "factorised": a frame attends within itself, then a temporal encoder reads one vector per frame (ViViT
            section 3.3, model 2; the paper's choice). "joint": all tokens of a clip attend to each other (model 1),
            which is what most public video weights are.
        depth: Nested blocks.
        temporal_depth: Temporal blocks of a factorised encoder, always dense (MoNE section 4.2). With 0 the frame
            vectors are averaged (ViViT table 3 starts there). A joint encoder has none and wants 0.
        mlp_ratio: Hidden width of the MLP over D. The hidden width is never nested (MoNE appendix A.1).
        num_experts: Experts E, of widths D / 2^(E-1), ..., D / 2, D (MoNE section 3.1).
        pooling: What the nested encoder hands on for a frame (joint: for the clip): its class token, or the mean of its
            tokens, normalised after averaging. The paper leaves open whether a class token is routed; here it always
            takes the full expert, since it is one token and all others report to it.
        router: "learned" is the paper's; "motion" adds a prior from frame differences to it; "random" gives every token
            a pseudo-random preference, the baseline that a learned router has to beat.
        ranking: By what expert j chooses among the free tokens. "probability": r_j, as in the paper (algorithm 1).
            "cumulative", beyond it: the probability of expert j or a larger one. A token that the full expert wants
            most has little probability left for the second; where the full expert is full, or has no tokens at all (at
            a low capacity), r_j sends it past the second and third to the smallest.
        budget: Over what a capacity holds. "frame": every frame has the same counts (MoNE section 4.2). "clip", beyond
            the paper: the frames of a clip share one budget, so that a still frame gives its share to a busy one.
        allocation: How a capacity becomes tokens per expert. "mone" is the paper's; the others are baselines, see
            `mone.baselines`.
        activation: Of the MLP: "gelu" is exact, "gelu_tanh" its approximation (public ViViT weights want it).
        norm_eps: Of every LayerNorm.
        pool_norm_eps: Of the LayerNorm after the nested encoder's pooling, where it differs (VideoMAE's); 0: norm_eps.
        dropout: Of embeddings, attention weights and branch outputs, in training.
        drop_path: Stochastic depth: chance to skip a branch of the last block in training; earlier blocks
            proportionally less (Huang et al., 2016).
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
    encoder: Literal["factorised", "joint"] = "factorised"
    depth: int = 12
    temporal_depth: int = 4
    mlp_ratio: int = 4
    num_experts: int = 4
    pooling: Literal["cls", "mean"] = "cls"
    router: Literal["learned", "motion", "random"] = "learned"
    ranking: Literal["probability", "cumulative"] = "probability"
    budget: Literal["frame", "clip"] = "frame"
    allocation: Allocation = "mone"
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-6
    pool_norm_eps: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    pixels: Literal["scaled", "centred"] = "scaled"
    span_s: float = 2.56

    def __post_init__(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: A size that does not fit the others, with the values.
        """
        for field in dataclasses.fields(self):
            self._check_field(field.name, field.type)
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
        if self.encoder == "joint" and self.temporal_depth:
            raise ValueError(
                f"a joint encoder has no temporal blocks: temporal_depth must be 0, not {self.temporal_depth}"
            )
        if self.budget == "clip" and self.reduces_tokens:
            raise ValueError(f"allocation {self.allocation!r} takes tokens from every frame: budget must be 'frame'")

    def _check_field(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        if choices := get_args(kind):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            return
        is_number = type(value) in {kind, int} and math.isfinite(value)
        if name in ("dropout", "drop_path"):
            if not (is_number and 0 <= value < 1):
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
        elif name in ("temporal_depth", "pool_norm_eps"):
            if not (is_number and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        elif not is_number or value <= 0:
            raise ValueError(f"{name} must be a positive {kind.__name__}, got {value!r}")

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

    @property
    def joint(self) -> bool:
        """Whether all tokens of a clip attend to each other."""
        return self.encoder == "joint"

    @property
    def reduces_tokens(self) -> bool:
        """Whether the allocation is a baseline that spends a capacity on fewer tokens, all at full width."""
        return self.allocation in ("token_drop", "tome")

    @property
    def num_class_tokens(self) -> int:
        """Class tokens of a sequence: 1 or 0."""
        return int(self.pooling == "cls")

    def budget_per_frame(self, num_kept: int | None = None) -> bool:
        """Whether every frame of a clip has a budget of its own.

        Frames of which static patches were dropped differ in size, so such a clip (num_kept is given) has one budget
        whatever `budget` says.
        """
        return self.budget == "frame" and num_kept is None

    def num_budgets(self, num_kept: int | None = None) -> int:
        """Budgets of a clip: F or 1."""
        return self.num_indices if self.budget_per_frame(num_kept) else 1

    def tokens_per_budget(self, num_kept: int | None = None) -> int:
        """Routed tokens that share a budget: those of a frame, or of the clip."""
        tokens = self.num_indices * self.num_tokens if num_kept is None else num_kept
        return tokens // self.num_budgets(num_kept)

    def token_counts(self, capacity: float, num_kept: int | None = None) -> tuple[int, ...]:
        """Tokens of each expert under one budget at an effective capacity, smallest expert first.

        Args:
            capacity: Effective capacity e_c in [d_1 / D, 1].
            num_kept: Patches of the clip that were not dropped as static; None: all are there.

        Raises:
            ValueError: A capacity out of range.
        """
        return token_counts(capacity, self.tokens_per_budget(num_kept), self.num_experts, self.allocation)

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
    joint = {"temporal_depth": 0} if changes.get("encoder") == "joint" else {}
    return ModelConfig(num_classes=num_classes, **{**PRESETS[name], **joint, **changes})
