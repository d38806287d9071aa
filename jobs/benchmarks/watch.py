"""What the processes below this one take while something runs."""

import contextlib
import functools
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from jobs.background import looking

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Ray's own services, which are there in any case.
_SERVICES = ("raylet", "gcs_server", "dashboard", "log_monitor", "agent")


class Memory:
    """Peaks in bytes.

    Attributes:
        largest: What one process has allocated: resident memory without pages that are shared.
        together: What all have.
        spilled: On disk, of Ray's object store.
        cpu_s: Not a peak: processor seconds of this process, of all below it, and of those that have ended since.
    """

    def __init__(self) -> None:
        self.largest = self.together = self.spilled = 0
        self.cpu_s = 0.0

    @contextlib.contextmanager
    def watched(self, every_s: float = 0.1) -> Iterator[None]:
        """Look at all processes below this one again and again."""
        session, before = _spill_folder(), _cpu_s()
        look = functools.partial(self._look, session)
        look()  # one at least
        try:
            with looking(look, every_s):
                yield
        finally:
            after = _cpu_s()
            self.cpu_s = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())

    def _look(self, session: Path | None) -> None:
        sizes = [_allocated_bytes(process) for process in below(os.getpid()) if not is_service(process)]
        self.largest = max([self.largest, *sizes])
        self.together = max(self.together, sum(sizes))
        self.spilled = max(self.spilled, _spilled_bytes(session))


class Gpu:
    """What nvidia-smi says of all GPUs, on average; None where it says nothing.

    Attributes:
        gpu_share: Share of the time in which any kernel ran, of whichever process.
        nvdec_share: Share in which the decoders were busy.
    """

    gpu_share: float | None = None
    nvdec_share: float | None = None


@contextlib.contextmanager
def gpu_watched(every_ms: int = 200) -> Iterator[Gpu]:
    """Ask again and again while the block runs; the answer is there after it."""
    gpu = Gpu()
    query = [
        "--query-gpu=utilization.gpu,utilization.decoder",
        "--format=csv,noheader,nounits",
        f"--loop-ms={every_ms}",
    ]
    try:
        process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield gpu
        return
    try:
        yield gpu
    finally:
        process.terminate()
        lines = [line.split(",") for line in process.communicate()[0].splitlines()]
        said = [(int(first), int(second)) for first, second in (line for line in lines if len(line) == 2)]
        if said:
            gpu.gpu_share, gpu.nvdec_share = (sum(column) / len(said) / 100 for column in zip(*said, strict=True))


def below(root: int) -> list[int]:
    """Processes started by this one, and those that they started."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            children[int((folder / "stat").read_text().rpartition(")")[2].split()[1])].append(int(folder.name))
    found, level = [], [root]
    while level:
        level = [child for parent in level for child in children[parent]]
        found += level
    return found


def is_service(process: int) -> bool:
    """Whether a process belongs to Ray itself."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:4]
        return any(name.encode() in Path(os.fsdecode(word)).name.encode() for word in words for name in _SERVICES)
    return True


def _allocated_bytes(process: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
        return max(0, resident - shared) * _PAGE_BYTES  # the kernel counts roughly
    return 0


def _cpu_s() -> dict[int, float]:
    """Processor seconds of this process and of those below it, with their children that have ended."""
    return {process: cpu_s(process, with_ended=True) for process in [os.getpid(), *below(os.getpid())]}


def cpu_s(process: int, *, with_ended: bool = False) -> float:
    """Processor seconds of a process; those of its children that have ended are its own or not."""
    with contextlib.suppress(OSError, ValueError):
        times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]
        return sum(map(int, times if with_ended else times[:2])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _spill_folder() -> Path | None:
    """Where the Ray that was started here puts objects for which its memory has no room."""
    from ray._private.worker import _global_node

    return None if _global_node is None else Path(_global_node.get_session_dir_path())


def _spilled_bytes(session: Path | None) -> int:
    total = 0
    for file in () if session is None else session.glob("ray_spilled_objects*/*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
