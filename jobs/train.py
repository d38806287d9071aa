"""Train a model by a recipe, on labelled videos or on generated motions; one process, one device.

python -m jobs.train --recipe motions --data motions --output DIR
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.inputs import choose_device, make_output
from jobs.recipes import RECIPES, Recipe
from mone.baselines import METHODS, capacities_of, with_method
from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.model import ViViT
from mone.training import DivergedError, EpochReport, MemoryClips, Trainer, accuracy
from mone.transfer import initialise_from
from pipelines.synthetic import MOTIONS
from pipelines.synthetic_stream import motions

STATE_FILE, METRICS_FILE, MODEL_DIR = "state.pt", "metrics.jsonl", "model"
MOTIONS_DATA = "motions"
_SHOWN_CAPACITIES = (0.2, 0.4, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Train by a recipe and write DIR/model; stopped or killed, the same command continues after its last epoch."""

    data: str
    """Labelled videos (.csv/.parquet/.jsonl with video, label, split; or a folder per class), or "motions"."""
    output: str
    """DIR for the model, the state to continue from, and metrics.jsonl."""
    recipe: str = "motions"
    """One of the functions in jobs/recipes.py."""
    method: str = "mone"
    """"mone", or the baseline to train in its place (mone/baselines.py): dense, random_router, uniform, proportionate,
    submodel, token_drop, tome."""
    init: str = ""
    """Model folder to start from: its weights, fitted to the recipe's sizes; new classes get a new head."""
    num_clips: int = 0
    """Clips to render for "motions"; 0 takes the recipe's number."""
    clips_per_video: int = 1
    """Training clips from each labelled video, spread evenly."""
    epochs: int = 0
    """Epochs of each stage; 0 takes the recipe's."""
    seed: int = 0
    """Of weights, order and draws."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one."""


def train(config: Train) -> None:
    """Run the job."""
    if config.recipe not in RECIPES:
        raise UserError(f"unknown recipe {config.recipe!r}; there are {', '.join(RECIPES)}")
    for name, least in (("num_clips", 0), ("epochs", 0), ("clips_per_video", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    with checking_input():
        load_clips, labels = _data(config)
        start = read_checkpoint(config.init) if config.init else None
        recipe = _adapt(RECIPES[config.recipe](), config, start, len(labels))
    device = choose_device(config.device)
    output = make_output(config.output)
    _check_same_run(output, config, recipe)

    torch.manual_seed(config.seed)
    model = ViViT(recipe.sizes)
    if start:
        with checking_input():
            for line in initialise_from(model, start, labels=labels):
                print(line, file=sys.stderr)
    trainer = Trainer(model.to(device), recipe.train)
    if (output / STATE_FILE).exists():
        trainer.load(output / STATE_FILE)
        print(f"continue after epoch {trainer.epoch} of {recipe.train.epochs}", file=sys.stderr)
    if trainer.epoch < recipe.train.epochs:
        clips, held_out = (part.to(device) for part in load_clips(recipe))
        if not len(clips):
            raise UserError(f"no clip of {config.data} can be read")
        _train_epochs(trainer, clips, held_out, output, capacities_of(config.method, recipe.sizes, _SHOWN_CAPACITIES))
    notes = _notes(config, recipe, output)
    save_checkpoint(trainer.averaged, labels, output / MODEL_DIR, dtype=torch.bfloat16, notes=notes)
    print(output / MODEL_DIR)


def _train_epochs(
    trainer: Trainer, clips: MemoryClips, held_out: MemoryClips, output: Path, capacities: tuple[float, ...]
) -> None:
    try:
        for report in trainer.run(clips):
            scores = {}
            if len(held_out):
                scores = {capacity: accuracy(trainer.averaged, held_out, capacity) for capacity in capacities}
            _write_metrics(output / METRICS_FILE, report, scores)
            trainer.save(output / STATE_FILE)
            print(_line(report, scores), file=sys.stderr)
    except DivergedError as error:
        raise JobFailed(f"{error}; the state after epoch {trainer.epoch} is kept") from error


def _write_metrics(path: Path, report: EpochReport, scores: dict[float, float]) -> None:
    """Add the epoch's line; before its state is saved, in place of what a run stopped between the two has left."""
    before = path.read_text().splitlines()[: report.epoch - 1] if path.exists() else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in [*before, json.dumps(report._asdict() | {"val_top1": scores})]))
    partial.replace(path)


