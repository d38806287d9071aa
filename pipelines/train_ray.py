"""A training run on Ray Train: workers, checkpoints in storage, restarts.

Run again with the same storage it continues from the last checkpoint, with however many workers there are by then. It
does so by itself as long as it gets on: what counts is that workers fail again without a new checkpoint in between,
whatever they fail of. (Ray Train counts all failures of a run, of which a long one on spot machines has many.)
"""

import functools
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from mone.parallel import Parallel, Strategy
from mone.training import DivergedError
from pipelines.output import OutputFailedError, in_output, told_in
from pipelines.train_loop import STATE_FILE, Sources, TrainJob, train_loop
from pipelines.train_storage import RUN_NAME, in_storage, last_listed, load_last, make_ready, make_storage, store
from pipelines.waiting import Notices, told

DIVERGED_FILE = "diverged.txt"
# A worker computes with torch's threads and waits for data the rest of the time; decoding tasks take the other cores.
_WORKER_CPUS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How many workers, and where they keep what must survive them.

    Attributes:
        count: Or (least, most): the run goes on with what there is, and grows again.
        strategy: "ddp" or "fsdp".
        storage: Folder or pyarrow URI of the checkpoints.
        device: "cuda", "cpu", or "" for GPUs where any is up.
        max_failures: How often in a row workers may fail without a new checkpoint; -1: any number of times. A machine
            that is taken away with notice is no failure.
        resize_s: Between two looks whether there is room for more workers.
    """

    count: int | tuple[int, int]
    strategy: Strategy
    storage: str
    device: str = ""
    max_failures: int = 3
    resize_s: float = 60.0

    @property
    def use_gpu(self) -> bool:
        """Whether each is to have a GPU; an autoscaler may have to start it."""
        return self.device == "cuda" or (not self.device and ray.cluster_resources().get("GPU", 0) > 0)


Log = Callable[[dict[str, Any]], None]


class WorkersFailedError(RuntimeError):
    """Workers failed too often; the reason of one of them."""


class TooFewCpusError(ValueError):
    """The cluster cannot train and decode at the same time."""


def fit(job: TrainJob, sources: Callable[[], Sources], workers: Workers, make_log: Callable[[], Log]) -> None:
    """Train on the cluster that Ray is connected to.

    Args:
        job: The run.
        sources: Called on each worker.
        workers: How many, and their storage.
        make_log: Called on the first worker: what takes its lines of metrics.

    Raises:
        DivergedError: See `mone.training.Trainer.metrics`.
        TooFewCpusError: The workers would wait for ever for clips.
        OutputFailedError: The output or the storage has failed for too long.
        WorkersFailedError: Workers failed too often.
    """
    output, storage = Path(job.output), workers.storage
    in_output(output, lambda: (output / DIVERGED_FILE).unlink(missing_ok=True))
    _check_cpus(workers)
    _quiet()
    make_storage(storage)
    make_ready(storage)
    failures, last = 0, in_storage(storage, lambda: last_listed(storage))
    while True:
        try:
            _trainer(job, sources, workers, make_log).fit()
            break
        except TrainingFailedError as error:
            reason = _reason(error)
            if waited_for := told_in(reason):  # by a worker, for as long as that is done
                raise OutputFailedError(waited_for) from error
            make_ready(storage)
            newest = in_storage(storage, lambda: last_listed(storage))
            failures, last = failures * (newest == last) + 1, newest
            if 0 <= workers.max_failures < failures:
                times = f"{failures} times in a row without a new checkpoint: " if failures > 1 else ""
                raise WorkersFailedError(times + reason) from error
    if in_output(output, (output / DIVERGED_FILE).exists):
        raise DivergedError((output / DIVERGED_FILE).read_text())


def _trainer(
    job: TrainJob, sources: Callable[[], Sources], workers: Workers, make_log: Callable[[], Log]
) -> TorchTrainer:
    use_gpu = workers.use_gpu
    return TorchTrainer(
        functools.partial(_work, job=job, sources=sources, strategy=workers.strategy, make_log=make_log),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=workers.resize_s,
            resources_per_worker={"CPU": _WORKER_CPUS} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=workers.storage,
            failure_config=FailureConfig(max_failures=0),  # `fit` counts
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _check_cpus(workers: Workers) -> None:
    if workers.device == "cuda" and not ray.cluster_resources().get("GPU", 0):
        return  # what will be up beside the GPUs is not known
    least = workers.count if isinstance(workers.count, int) else workers.count[0]
    cpus, needed = ray.cluster_resources().get("CPU", 0), math.ceil(least * _WORKER_CPUS) + 1
    if cpus < needed:
        raise TooFewCpusError(f"needs {needed} CPUs, one of them to decode; the cluster has {cpus:g}")


def _quiet() -> None:
    """Keep the run's own lines readable: Ray Train's go to its log files alone, but for its errors."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def _reason(error: TrainingFailedError) -> str:
    """The first worker's own words, or those of Ray."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for rank, failure in sorted(failures.items()):
        last = str(failure).strip().splitlines()[-1:] or [type(failure).__name__]
        return f"worker {rank} failed: {last[0]}"
    return str(error)


def _work(job: TrainJob, sources: Callable[[], Sources], strategy: Strategy, make_log: Callable[[], Log]) -> None:
    context, output = ray.train.get_context(), Path(job.output)
    parallel = Parallel(get_device(), context.get_world_rank(), context.get_world_size(), strategy)
    with told(Notices(output).post):
        try:
            train_loop(job, sources(), parallel, RayLink(make_log() if parallel.rank == 0 else None))
        except DivergedError as error:  # again would end as before: no failure to start again after
            if parallel.rank == 0:
                in_output(output, functools.partial((output / DIVERGED_FILE).write_text, str(error)))


class RayLink:
    """A worker's link to Ray Train's controller. Checkpoints are uploaded while training goes on."""

    def __init__(self, log: Log | None) -> None:
        self._log = log

    def latest(self) -> dict[str, Any] | None:
        """The state of the last checkpoint that is whole."""
        return load_last(lambda folder: torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True))

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Report a checkpoint; the first worker holds all of it."""
        if self._log is None:
            ray.train.report(metrics, checkpoint=None)
            return
        folder = tempfile.mkdtemp()  # deleted after the upload
        torch.save(state, Path(folder) / STATE_FILE)
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=store,
            delete_local_checkpoint_after_upload=True,
        )

    def log(self, record: dict[str, Any]) -> None:
        """Keep a line of metrics, on the first worker."""
        if self._log:
            self._log(record)

    def must_save(self) -> bool:
        """Whether a node of ours is about to be taken away."""
        return ray.train.get_preemption_info() is not None
