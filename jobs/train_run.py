"""From options to a run: the recipe with what the command line changes, and the folder that belongs to it alone."""

import dataclasses
import json
from pathlib import Path

from jobs.cli import UserError, checking_input
from jobs.inputs import make_output
from jobs.recipes import RECIPES, Recipe
from jobs.train_options import DECISIVE, Train, check_options
from jobs.training_data import TrainingData, training_data
from mone.baselines import METHODS, capacities_of, with_method
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint, read_checkpoint, write_whole
from mone.stages import Stage
from pipelines.train_loop import TrainJob


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
        engine=config.engine,
        cuda_graphs=config.cuda_graphs,
    )
    return workers, job, data


def _notes(config: Train, recipe: Recipe) -> str:
    """For the model card: what was run."""
    stages = ", then ".join(f"{stage.epochs} epochs of {stage.name} ({stage.routing})" for stage in recipe.train.stages)
    return f"`{config.command()}`, seed {config.seed}: {stages}."


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
        train=dataclasses.replace(recipe.train, stages=stages, seed=config.seed),
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
        {name: getattr(config, name) for name in ("method", *DECISIVE)}
        | ({} if config.drop_static is None else {"drop_static": config.drop_static})  # measured with the model
        | {"recipe": dataclasses.asdict(recipe)},
        indent=1,
        default=str,
    )
    path = output / "config.json"
    if not path.exists():
        write_whole(path, description.encode())
    elif path.read_text() != description:
        raise UserError(f"{output} holds another run; choose another --output")
