"""NVDEC, the decoder of a GPU: who may use it, which files fit, and its frames as pictures.

FFmpeg decodes with it as it does with a CPU, so frames, times and damages are those of PyAV; frames stay on the GPU,
and are scaled there. What reaches the host has the size of the model.

A process that uses a GPU holds half a gigabyte of its memory, so of a host's processes only as many may as there are
slots. A process takes a slot where one is free, and keeps it to its end, however it ends: a lock on a file. The others
decode on CPUs, and whoever is faster takes more of the work.
"""

import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.child import Call
from pipelines.probe import open_video
from pipelines.view import View

# Processes that decode with one GPU.
SLOTS_PER_GPU = 6
# Of those that FFmpeg decodes with NVDEC bit by bit as without (MPEG-1, 2 and 4 differ), and where chroma lies.
_CHROMA_SHIFTS = {"h264": 0.25, "hevc": 0.25, "vp9": 0.0}
_PIXELS = "nv12"
# Profiles of H.264 whose parameter sets tell the format of chroma; with others it is 4:2:0.
_WITH_CHROMA_FORMAT = tuple(bytes([number]) for number in (100, 110, 122, 244, 44))
# Frames that wait on the GPU until they are scaled together.
_BATCH_FRAMES, _BATCH_BYTES = 32, 16 << 20
# Where so many processes in turn have not come as far as one frame, a slot is left alone for a while.
_MOST_STRIKES, _REST_S = 3, 600.0


class Unfit(Exception):  # noqa: N818 - a CPU's turn
    """NVDEC cannot serve this file, or not here."""


class Slot:
    """The right to use a GPU.

    Attributes:
        gpu: Its number among those that can be seen.
    """

    def __init__(self, gpu: int, descriptor: int | None) -> None:
        self.gpu, self._descriptor = gpu, descriptor

    def strike(self) -> None:
        """Note that it is to be used, in case that nothing comes of it."""
        if self._descriptor is not None:
            os.pwrite(self._descriptor, b"!", os.fstat(self._descriptor).st_size)

    def clear(self) -> None:
        """Note that it could be used."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def num_gpus() -> int:
    """GPUs of this host that this process may see, without asking them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))


