"""A sweep: which runs it needs, as values; and a small one for real, with a run that fails and a second start."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import jobs.cluster
import jobs.sweep
import jobs.sweep_tasks
from jobs.recipes import RECIPES, Recipe
from jobs.sweep_runs import DENSE_FLOPS, METHODS_SWEPT, Plan, SweepRun
from jobs.train_options import Train
from mone.baselines import METHODS
from mone.compute import training_flops
from mone.stages import Stage, TrainConfig
from tests.conftest import TINY, complaints, run_job

FOLDER = Path("/runs/split/0")


def recipe(*epochs: int) -> Callable[[], Recipe]:
    """Of one, two or three stages."""
    names = {1: ("mone",), 2: ("nested", "mone"), 3: ("dense", "nested", "mone")}[len(epochs)]
    stages = tuple(
        Stage(name=f"{name} stage", epochs=count, routing=name, capacities=(0.2, 0.3, 0.7))
        for name, count in zip(names, epochs, strict=True)
    )
    return lambda: Recipe(model=TINY, train=TrainConfig(stages=stages), num_clips=12)


@pytest.fixture(autouse=True)
def _recipes(monkeypatch):
    for name, epochs in {"one": (5,), "two": (10, 30), "three": (3, 10, 30)}.items():
        monkeypatch.setitem(RECIPES, name, recipe(*epochs))


def runs_of(methods=METHODS_SWEPT, *, name="two", capacities=(0.2, 0.4), epochs=(), drop_static=None) -> list[SweepRun]:
    base = Train(data="motions", output="", recipe=name, seed=7, split_column="fold", cache="/clips")
    options = {"methods": methods, "capacities": capacities, "epochs": epochs, "drop_static": drop_static}
    return Plan(base=base, folder=FOLDER, starts=(FOLDER, 7), **options).runs()


def chain(runs: list[SweepRun], name: str) -> list[Train]:
    """A run and all before it that went into its weights, the first one first."""
    by_folder = {run.folder: run for run in runs}
    run, found = by_folder[FOLDER / name], []
    while True:
        found.insert(0, run.config)
        if run.after is None:
            return found
        run = by_folder[run.after]


@pytest.mark.parametrize("name", ["two", "three"])
@pytest.mark.parametrize("methods", [METHODS_SWEPT, METHODS_SWEPT[::-1], tuple(METHODS)])
def test_each_run_is_there_once_after_what_it_starts_from(name, methods):
    runs, seen = runs_of((*methods, *methods), name=name, capacities=(0.4, 0.2, 0.4)), set()
    for run in runs:
        assert run.folder not in seen and (run.after is None) == (run.config.init == "")
        if run.after:
            assert run.after in seen and run.config.init == str(run.after / "model")
        seen.add(run.folder)
        common = (run.config.seed, run.config.split_column, run.config.cache, run.config.recipe)
        assert common == (7, "fold", "/clips", name)
    shown = {run.folder.name for run in runs if run.is_shown}
    assert shown == {*methods, "mone_0.2", "mone_0.4"}


@pytest.mark.parametrize("method", [*METHODS, DENSE_FLOPS])
@pytest.mark.parametrize("name", ["two", "three"])
def test_every_method_passes_all_stages_in_their_order(name, method):
    configs = chain(runs_of([method], name=name), method)
    stages = RECIPES[name]().train.stages
    assert [stage for config in configs for stage in config.stages] == [stage.name for stage in stages]
    epochs = [count for config in configs for count in config.epochs]
    if method != DENSE_FLOPS:
        assert epochs == [stage.epochs for stage in stages]


@pytest.mark.parametrize(
    "method, start",
    [
        *((method, "mone") for method in ("mone", "random_router", "uniform", "proportionate", "submodel")),
        *((method, "dense") for method in ("dense", "token_drop", "tome")),
    ],
)
def test_tokens_at_full_width_start_from_dense_weights_and_all_others_from_nested_ones(method, start):
    first, last = chain(runs_of(tuple(METHODS)), method)
    assert (first.method, last.method) == (start, method)


def test_a_model_per_capacity_starts_where_the_model_of_all_does():
    runs = runs_of(["mone"], capacities=(0.2, 0.45), drop_static=4.0)
    starts = {run.after for run in runs if run.is_shown}
    assert starts == {FOLDER / "start-nested10"}
    assert {run.folder.name: run.config.capacities for run in runs if run.is_shown} == {
        "mone": (),
        "mone_0.2": (0.2,),
        "mone_0.45": (0.45,),
    }


def test_static_patches_are_dropped_of_mone_and_dense():
    runs = runs_of(drop_static=4.0)
    assert {run.folder.name for run in runs if run.config.drop_static == 4.0} == {"mone", "dense"}
    assert {run.config.drop_static for run in runs} == {None, 4.0}


@pytest.mark.parametrize(
    "name, epochs", [("two", ()), ("two", (1, 1)), ("two", (7, 40)), ("three", ()), ("three", (9,))]
)
def test_dense_training_takes_the_operations_of_mone(name, epochs):
    """To half an epoch of each stage, but at least one."""
    runs = runs_of(["mone", DENSE_FLOPS], name=name, epochs=epochs)
    one = TINY.tokens_per_budget()
    sets = {
        "dense stage": [(0, 0, 0, one)],
        "nested stage": [(one, 0, 0, 0), (0, one, 0, 0), (0, 0, one, 0), (0, 0, 0, one)],
        "mone stage": [TINY.token_counts(capacity) for capacity in (0.2, 0.3, 0.7)],
    }
    full, total = training_flops(TINY, (0, 0, 0, one)), 0.0
    stages = [stage for config in chain(runs, "mone") for stage in config.stages]
    epochs_of = dict(zip(stages, [count for config in chain(runs, "mone") for count in config.epochs], strict=True))
    for config in chain(runs, DENSE_FLOPS):
        assert config.method == "dense" and not config.capacities and config.drop_static is None
        (stage,), (count,) = config.stages, config.epochs
        costs = [training_flops(TINY, counts) for counts in sets[stage]]
        wanted = epochs_of[stage] * sum(costs) / len(costs) / full
        assert count == 1 or abs(count - wanted) <= 0.5
        assert wanted <= epochs_of[stage] and (count == epochs_of[stage] or stage != "dense stage")
        total += count - wanted
    assert abs(total) <= 1


@pytest.mark.parametrize(
    "options, named",
    [
        (["--recipe", "pancakes"], "unknown recipe 'pancakes'"),
        (["--recipe", "one"], "has one stage"),
        (["--recipe", "adapt"], "starts from a model"),
        (["--methods", "mone", "astrology"], "unknown method 'astrology'"),
        (["--methods"], "--methods"),
        (["--seeds"], "--seeds"),
        (["--capacities", "0.4", "7"], "capacity must be between"),
        (["--epochs", "1", "2", "3"], "--epochs must be one number or 2"),
        (["--epochs", "0"], "--epochs must be"),
        (["--num-clips", "-1"], "--num-clips must be"),
        (["--drop-static", "256"], "--drop-static must be"),
        (["--gpus-per-run", "-1"], "--gpus-per-run must be"),
        (["--gpus-per-run", "1.5"], "--gpus-per-run must be"),
        (["--cpus-per-run", "nan"], "--cpus-per-run must be"),
        (["--data", "nothing/there.csv"], "nothing/there.csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_anything_is_made(tmp_path, capsys, options, named):
    out = tmp_path / "out"
    assert jobs.sweep.main(["--data", "motions", "--recipe", "two", "--output", str(out), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and named in printed.err
    assert not out.exists()


def test_what_is_the_same_is_trained_once():
    runs = runs_of(METHODS_SWEPT, name="three")
    starts = {run.folder.name for run in runs if not run.is_shown}
    few = {name for name in starts if "dense10" not in name and "nested10" not in name}
    assert starts - few == {"start-dense3-nested10", "start-dense3-dense10"}
    assert "start-dense3" in few and len(few) == 2  # and dense training of the operations of MoNE


@pytest.mark.parametrize("common", [False, True])
def test_seeds_can_differ_in_the_last_stage_alone(common):
    runs = jobs.sweep._runs(
        jobs.sweep.Sweep(data="motions", output="/runs", recipe="two", seeds=(4, 5), common_start=common)
    )
    folders = [run.folder for run in runs]
    assert len(set(folders)) == len(folders)
    starts = {run.folder: run.config.seed for run in runs if not run.is_shown}
    assert set(starts.values()) == ({4} if common else {4, 5})
    assert {folder.parent for folder in starts} == (
        {Path("/runs/split")} if common else {Path("/runs/split/4"), Path("/runs/split/5")}
    )
    for run in runs:
        if run.is_shown:
            assert run.folder.parent == Path(f"/runs/split/{run.config.seed}") and run.after in starts


# Of the real recipe, with a clip of each motion and an epoch of each stage: five runs of seconds.
SMALL = ["--data", "motions", "--num-clips", "12", "--epochs", "1", "--seeds", "0", "--methods", "mone", "dense"]
SMALL += ["--capacities", "--drop-static", "4"]


def sweep(output: Path) -> subprocess.CompletedProcess[str]:
    return run_job("sweep", *SMALL, "--output", output)


def trained(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Of all runs that are done: when their files were written, and what is in them."""
    files = [path for config in folder.glob("*/model/config.json") for path in config.parents[1].rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}


