"""A problem that small models learn in seconds, a trainer for it, and all that a trainer remembers."""

import torch
from torch import Tensor

from mone.augment import AugmentConfig
from mone.clips import MemoryClips
from mone.config import ModelConfig
from mone.model import ViViT
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import Trainer
from mone.tubelets import to_frames
from tests.mone.conftest import small_config, some_patches

CONFIG = small_config(num_classes=4, num_frames=2, height_px=16, dim=32, depth=1, temporal_depth=1)  # 4 x 4 tokens
STAGES = (
    Stage(name="first", epochs=1, routing="nested"),
    Stage(name="second", epochs=3, routing="mone", learning_rate=3e-3),
)
AUGMENTED = AugmentConfig(crop_scale=(0.5, 1.0), flip=0.5, colour_jitter=0.3, erasing=0.3, mixup=0.3)


def corner_clips(num_clips: int, seed: int, config: ModelConfig = CONFIG) -> MemoryClips:
    """Noise in which one corner of every tubelet is bright: the class."""
    patches, labels = some_patches(config, num_clips, seed) // 2, torch.arange(num_clips) % 4
    half_px = config.tubelet_px // 2
    pixels = patches.unflatten(-1, (config.tubelet_frames, 2, half_px, 2, half_px, 3))
    for clip, label in enumerate(labels.tolist()):
        pixels[clip, :, :, :, label // 2, :, label % 2] += 100
    return MemoryClips(to_frames(patches, config), labels)


def new_trainer(
    num_samples: int,
    *,
    seed: int = 0,
    config: ModelConfig = CONFIG,
    parallel: Parallel | None = None,
    **settings,
) -> Trainer:
    torch.manual_seed(seed)
    train = TrainConfig(**({"stages": STAGES, "batch_size": 8, "ema_decay": 0.9} | settings))
    return Trainer(ViViT(config), train, num_samples, parallel or Parallel(torch.device("cpu")))


def flat(state: dict, prefix: str = "") -> dict[str, object]:
    """A state without its nesting."""
    found = {}
    for key, value in state.items():
        inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        found |= flat(inner, f"{prefix}{key} ") if isinstance(inner, dict) else {f"{prefix}{key}": value}
    return found


def assert_same_state(found: dict, expected: dict, **tolerance: float) -> None:
    """Every tensor and number; exactly, where no tolerance is given."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)
        else:
            assert found[name] == value, name