def free_slot(folder: Path | None = None, per_gpu: int = SLOTS_PER_GPU) -> Slot | None:
    """Take a slot of the GPU with the fewest taken; None where all are taken, or there is no GPU.

    Args:
        folder: Of the slots' files; default one of the user's for this host.
        per_gpu: Slots of each GPU.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"mone-nvdec-{os.getuid()}"
    for number, gpu in itertools.product(range(per_gpu), range(num_gpus())):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(folder / f"gpu{gpu}-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _is_locked(descriptor):
                return Slot(gpu, descriptor)
            os.close(descriptor)
    return None


def _is_locked(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        return found.st_size < _MOST_STRIKES or time.time() - found.st_mtime > _REST_S
    return False


class Hardware:
    """This process's NVDEC, started at its first use."""

    def __init__(self, slot: Slot) -> None:
        """Take what a slot allows."""
        self.slot = slot
        self._accel = HWAccel("cuda", device=str(slot.gpu), is_hw_owned=True)
        self._kept: list[Any] = []
        self._last: Any = None

    def open(self, path: str) -> tuple[InputContainer, VideoStream]:
        """Open a file at its best video stream, to be decoded into frames on the GPU.

        Raises:
            DecodeFailure: As `open_video`.
            Unfit: Not a kind of video, or not a host, for it.
        """
        self.start()
        container, stream = open_video(path, self._accel)
        context = stream.codec_context
        reason = ""
        if context.name not in _CHROMA_SHIFTS:
            reason = f"{context.name} is left to CPUs"
        elif context.width % 2 or context.height % 2:
            reason = f"odd sizes are left to CPUs, this one is {context.width}x{context.height}"
        elif context.name == "h264" and is_gray(context.extradata or b""):
            reason = "gray is left to CPUs"
        if reason:
            container.close()
            raise Unfit(reason)
        return container, stream

    def frames(self, stream: VideoStream, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
        """Frames as they are, all of them from NVDEC and of 8 bits.

        Raises:
            Unfit: FFmpeg has decoded one on the CPU, since NVDEC refuses such a file; or more than 8 bits.
        """
        for frame in frames:
            pixels = frame.sw_format
            if pixels is None or pixels.name != _PIXELS:
                kind = (pixels or frame.format).name
                raise Unfit(f"{kind} of {frame.width}x{frame.height} is left to CPUs")
            if self._last is not stream.codec_context:
                # The last decoder to end takes all that the driver has loaded with it, for a quarter of a second.
                self._last = stream.codec_context
                self.slot.clear()
            yield frame

    def painter(self, view: View, codec: str) -> "GpuPainter":
        """For a video of a codec."""
        return GpuPainter(view, codec)

    def start(self) -> None:
        """Load what stays from file to file: the driver's libraries, a context, torch.

        Raises:
            Unfit: There is no driver, or no memory left on the GPU.
        """
        if self._kept:
            return
        if not hasattr(VideoFrame, "sw_format"):
            raise Unfit("PyAV 18 or later is needed")
        self.slot.strike()
        try:
            self._kept.append(ctypes.CDLL("libnvcuvid.so.1"))
            self._kept.append(self._accel.create(av.Codec("h264", "r")))
        except (av.error.FFmpegError, OSError, NotImplementedError) as error:
            self._kept.clear()
            raise Unfit(f"no NVDEC here: {error}") from error
        import torch

        from pipelines.scaling import Colours, scaled_rgb

        some = torch.zeros(1, 64, 64, 2, dtype=torch.uint8, device=f"cuda:{self.slot.gpu}")
        scaled_rgb(some[..., 0], some[:, :32, :32], (32, 32), Colours(1, 1, 0.0)).cpu()


def is_gray(extradata: bytes) -> bool:
    """Whether H.264 has no colours, for which NVDEC makes some up.

    Args:
        extradata: Of the stream: parameter sets as in MP4, or with start codes.
    """
    if extradata[:1] == b"\1":
        parameters = extradata[8:]
    elif found := re.search(rb"\x00\x00\x01(?=[\x27\x47\x67])", extradata):
        parameters = extradata[found.end() :]
    else:
        return False
    if parameters[1:2] not in _WITH_CHROMA_FORMAT:
        return False
    bits = "".join(f"{byte:08b}" for byte in parameters[4:16])
    # Two numbers of Exp-Golomb: the set's own, and the format of chroma. The latter is 0 in one bit.
    number = re.match(r"(0*)1", bits)
    return number is not None and bits[number.end() + len(number[1]) :].startswith("1")


class GpuPainter:
    """Pictures of frames on a GPU, made there, many at once."""

    def __init__(self, view: View, codec: str) -> None:
        """Make pictures for a view of a video of a codec."""
        self.view, self._shift = view, _CHROMA_SHIFTS[codec]
        self._pictures: list[np.ndarray] = []
        self._waiting: list[VideoFrame] = []
        self._kind: tuple[Any, ...] = ()

    def paint(self, frame: VideoFrame) -> int:
        """Take a frame; returns the number of its picture."""
        kind = (frame.width, frame.height, frame.rotation, int(frame.colorspace), int(frame.color_range))
        most = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (frame.width * frame.height * 3 // 2)))
        if kind != self._kind or len(self._waiting) >= most:
            self._flush()
        self._kind = kind
        self._waiting.append(frame)
        return len(self._pictures) + len(self._waiting) - 1

    def pictures(self) -> Sequence[np.ndarray]:
        """All pictures by number, uint8 RGB [H, W, 3]."""
        self._flush()
        return self._pictures

    def _flush(self) -> None:
        if not self._waiting:
            return
        import torch
        from torch.utils.dlpack import from_dlpack

        from pipelines.scaling import Colours, scaled_rgb

        width_px, height_px, rotation_deg, matrix, range_ = self._kind
        turns = rotation_deg // 90
        if turns % 2:
            height_px, width_px = self.view.scaled_size(height_px, width_px)
        else:
            width_px, height_px = self.view.scaled_size(width_px, height_px)
        planes = [[from_dlpack(plane.__dlpack__()) for plane in frame.planes] for frame in self._waiting]
        luma_Bhw, chroma_Bhw2 = (torch.stack(of_all) for of_all in zip(*planes, strict=True))
        rgb: Any = scaled_rgb(luma_Bhw, chroma_Bhw2, (width_px, height_px), Colours(matrix, range_, self._shift))
        rgb = torch.rot90(rgb, turns, dims=(1, 2))
        if self.view.crops == 1:  # less to bring to the host
            cropped: Any = self.view.crop(rgb)
            self._pictures += list(cropped.contiguous().cpu().numpy())
        else:
            self._pictures += list(self.view.crop(rgb.cpu().numpy()))
        self._waiting.clear()


_mine: Hardware | None = None  # of this process, as long as it lives


def prepare() -> bool:
    """Take a slot, if one is free, and start what it gives; returns whether this process can decode with a GPU now."""
    global _mine
    if _mine is None and (slot := free_slot()):
        mine = Hardware(slot)
        try:
            mine.start()
        except Exception:  # no driver, a GPU without memory: CPUs decode, and `hardware` tells why
            slot.close()
        else:
            _mine = mine
    return _mine is not None


# A process does this before its first file, so that no file's limits count it.
PREPARATION = Call(prepare, (), 120.0, 4 << 30)


def is_ready() -> bool:
    """Whether this process can decode with a GPU."""
    return _mine is not None


def hardware() -> Hardware:
    """This process's NVDEC, if need be one beyond the slots.

    Raises:
        Unfit: There is no GPU.
    """
    global _mine
    if _mine is None:
        if not num_gpus():
            raise Unfit("no GPU here")
        _mine = Hardware(Slot(os.getpid() % num_gpus(), None))
    return _mine
