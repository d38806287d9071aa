"""One examiner on each node, which does there what it is asked."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.diagnosis.checks import NodeResources
from jobs.diagnosis.node import NodeFacts, examine
from jobs.diagnosis.shared_folder import unread_marks, write_mark
from pipelines.archive import Video
from pipelines.manifest import plan_video
from pipelines.timeline import ClipPlan

_CLOCK_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What of a video is the same for all who see the same file."""

    video: str
    seen: str


@ray.remote(num_cpus=0, max_restarts=0)
class _Examiner:
    """Runs on one node. Takes no CPU, so that a busy cluster can be examined, too."""

    def facts(self) -> NodeFacts:
        return examine()

    def clock_s(self) -> float:
        return time.time()

    def write(self, folder: Path, node: str) -> str:
        return write_mark(folder, node)

    def unread(self, folder: Path, nodes: list[str]) -> list[str]:
        return unread_marks(folder, nodes)

    def sights(self, videos: list[Video]) -> list[Sight]:
        return sights(videos)


def sights(videos: list[Video]) -> list[Sight]:
    """Read each video as planning does."""
    plan = ClipPlan(span_s=1.0, clips_per_video=1)
    return [
        Sight(video=clip.video, seen=f"{clip.clip_id} {clip.status} {clip.error}".strip())
        for video in videos
        for clip in plan_video(video, plan)
    ]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the nodes said, and why others did not."""

    given: dict[str, Any]
    silent: dict[str, str]


class Examiners:
    """Examiners of all nodes that are up, by the nodes' names.

    Args:
        limit_s: Seconds that an answer may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        nodes = {_name(node): node for node in ray.nodes() if node["Alive"]}
        self.resources = {name: _resources(node["Resources"]) for name, node in nodes.items()}
        self._handles = {name: _start(node["NodeID"]) for name, node in nodes.items()}

    def ask(self, method: str, *arguments: Any, own_name: bool = False) -> Answers:
        """Ask all nodes at once. Those that do not answer are not asked again.

        Args:
            method: Of the examiner.
            arguments: For it.
            own_name: Whether the node's name is one more.
        """
        asked = {
            name: getattr(handle, method).remote(*arguments, *([name] if own_name else []))
            for name, handle in self._handles.items()
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=self.limit_s, fetch_local=False)
        answers = Answers({}, {})
        for name, answer in asked.items():
            try:
                answers.given[name] = ray.get(answer, timeout=1)
            except GetTimeoutError:
                answers.silent[name] = f"no answer within {self.limit_s:g} s"
            except RayError as error:
                answers.silent[name] = _last_line(error)
        for name in answers.silent:
            del self._handles[name]
        return answers

    def clocks_s(self) -> tuple[dict[str, float], float]:
        """Offset of each node's clock, from the quickest of a few answers; and by how much it may be wrong."""
        offsets_s, uncertain_s = {}, 0.0
        for name, handle in self._handles.items():
            with contextlib.suppress(RayError):  # it answered before, and is gone
                half_s, offsets_s[name] = min(_offset(handle, self.limit_s) for _ in range(_CLOCK_TRIES))
                uncertain_s = max(uncertain_s, half_s)
        return offsets_s, uncertain_s


def unlike(mine: list[Sight], theirs: Mapping[str, list[Sight]]) -> dict[str, str]:
    """Of each node the first video that it sees otherwise, and how; "" where all are the same."""
    found = dict.fromkeys(theirs, "")
    for node, seen in theirs.items():
        for one, other in zip(mine, seen, strict=True):
            if one != other:
                found[node] = f"{one.video} is {other.seen!r} there and {one.seen!r} here"
                break
    return found


def _offset(handle: Any, limit_s: float) -> tuple[float, float]:
    """Half of the time that an answer took, and the clock's offset in its middle."""
    sent_s = time.time()
    clock_s: Any = ray.get(handle.clock_s.remote(), timeout=limit_s)
    half_s = (time.time() - sent_s) / 2
    return half_s, clock_s - sent_s - half_s


def _start(node_id: str) -> Any:
    return _Examiner.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        # All GPUs of the node can be seen without taking one from a job.
        runtime_env={"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
    ).remote()


def _name(node: Mapping[str, Any]) -> str:
    """Host, and what tells apart several nodes of one host."""
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"


def _resources(found: Mapping[str, float]) -> NodeResources:
    return NodeResources(
        cpus=found.get("CPU", 0),
        gpus=found.get("GPU", 0),
        memory_bytes=found.get("memory", 0),
        object_store_bytes=found.get("object_store_memory", 0),
    )


def _last_line(error: BaseException) -> str:
    """Ray's messages carry stack traces; the reason is at their end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
