"""Which training runs a sweep needs, as values: what each trains, and which run it starts from."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jobs.recipes import RECIPES
from jobs.train import Train, with_epochs
from mone.baselines import METHODS, with_method
from mone.capacity import check_capacity
from mone.compute import training_flops
from mone.config import ModelConfig
from mone.stages import Stage
from pipelines.train_loop import MODEL_DIR

DENSE_FLOPS = "dense_flops"
METHODS_SWEPT = ("mone", "random_router", "uniform", "submodel", "token_drop", "dense", DENSE_FLOPS)
_WITHOUT_STATIC = ("mone", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    """A training run of a sweep.

    Attributes:
        config: What to train; its output is the run's folder.
        after: Folder of the run whose model it starts from; None: from random weights.
        is_shown: Whether it belongs into the table, or is the start of others.
    """

    config: Train
    after: Path | None = None
    is_shown: bool = True

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self.config.output)


def in_order(
    base: Train,
    folder: Path,
    methods: Sequence[str],
    capacities: Sequence[float],
    epochs: tuple[int, ...],
    drop_static: float | None,
) -> Iterator[SweepRun]:
    """The runs of one seed and fold, each after what it starts from.

    All but the recipe's last stage is trained twice, by MoNE and by dense, and the last once for each method: from
    dense weights where tokens stay at full width, else from MoNE's. So epochs are matched; `dense_flops` has so many
    epochs of each stage that its operations are those of MoNE.

    Args:
        base: What all runs have in common; its method, stages and output are replaced.
        folder: A run is FOLDER/NAME.
        methods: Names of `METHODS_SWEPT` or of `mone.baselines.METHODS`.
        capacities: At which MoNE is trained alone.
        epochs: Of each stage; one for all; () are the recipe's.
        drop_static: Of `Train`, for MoNE and dense.

    Raises:
        ValueError: A method that does not exist, a capacity out of range, or a recipe of one stage or without sizes.
    """
    recipe = RECIPES[base.recipe]()
    if not recipe.model:
        raise ValueError(f"recipe {base.recipe!r} starts from a model; a sweep starts from random weights")
    stages = with_epochs(recipe.train.stages, epochs) if epochs else recipe.train.stages
    *first, last = stages
    if not first:
        raise ValueError(f"recipe {base.recipe!r} has one stage; a sweep needs a common start and a last stage")
    for method in methods:
        if method not in METHODS and method != DENSE_FLOPS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join((*METHODS, DENSE_FLOPS))}")
    for capacity in capacities:
        check_capacity(capacity, recipe.model.num_experts)
    base = dataclasses.replace(base, stages=(last.name,), epochs=(last.epochs,))
    made: set[str] = set()

    def start(method: str, name: str) -> Iterator[SweepRun]:
        if name not in made:
            made.add(name)
            own = {"stages": tuple(stage.name for stage in first), "epochs": tuple(stage.epochs for stage in first)}
            config = dataclasses.replace(base, output=str(folder / name), method=method, **own)
            yield SweepRun(config=config, is_shown=False)

    def end(method: str, name: str, after: str, **changes: object) -> SweepRun:
        at = folder / after
        static = drop_static if method in _WITHOUT_STATIC else None
        own = {"output": str(folder / name), "method": method, "init": str(at / MODEL_DIR), "drop_static": static}
        return SweepRun(config=dataclasses.replace(base, **(own | changes)), after=at)

    for method in dict.fromkeys(methods):
        if method == DENSE_FLOPS:
            yield from _dense_flops(base, folder, recipe.sizes, stages)
            continue
        at_full_width = method == "dense" or with_method(recipe.sizes, method).reduces_tokens
        after = "dense_start" if at_full_width else "nested_start"
        yield from start("dense" if at_full_width else "mone", after)
        yield end(method, method, after)
        if method == "mone":
            for capacity in dict.fromkeys(capacities):
                yield end(method, f"mone_{capacity:g}", after, capacities=(capacity,), drop_static=None)


def _dense_flops(base: Train, folder: Path, sizes: ModelConfig, stages: tuple[Stage, ...]) -> Iterator[SweepRun]:
    """Dense training stage by stage, each with as many operations as MoNE's, rounded to epochs."""
    full = training_flops(sizes, sizes.token_counts(1.0))
    after = None
    for number, stage in enumerate(stages, 1):
        is_last = number == len(stages)
        flops = fmean(training_flops(sizes, counts) for counts in stage.all_counts(sizes))
        config = dataclasses.replace(
            base,
            output=str(folder / (DENSE_FLOPS if is_last else f"{DENSE_FLOPS}_{number}")),
            method="dense",
            stages=(stage.name,),
            epochs=(max(1, round(stage.epochs * flops / full)),),
            init=str(after / MODEL_DIR) if after else "",
        )
        yield SweepRun(config=config, after=after, is_shown=is_last)
        after = Path(config.output)
