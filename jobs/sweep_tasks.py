"""Training runs as Ray tasks, as many at a time as the cluster has room for."""

import sys
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
from ray.exceptions import RayError
from tqdm import tqdm

from jobs.cli import JobFailed, UserError
from jobs.curve_record import RECORD_FILE, read_records
from jobs.sweep_runs import SweepRun
from jobs.train import train
from jobs.train_options import Train


def train_all(runs: Sequence[SweepRun], *, gpus: float, cpus: float) -> list[str]:
    """Train.

    Args:
        runs: Each after what it starts from, where that is not done yet.
        gpus: GPUs of a run.
        cpus: Cores of a run.

    Returns:
        Runs that failed, and why.

    Raises:
        UserError: The runs would wait for ever for a place.
    """
    for name, asked in (("GPU", gpus), ("CPU", cpus)):
        if asked > (there := ray.cluster_resources().get(name, 0)):
            raise UserError(f"a run takes {asked:g} {name}s, and the cluster has {there:g}")
    # A process of its own for each run, so that a GPU's memory is free again when it ends.
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=2)(_train)
    results: dict[Path, ray.ObjectRef] = {}
    for run in runs:
        results[run.folder] = task.remote(run.config, results.get(run.after) if run.after else None)
    names = {ref: str(folder) for folder, ref in results.items()}
    failed, waiting = [], list(results.values())
    with tqdm(total=len(runs), desc="train", unit="run") as progress:
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            error = _outcome(done)
            failed += [f"{names[done]}: {error}"] * bool(error)
            progress.write(f"{names[done]}: {error or _score(Path(names[done]))}", file=sys.stderr)
            progress.update()
    return failed


def _train(config: Train, before: str | None) -> str:
    """Why the run failed, in a line; "" if it did not. `before` is the same of the run that it starts from."""
    if before:
        return "what it starts from failed"
    try:
        train(config)
    except (JobFailed, UserError) as error:
        return str(error)
    except torch.OutOfMemoryError:
        return "out of GPU memory; with a larger --gpus-per-run fewer runs share a GPU, and go on where they were"
    return ""


def _outcome(done: ray.ObjectRef) -> str:
    try:
        return ray.get(done)
    except RayError as error:
        return str(error).strip().splitlines()[-1]


def _score(folder: Path) -> str:
    if not (folder / RECORD_FILE).exists():
        return "done"
    (record,) = read_records(folder)
    shown = (f"{point.top1:.1%} at {point.capacity:.3g}" for point in record.points if point.drop_static is None)
    return f"{record.split} {', '.join(shown)}"
