"""Parts of a recipe: some stages, other epochs, one capacity, a start from another run; and what is told of it."""

import functools
import json
from pathlib import Path

import pytest
import torch

import jobs.train
import jobs.training_data
from jobs.curve_record import CurveRecord, read_records
from jobs.recipes import RECIPES, Recipe
from mone.checkpoint import read_checkpoint
from mone.clips import MemoryClips
from mone.compute import clip_compute
from mone.stages import Stage, TrainConfig
from mone.static import kept_patches
from mone.training import Trainer
from mone.tubelets import to_patches
from tests.conftest import TINY

NUM_CLIPS = 12


def tiny() -> Recipe:
    stages = (
        Stage(name="first", epochs=1, routing="nested", learning_rate=1e-3),
        Stage(name="second", epochs=1, routing="mone", learning_rate=1e-3),
    )
    return Recipe(model=TINY, train=TrainConfig(stages=stages, batch_size=NUM_CLIPS), num_clips=NUM_CLIPS)


def half_still(split: str, *_: object) -> MemoryClips:
    """Noise in which the left half of every frame repeats the one before."""
    generator = torch.Generator().manual_seed(len(split))
    shape = (NUM_CLIPS, TINY.num_frames, TINY.height_px, TINY.width_px, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    frames[:, 1:, :, : TINY.width_px // 2] = frames[:, :1, :, : TINY.width_px // 2]
    return MemoryClips(frames, torch.arange(NUM_CLIPS))


@pytest.fixture(autouse=True)
def _tiny_recipe_on_one_cpu(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jobs.training_data, "motions", half_still)


def train(output: Path, *arguments: object) -> int:
    return jobs.train.main(["--recipe", "tiny", "--data", "motions", "--output", str(output), *map(str, arguments)])


def epochs_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "epoch"]


def stages_of(folder: Path) -> list[str]:
    return [row["stage"] for row in epochs_of(folder)]


def record_of(folder: Path) -> CurveRecord:
    (record,) = read_records(folder)
    return record


@pytest.mark.parametrize(
    "options, stages",
    [
        (["--stages", "first"], ["first"]),
        (["--stages", "second"], ["second"]),
        (["--stages", "second", "first"], ["first", "second"]),  # in the recipe's order
        (["--epochs", "2"], ["first", "first", "second", "second"]),
        (["--epochs", "1", "2"], ["first", "second", "second"]),
        (["--stages", "second", "--epochs", "3"], ["second"] * 3),
    ],
    ids=" ".join,
)
def test_only_these_stages_for_so_many_epochs(tmp_path, options, stages):
    assert train(tmp_path, *options) == 0
    assert stages_of(tmp_path) == stages and record_of(tmp_path).epochs == len(stages)
    assert record_of(tmp_path).fold == "split"


@pytest.mark.parametrize(
    "options, named",
    [
        (["--stages", "third"], "no stage 'third'; the recipe has first, second"),
        (["--epochs", "1", "2", "3"], "--epochs must be one number or 2"),
        (["--stages", "first", "--epochs", "1", "2"], "--epochs must be one number or 1"),
        (["--epochs", "1", "0"], "--epochs must be"),
        (["--capacities", "0.4", "7"], "capacity must be between 0.125 and 1"),
        (["--capacities", "0.4", "--method", "dense"], "--capacities has no effect"),
        (["--capacities", "0.4", "--method", "uniform"], "--capacities has no effect"),
        (["--capacities", "0.4", "--stages", "first"], "--capacities has no effect"),
        (["--drop-static", "4", "--method", "token_drop"], "--drop-static cannot be combined with --method token_drop"),
        (["--drop-static", "4", "--method", "tome"], "--drop-static cannot be combined with --method tome"),
        (["--drop-static", "-1"], "--drop-static must be between 0 and 255"),
        (["--drop-static", "256"], "--drop-static must be between 0 and 255"),
        (["--drop-static", "nan"], "--drop-static must be between 0 and 255"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_recipe_cannot_be_is_one_line(tmp_path, capsys, options, named):
    assert train(tmp_path / "run", *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and named in printed.err
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_capacity_is_measured_there_alone(tmp_path):
    assert train(tmp_path, "--capacities", 0.3) == 0
    record = record_of(tmp_path)
    assert record.capacity == 0.3 and [point.capacity for point in record.points] == [0.3]
    first, second = epochs_of(tmp_path)
    assert [*first["val_top1"]] == [*second["val_top1"]] == ["0.3"]
    counts = TINY.token_counts(0.3)
    assert second["tokens_per_expert"] == pytest.approx([count / sum(counts) for count in counts])


@pytest.mark.parametrize("options", [[], ["--capacities", "0.3", "0.6"], ["--stages", "first"], ["--method", "dense"]])
def test_a_model_of_many_capacities_is_measured_at_all(tmp_path, options):
    assert train(tmp_path, *options) == 0
    record = record_of(tmp_path)
    expected = [1.0] if "dense" in options else [0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    assert record.capacity is None and [point.capacity for point in record.points] == expected


def test_what_it_starts_from_counts_too(tmp_path):
    assert train(tmp_path / "a", "--stages", "first", "--epochs", 2) == 0
    assert train(tmp_path / "b", "--stages", "second", "--init", tmp_path / "a" / "model") == 0
    assert train(tmp_path / "c", "--stages", "second", "--epochs", 3, "--init", tmp_path / "b" / "model") == 0
    epochs, flops = 0, 0.0
    for name, own in [("a", 2), ("b", 1), ("c", 3)]:
        rows = epochs_of(tmp_path / name)
        assert len(rows) == own
        epochs, flops = epochs + own, flops + sum(row["flops"] for row in rows)
        record = record_of(tmp_path / name)
        assert record.epochs == epochs and record.train_flops == pytest.approx(flops, rel=1e-9)
        assert json.loads((tmp_path / name / "model" / "spent.json").read_text()) == {
            "epochs": record.epochs,
            "train_flops": record.train_flops,
        }
    (tmp_path / "a" / "model" / "spent.json").unlink()  # as of a model that was not trained here
    assert train(tmp_path / "d", "--stages", "second", "--init", tmp_path / "a" / "model") == 0
    assert record_of(tmp_path / "d").epochs == 1


@pytest.mark.parametrize("method", ["mone", "dense", "uniform"])
@pytest.mark.parametrize("threshold", [0, 255])
def test_the_test_split_is_measured_again_without_static_patches(tmp_path, method, threshold):
    assert train(tmp_path, "--method", method, "--drop-static", threshold) == 0
    points = record_of(tmp_path).points
    whole = [point for point in points if point.drop_static is None]
    dropped = [point for point in points if point.drop_static is not None]
    assert [(point.method, point.capacity) for point in dropped] == [(method, point.capacity) for point in whole]
    config = read_checkpoint(tmp_path / "model").config
    kept = [
        len(kept_patches(patches_FNP.numpy(), threshold))
        for patches_FNP in to_patches(half_still("test").frames_STHWC, config)
    ]
    assert max(kept) < config.num_indices * config.num_tokens
    for point in dropped:
        assert point.drop_static == threshold and point.num_clips == NUM_CLIPS
        costs = [clip_compute(config, point.capacity, num_kept).flops for num_kept in kept]
        assert point.flops_per_clip == pytest.approx(sum(costs) / len(costs))


def test_where_nothing_is_static_nothing_changes(tmp_path, monkeypatch):
    moving = half_still("moving")
    moving.frames_STHWC[:, 1:] = moving.frames_STHWC[:, :1] + 16 * torch.arange(1, TINY.num_frames)[:, None, None, None]
    monkeypatch.setattr(jobs.training_data, "motions", lambda *_: moving)
    assert train(tmp_path, "--method", "dense", "--drop-static", 0) == 0
    whole, dropped = record_of(tmp_path).points
    assert (whole.drop_static, dropped.drop_static) == (None, 0)
    assert dropped.flops_per_clip == whole.flops_per_clip and dropped.top1 == whole.top1
    assert dropped.nll == pytest.approx(whole.nll, rel=1e-4)


def test_a_model_folder_without_its_config_is_not_done(tmp_path, monkeypatch):
    assert train(tmp_path) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("it trained again"))
    assert train(tmp_path) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_with_a_cache_the_next_run_has_its_clips_at_once(tmp_path, monkeypatch):
    cache = ["--cache", tmp_path / "clips"]
    assert train(tmp_path / "first", *cache) == 0
    assert len([*(tmp_path / "clips").iterdir()]) == 3  # a file for each split

    @functools.wraps(half_still)  # a file is known by the name of what made it
    def again(*_: object) -> MemoryClips:
        pytest.fail("rendered again")

    monkeypatch.setattr(jobs.training_data, "motions", again)
    assert train(tmp_path / "second", *cache, "--seed", 0) == 0
    for name in ("model/model.safetensors", "curve.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("place", ["s3://bucket/cache", "cache", "cache/below"])
def test_a_cache_that_cannot_be_is_one_line(tmp_path, capsys, place):
    (tmp_path / "cache").touch()
    assert train(tmp_path / "run", "--cache", place if "://" in place else tmp_path / place) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "cache" in printed.err
