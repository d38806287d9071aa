"""Train a model by a recipe, on labelled videos or on generated motions; in this process, or on a Ray cluster.

python -m jobs.train --recipe motions --data motions --output DIR
python -m jobs.train --recipe ucf --data LABELLED --output DIR --num-workers 2 --cache DIR/cache
"""

import dataclasses
import functools
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.inputs import choose_device, make_output
from jobs.recipes import RECIPES, Recipe
from jobs.run_log import RunLog, showing
from jobs.training_data import MOTIONS_DATA, TrainingData, load_in_memory, training_data, worker_sources
from mone.baselines import METHODS, with_method
from mone.checkpoint import Checkpoint, read_checkpoint, write_whole
from mone.engine.choice import Engine
from mone.parallel import Parallel
from mone.training import DivergedError
from pipelines.train_loop import MODEL_DIR, LocalLink, Sources, TrainJob, train_loop

# Options that decide the model, beside recipe and method.
_DECISIVE = ("data", "init", "split_column", "num_clips", "clips_per_video", "epochs", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Train by a recipe and write DIR/model; stopped or killed, the same command continues after its last checkpoint.

    Metrics go to DIR/metrics.jsonl and DIR/tensorboard. The test split is measured once, at the end.
    """

    data: str
    """Labelled videos (.csv/.parquet/.jsonl with video, label, split; or a folder per class), or "motions"."""
    output: str
    """DIR for the model, its checkpoints and metrics; every worker must see it."""
    recipe: str = "motions"
    """One of the functions in jobs/recipes.py."""
    method: str = "mone"
    """"mone", or the baseline to train in its place (mone/baselines.py): dense, random_router, uniform, proportionate,
    submodel, token_drop, tome."""
    init: str = ""
    """Model folder to start from: its weights, fitted to the recipe's sizes; new classes get a new head."""
    num_workers: str = "0"
    """0: here, with all clips in memory. N: workers of Ray Train, clips streamed by Ray Data. MIN:MAX: as many as the
    cluster has, growing and shrinking with it."""
    cache: str = ""
    """Folder or URI for decoded clips, so that they are decoded once; with --num-workers."""
    cache_gb: float = 100.0
    """The cache holds at most so much; clips beyond it are decoded in each epoch."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """fsdp spreads the weights over the workers (FSDP2), for models that do not fit on one."""
    storage: str = ""
    """Folder or URI of the checkpoints, with --num-workers; default DIR."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next; every epoch ends with one too."""
    split_column: str = "split"
    """Column of the data that says train, val or test."""
    num_clips: int = 0
    """Clips to render for "motions"; 0 takes the recipe's number."""
    clips_per_video: int = 1
    """Training clips from each labelled video, spread evenly."""
    epochs: int = 0
    """Epochs of each stage; 0 takes the recipe's."""
    seed: int = 0
    """Of weights, order and draws."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one. Without --num-workers."""
    engine: Engine = "auto"
    """Code that runs the model's blocks, "reference" being the plainest; all compute the same (docs/performance.md)."""
    log_samples: bool = False
    """Write down which samples each step saw, in DIR/samples."""
    address: str = ""
    """Ray cluster, with --num-workers; default RAY_ADDRESS, else Ray starts here."""


def train(config: Train) -> None:
    """Run the job."""
    workers = _check(config)
    with checking_input():
        data = training_data(config.data, config.split_column)
        start = read_checkpoint(config.init) if config.init else None
        recipe = _adapt(RECIPES[config.recipe](), config, start, len(data.labels))
    output = make_output(config.output)
    _check_same_run(output, config, recipe)
    job = TrainJob(
        model=recipe.sizes,
        train=recipe.train,
        labels=data.labels,
        output=str(output),
        method=config.method,
        init=config.init,
        notes=_notes(config, recipe),
        checkpoint_every=config.checkpoint_every,
        log_samples=config.log_samples,
        engine=config.engine,
    )
    try:
        if workers == 0:
            _train_here(config, job, data, output)
        else:
            _train_on_ray(config, job, data, workers)
    except DivergedError as error:
        raise JobFailed(f"{error}; the last checkpoint is kept") from error
    print(output / MODEL_DIR)


def _check(config: Train) -> int | tuple[int, int]:
    """The number of workers.

    Raises:
        UserError: An option out of range, or without effect.
    """
    if config.recipe not in RECIPES:
        raise UserError(f"unknown recipe {config.recipe!r}; there are {', '.join(RECIPES)}")
    for name, least in (("num_clips", 0), ("epochs", 0), ("clips_per_video", 1), ("checkpoint_every", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    match = re.fullmatch(r"(\d+)(?::(\d+))?", config.num_workers)
    if not match:
        raise UserError(f"--num-workers must be N or MIN:MAX, got {config.num_workers!r}")
    least, most = int(match[1]), int(match[2] or match[1])
    if most < least or (match[2] and not least):
        raise UserError(f"--num-workers {config.num_workers}: MIN must be at least 1 and at most MAX")
    idle = ("cache", "storage", "address") if most == 0 else ("device",)
    for name in idle:
        if getattr(config, name):
            raise UserError(f"--{name} has no effect {'without' if most == 0 else 'with'} --num-workers")
    if config.strategy == "fsdp" and most == 0:
        raise UserError("--strategy fsdp needs --num-workers")
    if most == 0:
        choose_device(config.device)
    return (least, most) if match[2] else most


def _train_here(config: Train, job: TrainJob, data: TrainingData, output: Path) -> None:
    device = choose_device(config.device)
    if (output / MODEL_DIR).exists():
        return
    sources = [clips.to(device) for clips in load_in_memory(data, job, _clips(config))]
    if not len(sources[0]):
        raise UserError(f"no clip of {config.data} can be read")
    log = RunLog(job.output, config.data, config.recipe)
    with showing(output):
        train_loop(job, Sources(*sources), Parallel(device), LocalLink(output, log))


def _train_on_ray(config: Train, job: TrainJob, data: TrainingData, workers: int | tuple[int, int]) -> None:
    from jobs.cluster import connected
    from pipelines.train_ray import TooFewCpusError, Workers, WorkersFailedError, fit

    if (Path(job.output) / MODEL_DIR).exists():
        return
    with connected(config.address):
        with checking_input():
            sources = worker_sources(data, job, _clips(config), config.cache, int(config.cache_gb * 1e9))
        log = functools.partial(RunLog, job.output, config.data, config.recipe)
        asked = Workers(count=workers, strategy=config.strategy, storage=config.storage or job.output)
        try:
            with showing(Path(job.output)):
                fit(job, sources, asked, log)
        except WorkersFailedError as error:
            raise JobFailed(str(error)) from error
        except TooFewCpusError as error:
            raise UserError(f"--num-workers {config.num_workers}: {error}") from error


def _clips(config: Train) -> int:
    """Clips per video; of generated data, clips in all."""
    if config.data == MOTIONS_DATA:
        return config.num_clips or RECIPES[config.recipe]().num_clips
    return config.clips_per_video


def _notes(config: Train, recipe: Recipe) -> str:
    """For the model card: what was run."""
    stages = ", then ".join(f"{stage.epochs} epochs of {stage.name} ({stage.routing})" for stage in recipe.train.stages)
    return f"`{_command(config)}`, seed {config.seed}: {stages}."


def _command(config: Train) -> str:
    """The command with every option that decides the model, ready for a shell."""
    words = ["python -m jobs.train"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("data", "recipe", "method") or (value != field.default and field.name in _DECISIVE):
            words.append(f"--{field.name.replace('_', '-')} {shlex.quote(str(value))}")
    return " ".join(words)


def _adapt(recipe: Recipe, config: Train, start: Checkpoint | None, num_classes: int) -> Recipe:
    """The recipe with what the command line changes.

    Raises:
        ValueError: An unknown method, or a recipe that needs a model to start from.
    """
    sizes = recipe.model or (start and start.config)
    if not sizes:
        raise ValueError(f"recipe {config.recipe!r} starts from a model: give --init MODEL")
    model = with_method(dataclasses.replace(sizes, num_classes=num_classes), config.method)
    stages, routing = recipe.train.stages, METHODS[config.method].routing
    if routing:
        stages = tuple(dataclasses.replace(stage, routing=routing) for stage in stages)
    elif model.reduces_tokens:  # at full width throughout: there are no nested widths to train
        stages = tuple(
            dataclasses.replace(stage, routing="dense") if stage.routing == "nested" else stage for stage in stages
        )
    if config.epochs:
        stages = tuple(dataclasses.replace(stage, epochs=config.epochs) for stage in stages)
    return Recipe(
        model=model,
        train=dataclasses.replace(recipe.train, stages=stages, seed=config.seed),
        num_clips=config.num_clips or recipe.num_clips,
    )


def _check_same_run(output: Path, config: Train, recipe: Recipe) -> None:
    """Keep the run's description beside it, and refuse to continue another one."""
    description = json.dumps(
        {name: getattr(config, name) for name in ("method", *_DECISIVE)} | {"recipe": dataclasses.asdict(recipe)},
        indent=1,
        default=str,
    )
    path = output / "config.json"
    if path.exists() and path.read_text() != description:
        raise UserError(f"{output} holds another run; choose another --output")
    write_whole(path, description.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("train", Train, train, argv)


if __name__ == "__main__":
    sys.exit(main())