def _line(report: EpochReport, scores: dict[float, float]) -> str:
    shown = "  ".join(f"val@{capacity:g} {score:.1%}" for capacity, score in scores.items())
    return (
        f"epoch {report.epoch:>3}/{report.epochs} {report.stage:<9} loss {report.loss:.4f}  train {report.accuracy:.1%}"
        f"  {shown}  alpha {report.alpha:.3f}  {report.clips_per_s:,.0f} clips/s"
    )


def _notes(config: Train, recipe: Recipe, output: Path) -> str:
    """For the model card: what was run, and the last epoch's figures."""
    stages = ", then ".join(f"{stage.epochs} epochs of {stage.name} ({stage.routing})" for stage in recipe.train.stages)
    notes = f"`{_command(config)}`, seed {config.seed}: {stages}."
    if not (output / METRICS_FILE).exists():
        return notes
    last = json.loads((output / METRICS_FILE).read_text().splitlines()[-1])
    scores = [f"{score:.1%} at capacity {float(capacity):.3g}" for capacity, score in last["val_top1"].items()]
    top1 = f"top-1 on the val split {', '.join(scores)}" if scores else "no val split"
    return f"{notes} Training loss {last['loss']:.3f}; {top1}."


def _command(config: Train) -> str:
    """The command with every option that decides the model, ready for a shell."""
    words = ["python -m jobs.train"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        always, never = field.name in ("data", "recipe", "method"), field.name in ("output", "device")
        if always or (value != field.default and not never):
            words.append(f"--{field.name.replace('_', '-')} {shlex.quote(str(value))}")
    return " ".join(words)


LoadClips = Callable[[Recipe], tuple[MemoryClips, MemoryClips]]


def _data(config: Train) -> tuple[LoadClips, tuple[str, ...]]:
    """How to load training and held-out clips of a recipe, and the names of the classes."""
    return (_rendered, MOTIONS) if config.data == MOTIONS_DATA else _labelled(config)


def _rendered(recipe: Recipe) -> tuple[MemoryClips, MemoryClips]:
    return motions("train", recipe.num_clips, recipe.sizes), motions("val", 1200, recipe.sizes)


def _labelled(config: Train) -> tuple[LoadClips, tuple[str, ...]]:
    """Labelled videos; the test split is never looked at, and without splits everything is for training.

    Raises:
        ArchiveError: Data that cannot be listed.
    """
    # Here, so that a machine which only renders needs no decoder.
    from pipelines.archive import list_labelled
    from pipelines.timeline import ClipPlan
    from pipelines.training_stream import labelled

    videos = list(list_labelled(config.data))
    parts = [[video for video in videos if video.split in splits] for splits in (("train", ""), ("val",))]
    if not parts[0]:
        raise UserError(f"{config.data} has no rows with split 'train'")
    labels = tuple(sorted({video.label for video in videos}))

    def decode(recipe: Recipe) -> tuple[MemoryClips, MemoryClips]:
        plan = ClipPlan(span_s=recipe.sizes.span_s, clips_per_video=config.clips_per_video)
        train, val = (labelled(part, labels, plan, recipe.sizes) for part in parts)
        for name, reason in (train.failures | val.failures).items():
            print(f"left out {name}: {reason}", file=sys.stderr)
        return train.clips, val.clips

    return decode, labels


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
        {"data": config.data, "clips_per_video": config.clips_per_video, "recipe": dataclasses.asdict(recipe)},
        indent=1,
        default=str,
    )
    path = output / "config.json"
    if path.exists() and path.read_text() != description:
        raise UserError(f"{output} holds another run; choose another --output")
    path.write_text(description)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("train", Train, train, argv)


if __name__ == "__main__":
    sys.exit(main())
