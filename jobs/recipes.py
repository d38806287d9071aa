"""Full training runs as values. A recipe is a function; what it returns is written beside the model it made."""

from collections.abc import Callable
from dataclasses import dataclass

from mone.augment import AugmentConfig
from mone.config import ModelConfig
from mone.stages import Stage, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a run but its data.

    Attributes:
        model: Sizes; num_classes is replaced by the number of labels in the data. None: those of the model to start
            from.
        train: Stages and optimiser.
        num_clips: Training clips to render, where the data is generated.
    """

    model: ModelConfig | None
    train: TrainConfig
    num_clips: int = 0

    @property
    def sizes(self) -> ModelConfig:
        """The model, of a recipe that has one by now."""
        assert self.model
        return self.model


def motions() -> Recipe:
    """The bundled model: 16 frames of 80 x 80, tubelets 2 x 8 x 8; dense and nested training, then adaptive MoNE.

    Dense training comes first because nothing is learnt for many epochs, and at full width they are the fewest.

    python -m jobs.train --recipe motions --data motions --output runs/motions
    """
    return Recipe(
        model=ModelConfig(
            num_classes=12,
            num_frames=16,
            height_px=80,
            width_px=80,
            tubelet_frames=2,
            tubelet_px=8,
            dim=128,
            num_heads=4,
            depth=4,
            temporal_depth=3,
            pooling="cls",
            router="motion",
            ranking="cumulative",
            pixels="centred",
            span_s=2.0,
        ),
        train=TrainConfig(
            stages=(
                Stage(name="dense", epochs=14, routing="dense", learning_rate=1e-3),
                Stage(name="nested", epochs=6, routing="nested", learning_rate=8e-4),
                Stage(name="adaptive", epochs=8, routing="mone", learning_rate=8e-4),
            ),
            batch_size=128,
            label_smoothing=0.05,
            bf16=True,
        ),
        num_clips=30_720,  # 240 batches
    )


def small_videos() -> Recipe:
    """Some hundred labelled videos from scratch: 16 frames of 112 x 112, a small ViViT, strong augmentation.

    python -m jobs.train --recipe small_videos --data LABELLED --output runs/videos
    """
    return Recipe(
        model=ModelConfig(
            num_classes=5,
            num_frames=16,
            height_px=112,
            width_px=112,
            tubelet_px=16,
            dim=192,
            num_heads=3,
            depth=6,
            temporal_depth=2,
            router="motion",
            ranking="cumulative",
            pixels="centred",
            drop_path=0.1,
            span_s=2.56,
        ),
        train=TrainConfig(
            stages=(
                Stage(name="nested", epochs=40, routing="nested", learning_rate=1e-3),
                Stage(name="adaptive", epochs=80, routing="mone", learning_rate=1e-3),
            ),
            batch_size=64,
            augment=AugmentConfig(crop_scale=(0.4, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, colour_jitter=0.3),
            frame_margin=1.15,
            num_spare_frames=4,
            bf16=True,
        ),
    )


def adapt() -> Recipe:
    """From a dense model to one for many budgets: nested training, then adaptive MoNE (MoNE section 4.2).

    python -m jobs.convert hf://google/vivit-b-16x2-kinetics400 --output models/vivit
    python -m jobs.train --recipe adapt --init models/vivit --data LABELLED --output runs/adapted
    """
    return Recipe(
        model=None,
        train=TrainConfig(
            stages=(
                Stage(name="nested", epochs=5, routing="nested", learning_rate=1e-4),
                Stage(name="adaptive", epochs=10, routing="mone", learning_rate=5e-5),
            ),
            batch_size=32,
            bf16=True,
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"motions": motions, "small_videos": small_videos, "adapt": adapt}
