"""The options of a training run, and what of them can be checked before its data is read."""

import dataclasses
import re
import shlex
from dataclasses import dataclass
from typing import Literal

from jobs.cli import UserError
from jobs.inputs import choose_device
from jobs.recipes import RECIPES
from mone.engine.choice import ExactEngine

# Options that decide the model, beside recipe and method.
DECISIVE = (
    *("data", "init", "stages", "capacities", "split_column", "num_clips", "clips_per_video", "epochs", "seed"),
)
_FOR_WORKERS = ("storage", "address", "cache_gb", "max_failures")


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
    max_failures: int = 3
    """With --num-workers, give up when workers failed more often than this in a row, with no new checkpoint in between;
    -1: never. A run that gets on may lose any number of workers and machines."""
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
    """"cuda", "cpu"; default the GPU where there is one. With --num-workers, "cuda" waits for GPUs that an autoscaler
    starts, where by default workers are on CPUs if no GPU is up."""
    engine: ExactEngine = "auto"
    """Code that runs the model's blocks, "reference" being the plainest; all compute the same (docs/performance.md)."""
    cuda_graphs: bool = True
    """On one GPU, repeat steps from CUDA graphs: the same steps, with less work for the host."""
    log_samples: bool = False
    """Write down which samples each step saw, in DIR/samples."""
    address: str = ""
    """Ray cluster, with --num-workers; default RAY_ADDRESS, else Ray starts here."""

    def command(self) -> str:
        """The command with every option that decides the model, ready for a shell."""
        words = ["python -m jobs.train"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("data", "recipe", "method") or (value != field.default and field.name in DECISIVE):
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *(shlex.quote(str(value)) for value in values)]
        return " ".join(words)


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
    for name, least in (("num_clips", 0), ("clips_per_video", 1), ("checkpoint_every", 1), ("max_failures", -1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    match = re.fullmatch(r"(\d+)(?::(\d+))?", config.num_workers)
    if not match:
        raise UserError(f"--num-workers must be N or MIN:MAX, got {config.num_workers!r}")
    least, most = int(match[1]), int(match[2] or match[1])
    if most < least or (match[2] and not least):
        raise UserError(f"--num-workers {config.num_workers}: MIN must be at least 1 and at most MAX")
    for field in dataclasses.fields(config):
        if most == 0 and field.name in _FOR_WORKERS and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} has no effect without --num-workers")
    if most and config.device not in ("", "cuda", "cpu"):
        raise UserError(f"--device must be cuda or cpu, got {config.device!r}")
    if "://" in config.cache and most == 0:
        raise UserError("--cache must be a folder without --num-workers, not a URI")
    if config.strategy == "fsdp" and most == 0:
        raise UserError("--strategy fsdp needs --num-workers")
    if most == 0:
        choose_device(config.device)
    return (least, most) if match[2] else most
