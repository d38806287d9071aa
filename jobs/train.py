"""Train a model by a recipe, on labelled videos or on generated motions; in this process, or on a Ray cluster.

python -m jobs.train --recipe motions --data motions --output DIR
python -m jobs.train --recipe small_videos --data LABELLED --output DIR --num-workers 2 --cache DIR/cache
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.inputs import choose_device, make_output
from jobs.recipes import RECIPES
from jobs.run_log import RunLog, showing
from jobs.train_options import Train
from jobs.train_run import prepare
from jobs.training_data import MOTIONS_DATA, TrainingData, load_in_memory, worker_sources
from jobs.waits import waiting_shown
from mone.checkpoint import CONFIG_FILE
from mone.clips import MemoryClips
from mone.parallel import Parallel
from mone.training import DivergedError
from pipelines.storage.address import public_address
from pipelines.train_loop import MODEL_DIR, LocalLink, Sources, TrainJob, train_loop


def train(config: Train) -> None:
    """Run the job."""
    workers, job, data = prepare(config)
    try:
        with waiting_shown(Path(job.output)):
            if workers == 0:
                _train_here(config, job, data, Path(job.output))
            else:
                _train_on_ray(config, job, data, workers)
    except DivergedError as error:
        raise JobFailed(f"{error}; the last checkpoint is kept") from error
    print(Path(job.output) / MODEL_DIR)


def _train_here(config: Train, job: TrainJob, data: TrainingData, output: Path) -> None:
    device = choose_device(config.device)
    if is_done(output):
        return
    sources = [clips.to(device) for clips in load_clips(config, job, data)]
    if not len(sources[0]):
        raise UserError(f"no clip of {config.data} can be read")
    log = RunLog(job.output, _run(config))
    with showing(output):
        train_loop(job, Sources(*sources), Parallel(device), LocalLink(output, log))


def is_done(output: Path) -> bool:
    """Whether a run has its model; of a model folder, config.json appears last."""
    return (output / MODEL_DIR / CONFIG_FILE).exists()


def load_clips(config: Train, job: TrainJob, data: TrainingData) -> list[MemoryClips]:
    """All splits in memory; with --cache they stay on disk for the next run."""
    if config.cache:
        make_output(config.cache)
    return load_in_memory(data, job, _clips(config), config.cache)


def _train_on_ray(config: Train, job: TrainJob, data: TrainingData, workers: int | tuple[int, int]) -> None:
    from jobs.cluster import connected
    from pipelines.train_ray import TooFewCpusError, Workers, WorkersFailedError, fit
    from pipelines.train_storage import make_storage

    if is_done(Path(job.output)):
        return
    with connected(config.address):
        with checking_input():
            sources = worker_sources(data, job, _clips(config), config.cache, int(config.cache_gb * 1e9))
            make_storage(storage := config.storage or job.output)
        log = functools.partial(RunLog, job.output, _run(config))
        asked = Workers(
            count=workers,
            strategy=config.strategy,
            storage=storage,
            device=config.device,
            max_failures=config.max_failures,
        )
        waits = "" if config.device else ": no GPU is up; --device cuda waits for one"
        print(f"workers   on {'GPUs' if asked.use_gpu else 'CPUs' + waits}", file=sys.stderr)
        try:
            with showing(Path(job.output)):
                fit(job, sources, asked, log)
        except WorkersFailedError as error:
            raise JobFailed(str(error)) from error
        except TooFewCpusError as error:
            raise UserError(f"--num-workers {config.num_workers}: {error}") from error


def _run(config: Train) -> dict[str, Any]:
    """Of a curve record, what the workers do not know."""
    return {"data": public_address(config.data), "fold": config.split_column, "recipe": config.recipe}


def _clips(config: Train) -> int:
    """Clips per video; of generated data, clips in all."""
    if config.data == MOTIONS_DATA:
        return config.num_clips or RECIPES[config.recipe]().num_clips
    return config.clips_per_video


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("train", Train, train, argv)


if __name__ == "__main__":
    sys.exit(main())
