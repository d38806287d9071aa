"""What a benchmark hands back, and what is said about the machine it ran on."""

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from jobs.run_record import timestamp, versions

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a benchmark.

    Attributes:
        table: For people.
        rows: The same as JSON objects, in full.
        device: Where it ran.
        details: What else belongs into the JSON, such as what the options left open.
    """

    table: str
    rows: list[dict[str, Any]]
    device: torch.device
    details: dict[str, Any] = field(default_factory=dict)


class Benchmark(Protocol):
    """The options of a benchmark, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def measure(self) -> Report:
        """Run it.

        Raises:
            UserError: Options that do not fit, before any work.
        """
        ...


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when: without these a number means nothing."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "versions": versions(),
        "date": timestamp(),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The product's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} CPUs"


def commit() -> str | None:
    """Git's name of this code, with "-dirty" where it was changed since; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
