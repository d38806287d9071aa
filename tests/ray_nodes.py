"""Ray clusters of several nodes on this machine, whose processes die as machines do."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from ray._private.node import Node
from ray.cluster_utils import Cluster

# Of the node itself, which ends with them.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_SMALL = {"object_store_memory": 100 * 2**20}


class Nodes:
    """A head that computes nothing, and worker nodes.

    Attributes:
        cluster: Ray's.
        workers: Nodes that are up, the oldest first.
    """

    def __init__(self, num_workers: int, **resources: float) -> None:
        """Start them.

        Args:
            num_workers: How many nodes beside the head.
            resources: Of each of them.
        """
        self.resources = {"num_cpus": 1} | resources
        head = {"num_cpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | _SMALL)
        self.workers: list[Node] = []
        for _ in range(num_workers):
            self.add()

    @property
    def address(self) -> str:
        """What jobs connect to."""
        return self.cluster.address

    def add(self) -> Node:
        """One more node."""
        self.workers.append(self.cluster.add_node(**(self.resources | _SMALL)))
        return self.workers[-1]

    def kill_node(self, node: Node) -> None:
        """All processes of a node with SIGKILL, as when a machine is switched off."""
        self.workers.remove(node)
        victims = self.worker_processes(node)
        self.cluster.remove_node(node, allow_graceful=False)
        for victim in victims:
            kill(victim)

    def kill_all(self) -> None:
        """All processes of all nodes, the head's first."""
        head = self.cluster.head_node
        for node in (head, *self.workers):
            victims = self.worker_processes(node)
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            for victim in victims:
                kill(victim)

    def metrics_port(self, node: Node) -> int:
        """Where the node tells Prometheus of its processes."""
        (port,) = [
            told["MetricsExportPort"]
            for told in self.cluster.global_state.node_table()
            if told["NodeID"] == node.node_id
        ]
        return port

    def worker_processes(self, node: Node) -> list[int]:
        """Process ids of the node in which tasks and actors run, or will."""
        (raylet,) = node.all_processes["raylet"]
        children = _read(f"/proc/{raylet.process.pid}/task/{raylet.process.pid}/children").split()
        names = {int(child): _read(f"/proc/{child}/cmdline").rstrip("\0 ") for child in children}
        return [child for child, name in names.items() if name.startswith("ray::") and name not in _AGENTS]


def kill(process: int) -> None:
    """End a process, if it is still there, as the kernel does where memory is short."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


@contextlib.contextmanager
def nodes(num_workers: int, **resources: float) -> Iterator[Nodes]:
    """A cluster for the time of a block."""
    started = Nodes(num_workers, **resources)
    try:
        yield started
    finally:
        started.cluster.shutdown()
