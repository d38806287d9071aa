"""What a node says of itself: runs there, and returns plain values."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jobs.run_record import versions

_NUM_FRAMES, _SIZE_PX = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """A node, looked at from inside. A check that failed is the reason in one line; one that passed is "".

    Attributes:
        versions: Python and packages.
        decoders: Each decoder, with a clip that was made there.
        gpus: Names of those that torch sees.
        cuda: torch on each of them; "" where there are none.
        kernels: The model's Triton kernels on the first; "" where there is none.
        nvdec: NVDEC, with the same clip; "" where there is no GPU.
        shared_memory_bytes: Size of /dev/shm; 0 where there is none.
    """

    versions: dict[str, str]
    decoders: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    cuda: str = ""
    kernels: str = ""
    nvdec: str = ""
    shared_memory_bytes: int = 0


def examine() -> NodeFacts:
    """Look at the machine that this runs on."""
    import torch

    from pipelines import torchcodec_decoder

    optional = [torchcodec_decoder.NAME] if torchcodec_decoder.is_found() else []
    count = torch.cuda.device_count()
    return NodeFacts(
        versions=versions(),
        decoders=_try_decoders(["decord", "pyav", *optional]),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        cuda=_reason(lambda: _multiply(count)),
        kernels=_reason(lambda: try_kernels("cuda")) if count else "",
        nvdec=_try_decoders(["nvdec"])["nvdec"] if count else "",
        shared_memory_bytes=_shared_memory_bytes(),
    )


def _reason(attempt: Callable[[], object]) -> str:
    """Why it failed; "" where it did not."""
    try:
        attempt()
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return ""


def _try_decoders(names: list[str]) -> dict[str, str]:
    """Make a clip and decode it with each of some decoders."""
    try:
        from pipelines.archive import Video
        from pipelines.decode import decoder_of
        from pipelines.decoded import Clip
        from pipelines.manifest import plan_video, source_of
        from pipelines.synthetic import render, write_clip
        from pipelines.timeline import ClipPlan
        from pipelines.view import View

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_clip(render(0, num_frames=_NUM_FRAMES, size_px=_SIZE_PX), path)
            planned = plan_video(Video(uri=str(path)), ClipPlan(span_s=60.0))[0]
            view = View(num_frames=_NUM_FRAMES, height_px=_SIZE_PX, width_px=_SIZE_PX)

            def decode(name: str) -> None:
                (outcome,) = decoder_of(name)(source_of(planned), [(planned.start_s, planned.end_s)], view)
                if not isinstance(outcome, Clip):
                    raise outcome

            return {name: _reason(lambda name=name: decode(name)) for name in names}
    except Exception as error:  # an import that fails is what we are here to find
        return dict.fromkeys(names, f"{type(error).__name__}: {error}")


def _multiply(num_gpus: int) -> None:
    import torch

    for index in range(num_gpus):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if (ones @ ones).sum().item() != 64**3:
            raise ArithmeticError(f"GPU {index} multiplies wrongly")


def try_kernels(device: str) -> None:
    """Route some tokens with Triton, for which it needs a C compiler beside the GPU, and compare.

    Raises:
        Exception: Whatever Triton says.
        ArithmeticError: Another result than torch's.
    """
    import torch

    from mone.engine.kernels.route import prefer
    from mone.routing import expert_preferred_routing

    probabilities = torch.rand(2, 16, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    wanted = expert_preferred_routing(probabilities, (10, 6), cumulative=False)
    order, *_ = prefer(probabilities.to(device), (10, 6), cumulative=False)
    if not torch.equal(order.cpu(), wanted[0]):
        raise ArithmeticError("Triton routes other tokens than torch")


def _shared_memory_bytes() -> int:
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
