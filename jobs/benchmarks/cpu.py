"""What routing saves on a processor: the model benchmark at sizes for which a few cores suffice."""

from dataclasses import dataclass
from typing import Literal

from jobs.benchmarks.model import ModelSpeed
from jobs.benchmarks.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSpeed:
    """Time dense and MoNE on this machine's cores, with the reference and the engine; a preset with random weights.

    Everything else is as in `jobs.benchmark model`, of which this is `--device cpu --engine reference layout`.

    python -m jobs.benchmark cpu
    """

    preset: str = "base"
    """tiny, small, base or large."""
    encoder: Literal["factorised", "joint"] = "factorised"
    """Form of the encoder."""
    frames: int = 8
    """Frames of a clip."""
    capacity: tuple[float, ...] = (0.2, 0.3, 0.4)
    """Effective capacities."""
    static_share: float = 0.0
    """Above 0, all rows once more on clips of which this share of the patches is dropped as static."""
    batch_size: int = 4
    """Clips of a batch."""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16 pays where the processor computes in it."""
    repeats: int = 5
    """Measurements of each row; odd, so that the median is one of them."""

    def measure(self) -> Report:
        """Run the benchmark."""
        return ModelSpeed(
            preset=self.preset,
            encoder=self.encoder,
            frames=self.frames,
            capacity=self.capacity,
            static_share=self.static_share,
            batch_size=self.batch_size,
            dtype=self.dtype,
            repeats=self.repeats,
            methods=("mone",),
            engine=("reference", "layout"),
            device="cpu",
        ).measure()
