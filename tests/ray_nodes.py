"""Ray clusters of several nodes on this machine, whose processes die as machines do."""

import contextlib
import os
import signal
from collections.abc import Iterator

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

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
            _kill(victim)

    def kill_all(self) -> None:
        """All processes of all nodes, the head's first."""
        head = self.cluster.head_node
        for node in (head, *self.workers):
            victims = self.worker_processes(node)
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            for victim in victims:
                _kill(victim)

    def metrics_port(self, node: Node) -> int:
        """Where the node tells Prometheus of its processes."""
        (port,) = [
            told["MetricsExportPort"]
            for told in self.cluster.global_state.node_table()
            if told["NodeID"] == node.node_id
        ]
        return port

    def worker_processes(self, node: Node) -> list[psutil.Process]:
        """Those of the node in which tasks and actors run."""
        (raylet,) = node.all_processes["raylet"]
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for child in psutil.Process(raylet.process.pid).children() if _is_worker(child)]
        return []

    def kill_worker(self, process: psutil.Process) -> None:
        """One of them with SIGKILL."""
        _kill(process)


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::")
    return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def nodes(num_workers: int, **resources: float) -> Iterator[Nodes]:
    """A cluster for the time of a block."""
    started = Nodes(num_workers, **resources)
    try:
        yield started
    finally:
        started.cluster.shutdown()
