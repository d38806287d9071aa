"""A table that can be believed: MoNE and all that it has to beat, over seeds and folds, on the same clips.

python -m jobs.sweep --recipe motions --data motions --output runs/motions --drop-static 4
python -m jobs.sweep --recipe small_videos --data LABELLED --output runs/videos --split-columns fold1 fold2 fold3
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.curves import Curves, curves
from jobs.inputs import make_output
from jobs.recipes import RECIPES
from jobs.sweep_runs import METHODS_SWEPT, Plan, SweepRun
from jobs.train import is_done, load_clips
from jobs.train_options import Train, check_options
from jobs.train_run import prepare
from jobs.training_data import training_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Train each method with each seed on each fold, as tasks on a Ray cluster, and write the table and plot of all.

    Methods that do the same in the recipe's first stages share these: nested pre-training for those that route, dense
    training for those at full width. Stopped or killed, the same command continues; runs that are done are left alone.
    """

    data: str
    """Labelled videos, or "motions"."""
    output: str
    """DIR for the runs, DIR/curves.md, .svg, .png and .json; every node must see it."""
    recipe: str = "motions"
    """One of the functions in jobs/recipes.py, of at least two stages; the last is what methods differ in."""
    methods: tuple[str, ...] = METHODS_SWEPT
    """Names from mone/baselines.py; dense_flops is dense training with as many operations as MoNE's."""
    capacities: tuple[float, ...] = (0.2, 0.4)
    """Effective capacities at which MoNE is also trained alone, a model for each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each."""
    common_start: bool = False
    """Train all but the last stage once, with the first seed, so that seeds differ in the last stage alone; default
    once for each seed."""
    split_columns: tuple[str, ...] = ("split",)
    """Columns of the data that say train, val or test: one, or several folds."""
    epochs: tuple[int, ...] = ()
    """Epochs: one number for every stage, or one for each; default the recipe's."""
    num_clips: int = 0
    """Clips to render for "motions"; 0 takes the recipe's number."""
    clips_per_video: int = 1
    """Training clips from each labelled video."""
    drop_static: float | None = None
    """Measure dense and MoNE a second time without patches that changed by at most so many grey levels."""
    gpus_per_run: float = 0.0
    """Share of a GPU that a run takes: small models train side by side. 0 trains on CPUs."""
    cpus_per_run: float = 1.0
    """Cores that a run takes."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else Ray starts here."""


def sweep(config: Sweep) -> None:
    """Run the job."""
    if config.recipe not in RECIPES:
        raise UserError(f"unknown recipe {config.recipe!r}; there are {', '.join(RECIPES)}")
    with checking_input():
        runs = _runs(config)
    _check(config, runs)
    output = make_output(config.output)
    left = [one for one in runs if not _is_done(one)]
    if left:
        _train(config, left)
    shown = tuple(str(one.folder) for one in runs if one.is_shown)
    curves(Curves(runs=shown, output=str(output)))


def _check(config: Sweep, runs: list[SweepRun]) -> None:
    """Find what is wrong with the options before any run starts."""
    if not runs:
        raise UserError("give at least one of --methods, --seeds and --split-columns each")
    for name in ("gpus_per_run", "cpus_per_run"):
        value = getattr(config, name)
        if not (0 <= value <= 1 or value % 1 == 0 < value):
            raise UserError(f"--{name.replace('_', '-')} must be a share of one, or a whole number, got {value:g}")
    for one in runs:
        check_options(one.config)
    with checking_input():
        for column in config.split_columns:
            training_data(config.data, column)


def _is_done(one: SweepRun) -> bool:
    if not is_done(one.folder):
        return False
    prepare(one.config)  # refuses another run in its place
    return True


def _train(config: Sweep, runs: list[SweepRun]) -> None:
    from jobs.cluster import connected
    from jobs.sweep_tasks import train_all

    for first in {one.config.split_column: one for one in reversed(runs)}.values():
        _, job, data = prepare(first.config)
        load_clips(first.config, job, data)  # into the cache, once for all runs
    with connected(config.address):
        failed = train_all(runs, gpus=config.gpus_per_run, cpus=config.cpus_per_run)
    if failed:
        raise JobFailed(f"{len(failed)} of {len(runs)} runs failed; the first, {failed[0]}")


def _runs(config: Sweep) -> list[SweepRun]:
    """All runs, each once and after what it starts from."""
    common = {"data": config.data, "num_clips": config.num_clips, "clips_per_video": config.clips_per_video}
    common |= {"recipe": config.recipe, "cache": str(Path(config.output) / "clips")}
    found: dict[Path, SweepRun] = {}
    for seed in config.seeds:
        for fold in config.split_columns:
            folder = Path(config.output) / fold / str(seed)
            plan = Plan(
                base=Train(**common, output="", seed=seed, split_column=fold),
                folder=folder,
                starts=(folder.parent, config.seeds[0]) if config.common_start else (folder, seed),
                methods=config.methods,
                capacities=config.capacities,
                epochs=config.epochs,
                drop_static=config.drop_static,
            )
            for one in plan.runs():
                found.setdefault(one.folder, one)
    return [*found.values()]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("sweep", Sweep, sweep, argv)


if __name__ == "__main__":
    sys.exit(main())
