"""Options that several jobs share, and their checks: everything that can be wrong is found before any work."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from jobs.cli import UserError, checking_input
from mone.checkpoint import Checkpoint, read_checkpoint
from mone.config import ModelConfig
from pipelines.limits import Limits
from pipelines.timeline import ClipPlan
from pipelines.view import TokenOptions

BUNDLED = Path(__file__).parent.parent / "bundled"
BUNDLED_MODEL = BUNDLED / "motions_model"

Archive = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ARCHIVE")]
Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions:
    """How videos are cut into clips."""

    span: float = 0.0
    """Seconds of a clip; 0 takes the span that the model was trained on."""
    stride: float = 0.0
    """Seconds from one clip's start to the next; 0 puts clips side by side."""
    clips_per_video: int = 0
    """Spread this many clips over each video; 0 covers the whole video."""

    def plan(self, default_span_s: float) -> ClipPlan:
        """The plan, with the model's span where none was asked for.

        Raises:
            UserError: Numbers out of range.
        """
        with checking_input():
            return ClipPlan(
                span_s=self.span or default_span_s, stride_s=self.stride, clips_per_video=self.clips_per_video
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenArguments(ClipOptions):
    """How videos are cut into clips, and clips into tokens."""

    drop_static: float | None = None
    """Drop patches that changed by at most so many grey levels of 255 since the last one kept in their place."""
    views: int = 1
    """Crops along the longer side of the video, whose probabilities are averaged; 3 is usual in papers."""

    def tokens(self, model: ModelConfig) -> TokenOptions:
        """The options, checked.

        Raises:
            UserError: Out of range, both at once, or not possible with the model.
        """
        with checking_input():
            options = TokenOptions(views=self.views, drop_static=self.drop_static)
        if options.drop_static is not None and model.reduces_tokens:
            raise UserError(f"--drop-static cannot be combined with a model of allocation {model.allocation!r}")
        return options


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What reading a video may take; without slots, to be inherited beside other options."""

    timeout_s: float = 30.0
    """Seconds after which reading a video is ended, plus as many as its clips last (more above 1080p)."""
    memory_gb: float = 1.0
    """Memory, in GiB, above which reading a video is ended."""

    def limits(self) -> Limits:
        """The limits.

        Raises:
            UserError: Numbers out of range.
        """
        with checking_input():
            return Limits(timeout_s=self.timeout_s, memory_bytes=round(self.memory_gb * 2**30))


def load_model(folder: str) -> Checkpoint:
    """Read a model folder.

    Raises:
        UserError: It is missing or damaged.
    """
    with checking_input():
        return read_checkpoint(folder)


def choose_device(name: str) -> torch.device:
    """The device of a --device option; "" takes the GPU where there is one.

    Raises:
        UserError: A device that is not there.
    """
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device must be cuda or cpu, got {name!r}") from error
    if device.type not in ("cuda", "cpu") or (device.type == "cuda" and not available):
        raise UserError(f"--device {name} is not there")
    return device


def make_output(folder: str) -> Path:
    """Create an output folder and see that it can be written.

    Raises:
        UserError: It cannot.
    """
    if "://" in folder:
        raise UserError(f"cannot write to {folder}: it must be a folder, for several nodes one on a disk they share")
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write to {folder}: it is a file")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return path
