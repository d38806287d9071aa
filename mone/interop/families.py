"""Which public checkpoints are known, and the conversion of one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mone.checkpoint import CheckpointError
from mone.interop.hugging_face import read_videomae, read_vit, read_vivit
from mone.interop.parts import Parts, build
from mone.interop.source import CONFIG_FILE, Source
from mone.interop.timm_vit import read_timm
from mone.model import ViViT

FAMILIES = {
    "vivit": "ViViT (Hugging Face)",
    "videomae": "VideoMAE (Hugging Face)",
    "vit": "ViT (Hugging Face)",
    "timm": "ViT (timm)",
}
IMAGE_FAMILIES = ("vit", "timm")

# What the forward pass of a classifier does not read: the pooler beside the head, and a buffer of indices.
_IGNORED = r".*\bpooler\.dense\.(weight|bias)|.*\bposition_ids"


@dataclass(frozen=True, slots=True)
class Conversion:
    """A public checkpoint as a model of ours.

    Attributes:
        model: In evaluation mode, float32, on the CPU.
        labels: Name of each class.
        family: Key of FAMILIES.
    """

    model: ViViT
    labels: tuple[str, ...]
    family: str


def family_of(folder: Path | str) -> str:
    """The family of a checkpoint folder, a key of FAMILIES, by its config.json.

    Raises:
        CheckpointError: No config.json, or one of another family.
    """
    return _family(Source(folder))


def _family(source: Source) -> str:
    model_type, architecture = source.config.get("model_type"), source.config.get("architecture")
    if isinstance(model_type, str) and model_type in FAMILIES and model_type != "timm":
        return model_type
    if isinstance(architecture, str) and re.match(r"(vit|deit3?)_", architecture):
        return "timm"
    found = "neither" if model_type is architecture is None else repr(model_type or architecture)
    raise CheckpointError(
        f"{source.folder / CONFIG_FILE}: found {found}, known are model_type vivit, videomae, vit and timm's"
        " architecture vit_*, deit_*"
    )


def convert(
    folder: Path | str, *, num_experts: int = 4, num_frames: int | None = None, tubelet_frames: int | None = None
) -> Conversion:
    """Make a model of ours from a public checkpoint.

    A video model becomes a joint encoder with the frames and tubelets that it has. An image model becomes a factorised
    one without temporal blocks: the answer is the mean of the logits of the images that stand at the centre of each
    tubelet.

    Args:
        folder: Holds config.json and the weights.
        num_experts: Experts E; the width has to be halved E - 1 times.
        num_frames: Frames of a clip, for an image model; None: 16 tubelets, as many as ViViT has.
        tubelet_frames: Frames of a tubelet, for an image model; None: 2.

    Raises:
        CheckpointError: A checkpoint that is damaged, of another family, or that cannot be expressed; the file, key or
            tensor is named.
        ValueError: num_frames or tubelet_frames for a video model, which has its own.
    """
    source = Source(folder)
    family = _family(source)
    if family in IMAGE_FAMILIES:
        tubelet_frames = tubelet_frames or 2
        read_image = read_vit if family == "vit" else read_timm
        parts = read_image(source, num_frames or 16 * tubelet_frames, tubelet_frames)
    else:
        for name, value in (("num_frames", num_frames), ("tubelet_frames", tubelet_frames)):
            if value is not None:
                raise ValueError(f"{name} {value}: only an image checkpoint leaves it open, this is {FAMILIES[family]}")
        read_video: Callable[[Source], Parts] = read_vivit if family == "vivit" else read_videomae
        parts = read_video(source)
    source.finish(_IGNORED)
    parts.config["num_experts"] = num_experts
    return Conversion(build(source, parts), parts.labels, family)
