"""Which training runs a sweep needs, as values: what each trains, and which run it starts from."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jobs.recipes import RECIPES
from jobs.train_options import Train
from jobs.train_run import with_epochs
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The runs of one seed and fold.

    All but the recipe's last stage are trained stage by stage, and shared: methods that do the same in a stage after
    the same stages start from one model. The last stage is trained once for each method: from dense weights where
    tokens stay at full width, else from MoNE's. So epochs are matched; `dense_flops` has so many epochs of each stage
    that its operations are those of MoNE.

    Attributes:
        base: What all runs have in common; its method, stages, epochs, start and output are replaced.
        folder: A run is FOLDER/NAME.
        starts: Folder and seed of the runs that others start from; several plans can have the same.
        methods: Names of `METHODS_SWEPT` or of `mone.baselines.METHODS`.
        capacities: At which MoNE is trained alone.
        epochs: Of each stage; one for all; () are the recipe's.
        drop_static: Of `Train`, for MoNE and dense.
    """

    base: Train
    folder: Path
    starts: tuple[Path, int]
    methods: Sequence[str]
    capacities: Sequence[float] = ()
    epochs: tuple[int, ...] = ()
    drop_static: float | None = None

    def runs(self) -> list[SweepRun]:
        """All runs, each once and after what it starts from.

        Raises:
            ValueError: A method that does not exist, a capacity out of range, or a recipe of one stage or without
                sizes.
        """
        sizes, stages = self._checked()
        found: dict[Path, SweepRun] = {}
        for method in dict.fromkeys(self.methods):
            at_full_width = method == DENSE_FLOPS or with_method(sizes, method).reduces_tokens or method == "dense"
            passed = _fewer_epochs(stages, sizes) if method == DENSE_FLOPS else stages
            *starts, last = self._chain(passed, at_full_width)
            for run in starts:
                found.setdefault(run.folder, run)
            trained = "dense" if method == DENSE_FLOPS else method
            own = {"drop_static": self.drop_static if method in _WITHOUT_STATIC else None}
            found[self.folder / method] = self._end(last, method, method=trained, **own)
            for capacity in dict.fromkeys(self.capacities) if method == "mone" else ():
                name = f"mone_{capacity:g}"
                found[self.folder / name] = self._end(last, name, method=method, capacities=(capacity,))
        return [*found.values()]

    def _checked(self) -> tuple[ModelConfig, tuple[Stage, ...]]:
        recipe = RECIPES[self.base.recipe]()
        if not recipe.model:
            raise ValueError(f"recipe {self.base.recipe!r} starts from a model; a sweep starts from random weights")
        stages = with_epochs(recipe.train.stages, self.epochs) if self.epochs else recipe.train.stages
        if len(stages) < 2:
            raise ValueError(
                f"recipe {self.base.recipe!r} has one stage; a sweep needs a common start and a last stage"
            )
        for method in self.methods:
            if method not in METHODS and method != DENSE_FLOPS:
                raise ValueError(f"unknown method {method!r}; there are {', '.join((*METHODS, DENSE_FLOPS))}")
        for capacity in self.capacities:
            check_capacity(capacity, recipe.model.num_experts)
        return recipe.model, stages

    def _chain(self, stages: tuple[Stage, ...], at_full_width: bool) -> Iterator[SweepRun]:
        """A run for each stage; the names of those before the last say what went into them."""
        (folder, seed), after, name = self.starts, None, "start"
        for stage in stages:
            routing = "dense" if at_full_width else stage.routing
            name += f"-{routing}{stage.epochs}"
            config = dataclasses.replace(
                self.base,
                output=str(folder / name),
                method="dense" if routing == "dense" else "mone",
                stages=(stage.name,),
                epochs=(stage.epochs,),
                init=str(after / MODEL_DIR) if after else "",
                seed=seed,
            )
            yield SweepRun(config=config, after=after, is_shown=False)
            after = Path(config.output)

    def _end(self, last: SweepRun, name: str, **changes: object) -> SweepRun:
        own = {"output": str(self.folder / name), "seed": self.base.seed}
        return SweepRun(config=dataclasses.replace(last.config, **(own | changes)), after=last.after)


def _fewer_epochs(stages: tuple[Stage, ...], sizes: ModelConfig) -> tuple[Stage, ...]:
    """As many epochs at full width as take the operations of each stage, rounded."""
    full = training_flops(sizes, sizes.token_counts(1.0))
    shares = [fmean(training_flops(sizes, counts) for counts in stage.all_counts(sizes)) / full for stage in stages]
    return tuple(
        dataclasses.replace(stage, epochs=max(1, round(stage.epochs * share)))
        for stage, share in zip(stages, shares, strict=True)
    )
