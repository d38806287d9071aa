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
from typing import Any, Literal

from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.inputs import choose_device, make_output
from jobs.recipes import RECIPES, Recipe
from jobs.run_log import RunLog, showing
from jobs.training_data import MOTIONS_DATA, TrainingData, load_in_memory, training_data, worker_sources
from mone.baselines import METHODS, capacities_of, with_method
from mone.capacity import check_capacity
from mone.checkpoint import CONFIG_FILE, Checkpoint, read_checkpoint, write_whole
from mone.clips import MemoryClips
from mone.parallel import Parallel
from mone.stages import Stage
from mone.training import DivergedError
from pipelines.train_loop import MODEL_DIR, LocalLink, Sources, TrainJob, train_loop

# Options that decide the model, beside recipe and method.
_DECISIVE = (
    *("data", "init", "stages", "capacities", "split_column", "num_clips", "clips_per_video", "epochs", "seed"),
)


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
    stages: tuple[str, ...] = ()
    """Train only these of the recipe's stages; default all."""
    capacities: tuple[float, ...] = ()
    """Effective capacities that MoNE trains at; one is a fixed budget. Default the recipe's, for many budgets."""
    init: str = ""
    """Model folder to start from: its weights, fitted to the recipe's sizes; new classes get a new head."""
    num_workers: str = "0"
    """0: here, with all clips in memory. N: workers of Ray Train, clips streamed by Ray Data. MIN:MAX: as many as the
    cluster has, growing and shrinking with it."""
    cache: str = ""
    """Folder for decoded or rendered clips, so that a run after this one has them at once; with --num-workers also a
    URI."""
    cache_gb: float = 100.0
    """With --num-workers, the cache holds at most so much; clips beyond it are decoded in each epoch."""
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
    epochs: tuple[int, ...] = ()
    """Epochs: one number for every stage, or one for each; default the recipe's."""
    drop_static: float | None = None
    """In the end, measure the test split a second time, with patches dropped that changed by at most so many grey
    levels."""
    seed: int = 0
    """Of weights, order and draws."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one. Without --num-workers."""
    compile: bool = False
    """torch.compile the training step; takes a minute or more at first, then is faster. Without --num-workers."""
    log_samples: bool = False
    """Write down which samples each step saw, in DIR/samples."""
    address: str = ""
    """Ray cluster, with --num-workers; default RAY_ADDRESS, else Ray starts here."""


def train(config: Train) -> None:
    """Run the job."""
    workers, job, data = prepare(config)
    try:
        if workers == 0:
            _train_here(config, job, data, Path(job.output))
        else:
            _train_on_ray(config, job, data, workers)
    except DivergedError as error:
        raise JobFailed(f"{error}; the last checkpoint is kept") from error
    print(Path(job.output) / MODEL_DIR)


def prepare(config: Train) -> tuple[int | tuple[int, int], TrainJob, TrainingData]:
    """Check everything, and make the folder of the run.

    Returns:
        Number of workers, the run, and its data.

    Raises:
        UserError: Options that cannot be; a folder with another run.
    """
    workers = check_options(config)
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
        drop_static=config.drop_static,
        notes=_notes(config, recipe),
        checkpoint_every=config.checkpoint_every,
        log_samples=config.log_samples,
    )
    return workers, job, data


