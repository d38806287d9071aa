"""What each stage asks the cluster for, and on what the model runs.

No run may wait for ever, beside others or alone on one core. A task ends and makes room. A process of the model holds
what it asked for as long as its run takes, so it asks for no more CPU than leaves a task room on its node, however many
runs there are; that it computes all the same, the operating system sorts out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ray

Device = Literal["auto", "cuda", "cpu"]

# Of a CPU, for a process of the model, and for a write, which waits for the disk: some, so that neither is put on a
# head that is to compute nothing, and so little that what decodes leaves it. If writes found no room, nothing would be
# committed before everything is decoded.
_FEW_CPUS = 0.01
# For one that feeds a GPU, where there are CPUs enough.
_FEEDING_CPUS = 0.75


@dataclass(frozen=True, slots=True)
class Node:
    """What a node that is up has."""

    cpus: float
    gpus: float
    memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user wants of a model's processes.

    Attributes:
        device: "cuda" asks for GPUs even where none is up, "auto" only where one is.
        workers: Least and most processes; a most of 0 picks by cluster.
        gpus: GPUs for each, of which a part may be shared.
    """

    device: Device = "auto"
    workers: tuple[int, int] = (1, 0)
    gpus: float = 1.0

    def __post_init__(self) -> None:
        least, most = self.workers
        if least < 1 or most < 0 or 0 < most < least:
            raise ValueError(
                f"model processes must be at least 1 and at most as many as the most, got {least} to {most}"
            )
        if not (0 < self.gpus <= 1 or (self.gpus > 1 and self.gpus % 1 == 0)):
            raise ValueError(f"GPUs for each model process must be a share of one or a whole number, got {self.gpus:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the model runs.

    Attributes:
        least, most: Processes; a most of None is as many as the cluster has GPUs for at any time.
        cpus, gpus: Of each.
        write_cpus: Of a task that writes.
        reason: For a person, in a line.
    """

    least: int
    most: int | None
    cpus: float
    gpus: float
    write_cpus: float
    reason: str

    @property
    def device(self) -> str:
        """Either "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"


ANY_DEVICE = Wanted()


def place(wanted: Wanted, nodes: Iterable[Node]) -> Placement:
    """Choose what the model runs on.

    Args:
        wanted: By the user.
        nodes: That are up; more may come.
    """
    nodes = list(nodes)
    num_gpus, num_cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    # On one CPU a task is alone, or not at all.
    alone = 0 < max((node.cpus for node in nodes), default=0) < 2
    few = 0.0 if alone else _FEW_CPUS
    least, most = wanted.workers
    if wanted.device == "cpu" or (wanted.device == "auto" and not num_gpus):
        most = most or max(least, int(num_cpus) // 2)  # the other half decodes
        reason = "as asked for" if wanted.device == "cpu" else "no GPU is up; --device cuda waits for one"
        return Placement(
            least=least,
            most=most,
            cpus=few,
            gpus=0.0,
            write_cpus=few,
            reason=f"{_range(least, most)} on CPUs: {reason}",
        )
    limit = most or None
    if wanted.gpus < 1 and not most:  # to share is not to take all shares
        limit = max(least, int(num_gpus))
    return Placement(
        least=least,
        most=limit,
        cpus=_FEEDING_CPUS if _are_cpus_enough(wanted.gpus, nodes) else few,
        gpus=wanted.gpus,
        write_cpus=few,
        reason=f"{_range(least, limit)} on GPUs, {wanted.gpus:g} each, {num_gpus:g} up"
        + ("; waits for more" if num_gpus < wanted.gpus * least else ""),
    )


def _are_cpus_enough(gpus: float, nodes: list[Node]) -> bool:
    """Whether every node with GPUs can still decode once a process has each share of them."""
    with_gpus = [node for node in nodes if node.gpus]
    return bool(with_gpus) and all(node.gpus // gpus * _FEEDING_CPUS + 1 <= node.cpus for node in with_gpus)


def _range(least: int, most: int | None) -> str:
    if most is None:
        return "a process for each GPU"
    return f"{least} to {most} processes" if least < most else f"{least} process{'es' if least > 1 else ''}"


def task_memory(wanted_bytes: int, nodes: Iterable[Node]) -> int:
    """Memory for a task to ask for: what it wants, or what the largest node has, which else would never run it."""
    largest = max((node.memory_bytes for node in nodes if node.cpus), default=wanted_bytes)
    return max(1, int(min(wanted_bytes, largest)))


def nodes_up() -> list[Node]:
    """The nodes of the cluster that Ray is connected to."""
    alive: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0)) for has in alive]