def test_a_run_without_room_on_its_gpu_says_what_gives_it_more(monkeypatch):
    def too_large(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 102.00 MiB.")

    monkeypatch.setattr(jobs.sweep_tasks, "train", too_large)
    assert "--gpus-per-run" in jobs.sweep_tasks._train(Train(data="motions", output="out"), None)


@pytest.mark.ray
def test_a_run_fails_and_the_same_command_does_only_what_is_left(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "split" / "0"
    runs.mkdir(parents=True)
    (runs / "start-dense1-dense1").write_text("in the way")
    first = sweep(tmp_path)
    assert first.returncode == 1 and first.stdout == "", first.stderr
    (line,) = complaints(first.stderr, "sweep")
    assert f"2 of 5 runs failed; the first, {runs / 'start-dense1-dense1'}: cannot write to" in line
    assert f"{runs / 'dense'}: what it starts from failed" in first.stderr
    done = trained(runs)
    mone = {"start-dense1", "start-dense1-nested1", "mone"}
    assert {path.relative_to(runs).parts[0] for path in done} == mone
    assert not (tmp_path / "curves.json").exists()

    (runs / "start-dense1-dense1").unlink()
    second = sweep(tmp_path)
    assert second.returncode == 0, second.stderr
    everything = trained(runs)
    assert {path: everything[path] for path in done} == done
    late = {path.relative_to(runs).parts[0] for path in everything.keys() - done.keys()}
    assert late == {"start-dense1-dense1", "dense"}
    assert second.stdout == (tmp_path / "curves.md").read_text()
    check_table(json.loads((tmp_path / "curves.json").read_text()))
    assert len([*(tmp_path / "clips").iterdir()]) == 3

    # Nothing is left to train: the table is made again, without Ray.
    before = (tmp_path / "curves.json").read_bytes()
    (tmp_path / "curves.json").unlink()
    monkeypatch.setattr(jobs.cluster, "connected", lambda _: pytest.fail("Ray was started"))
    assert jobs.sweep.main([*SMALL, "--output", str(tmp_path)]) == 0
    assert trained(runs) == everything and (tmp_path / "curves.json").read_bytes() == before
    (tmp_path / "split" / "0" / "mone" / "config.json").write_text("{}")
    assert jobs.sweep.main([*SMALL, "--output", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err


def check_table(content: dict) -> None:
    assert [(run["method"], run["capacity"], run["epochs"]) for run in content["runs"]] == [
        ("mone", None, 3),
        ("dense", None, 3),
    ]
    assert all((run["fold"], run["seed"], run["train_clips"]) == ("split", 0, 12) for run in content["runs"])
    series: dict[tuple, list[float]] = {}
    for row in content["rows"]:
        series.setdefault((row["method"], row["own_capacity"], row["drop_static"]), []).append(row["capacity"])
        assert (row["num_runs"], row["num_clips"]) == (1, 12)
    everywhere = [0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    assert series == {
        ("dense", False, None): [1.0],
        ("dense", False, 4.0): [1.0],
        ("mone", False, None): everywhere,
        ("mone", False, 4.0): everywhere,
    }