def check_options(config: Train) -> int | tuple[int, int]:
    """Check what can be checked without the data; returns the number of workers.

    Raises:
        UserError: An option out of range, or without effect.
    """
    if config.recipe not in RECIPES:
        raise UserError(f"unknown recipe {config.recipe!r}; there are {', '.join(RECIPES)}")
    if config.drop_static is not None and config.method in ("token_drop", "tome"):
        raise UserError(f"--drop-static cannot be combined with --method {config.method}")
    if config.drop_static is not None and not 0 <= config.drop_static <= 255:
        raise UserError(f"--drop-static must be between 0 and 255, got {config.drop_static:g}")
    for name, least in (("num_clips", 0), ("clips_per_video", 1), ("checkpoint_every", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    match = re.fullmatch(r"(\d+)(?::(\d+))?", config.num_workers)
    if not match:
        raise UserError(f"--num-workers must be N or MIN:MAX, got {config.num_workers!r}")
    least, most = int(match[1]), int(match[2] or match[1])
    if most < least or (match[2] and not least):
        raise UserError(f"--num-workers {config.num_workers}: MIN must be at least 1 and at most MAX")
    idle = ("storage", "address") if most == 0 else ("device", "compile")
    for name in idle:
        if getattr(config, name):
            raise UserError(f"--{name} has no effect {'without' if most == 0 else 'with'} --num-workers")
    if "://" in config.cache and most == 0:
        raise UserError("--cache must be a folder without --num-workers, not a URI")
    if config.strategy == "fsdp" and most == 0:
        raise UserError("--strategy fsdp needs --num-workers")
    if most == 0:
        choose_device(config.device)
    return (least, most) if match[2] else most


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

    if is_done(Path(job.output)):
        return
    with connected(config.address):
        with checking_input():
            sources = worker_sources(data, job, _clips(config), config.cache, int(config.cache_gb * 1e9))
        log = functools.partial(RunLog, job.output, _run(config))
        asked = Workers(count=workers, strategy=config.strategy, storage=config.storage or job.output)
        try:
            with showing(Path(job.output)):
                fit(job, sources, asked, log)
        except WorkersFailedError as error:
            raise JobFailed(str(error)) from error
        except TooFewCpusError as error:
            raise UserError(f"--num-workers {config.num_workers}: {error}") from error


def _run(config: Train) -> dict[str, Any]:
    """Of a curve record, what the workers do not know."""
    return {"data": config.data, "fold": config.split_column, "recipe": config.recipe}


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
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *(shlex.quote(str(value)) for value in values)]
    return " ".join(words)


def _adapt(recipe: Recipe, config: Train, start: Checkpoint | None, num_classes: int) -> Recipe:
    """The recipe with what the command line changes.

    Raises:
        ValueError: An unknown method or stage, a recipe that needs a model to start from, or a number out of range.
    """
    sizes = recipe.model or (start and start.config)
    if not sizes:
        raise ValueError(f"recipe {config.recipe!r} starts from a model: give --init MODEL")
    model = with_method(dataclasses.replace(sizes, num_classes=num_classes), config.method)
    stages, routing = _chosen(recipe.train.stages, config.stages), METHODS[config.method].routing
    if routing:
        stages = tuple(dataclasses.replace(stage, routing=routing) for stage in stages)
    elif model.reduces_tokens:  # at full width throughout: there are no nested widths to train
        stages = tuple(
            dataclasses.replace(stage, routing="dense") if stage.routing == "nested" else stage for stage in stages
        )
    if config.capacities:
        at_own_capacity = capacities_of(config.method, model, config.capacities) != config.capacities
        if at_own_capacity or not any(stage.routing == "mone" for stage in stages):
            raise ValueError("--capacities has no effect: nothing is trained at a capacity that can be chosen")
        for capacity in config.capacities:
            check_capacity(capacity, model.num_experts)
        stages = tuple(dataclasses.replace(stage, capacities=config.capacities) for stage in stages)
    if config.epochs:
        stages = with_epochs(stages, config.epochs)
    return Recipe(
        model=model,
        train=dataclasses.replace(recipe.train, stages=stages, seed=config.seed, compile=config.compile),
        num_clips=config.num_clips or recipe.num_clips,
    )


def _chosen(stages: tuple[Stage, ...], names: tuple[str, ...]) -> tuple[Stage, ...]:
    for name in names:
        if name not in [stage.name for stage in stages]:
            raise ValueError(f"no stage {name!r}; the recipe has {', '.join(stage.name for stage in stages)}")
    return tuple(stage for stage in stages if stage.name in names) if names else stages


def with_epochs(stages: tuple[Stage, ...], epochs: tuple[int, ...]) -> tuple[Stage, ...]:
    """Stages of other lengths.

    Args:
        stages: To be changed.
        epochs: One for all, or one for each.

    Raises:
        ValueError: Another number of them, or fewer than 1 epoch.
    """
    if len(epochs) not in (1, len(stages)) or min(epochs) < 1:
        shown = " ".join(map(str, epochs))
        raise ValueError(f"--epochs must be one number or {len(stages)}, one a stage, of at least 1; got {shown}")
    each = epochs * len(stages) if len(epochs) == 1 else epochs
    return tuple(dataclasses.replace(stage, epochs=count) for stage, count in zip(stages, each, strict=True))


def _check_same_run(output: Path, config: Train, recipe: Recipe) -> None:
    """Keep the run's description beside it, and refuse to continue another one."""
    description = json.dumps(
        {name: getattr(config, name) for name in ("method", *_DECISIVE)} | {"recipe": dataclasses.asdict(recipe)},
        indent=1,
        default=str,
    )
    path = output / "config.json"
    if not path.exists():
        write_whole(path, description.encode())
    elif path.read_text() != description:
        raise UserError(f"{output} holds another run; choose another --output")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("train", Train, train, argv)


if __name__ == "__main__":
    sys.exit(main())
