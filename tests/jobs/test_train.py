"""Training from the command line, in this process: a tiny recipe on labelled videos and on rendered motions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jobs.train
import jobs.training_data
import pipelines.synthetic_stream
import pipelines.train_loop
import pipelines.training_memory
from jobs.recipes import RECIPES, Recipe
from mone.checkpoint import read_checkpoint
from mone.clips import MemoryClips
from mone.stages import Stage, TrainConfig
from mone.training import Trainer
from pipelines.archive import list_labelled
from pipelines.synthetic import MOTIONS
from pipelines.timeline import ClipPlan
from pipelines.train_loop import LocalLink
from pipelines.training_memory import in_memory
from pipelines.view import View
from tests.conftest import TINY, write_labels


def tiny(learning_rate: float = 1e-3) -> Recipe:
    stages = (
        Stage(name="nested", epochs=1, routing="nested", learning_rate=learning_rate),
        Stage(name="adaptive", epochs=1, routing="mone", learning_rate=learning_rate),
    )
    return Recipe(model=TINY, train=TrainConfig(stages=stages, batch_size=4), num_clips=24)


@pytest.fixture(autouse=True)
def _tiny_recipes(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setitem(RECIPES, "other", lambda: tiny(learning_rate=5e-4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def few_held_out(monkeypatch) -> dict[str, MemoryClips]:
    """Render a few held-out clips in place of 1200, and keep what was rendered."""
    rendered = {}

    def motions(split: str, count: int, view: View) -> MemoryClips:
        rendered[split] = pipelines.synthetic_stream.motions(split, min(count, 24), view, num_workers=2)
        return rendered[split]

    monkeypatch.setattr(jobs.training_data, "motions", motions)
    return rendered


def train(*arguments: object) -> int:
    return jobs.train.main(["--recipe", "tiny", *map(str, arguments)])


def metrics(folder: Path, kind: str = "epoch") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_motions_are_rendered_and_learnt_from(few_held_out, tmp_path, capsys):
    assert train("--data", "motions", "--num-clips", 24, "--epochs", 1, "--output", tmp_path / "run") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'model'}\n"
    checkpoint = read_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.labels == MOTIONS and checkpoint.config == TINY
    rows = metrics(tmp_path / "run")
    assert [(row["epoch"], row["stage"], row["clips"]) for row in rows] == [(1, "nested", 24), (2, "adaptive", 24)]
    assert all(np.isfinite(row["loss"]) and set(row["val_top1"]) == {"0.2", "0.4", "1"} for row in rows)
    for split in ("train", "val", "test"):
        clips = few_held_out[split]
        assert len(clips) == 24 and sorted(clips.labels_S.tolist()) == sorted([*range(12)] * 2)
    assert not torch.equal(few_held_out["train"].frames_STHWC, few_held_out["val"].frames_STHWC)
    curve = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert curve["split"] == "test" and curve["points"]


@pytest.fixture
def data(tmp_path, archive) -> Path:
    """Six training videos and a damaged one, one for validation and one for the test."""
    folder = archive.parent
    splits = ["train"] * 6 + ["val", "test"]
    rows = [
        (str(folder / f"{label}.mp4"), label, split)
        for label, split in zip(MOTIONS[: len(splits)], splits, strict=True)
    ]
    return write_labels(tmp_path / "data.csv", [*rows, (str(folder / "damaged.mp4"), "left", "train")])


def test_videos_are_learnt_from_and_what_cannot_be_read_is_said_once(data, tmp_path, capsys):
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 2) == 0
    printed = capsys.readouterr()
    left_out = [line for line in printed.err.splitlines() if line.startswith("left out")]
    assert len(left_out) == 1 and "damaged.mp4: empty" in left_out[0]
    checkpoint = read_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.labels == tuple(sorted(MOTIONS[:8]))
    assert [row["clips"] for row in metrics(tmp_path / "run")] == [12, 12]
    assert metrics(tmp_path / "run")[0]["val_top1"]


def test_the_test_split_trains_and_chooses_nothing(data, tmp_path):
    assert train("--data", data, "--output", tmp_path / "run") == 0
    swapped = data.read_text().replace(f"{MOTIONS[7]}.mp4", "text.mp4")
    assert swapped != data.read_text()
    (tmp_path / "other.csv").write_text(swapped)
    assert train("--data", tmp_path / "other.csv", "--output", tmp_path / "other") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "other")
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(tmp_path / "other")]


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_clips_are_those_of_the_videos_in_order(archive, clips_per_video):
    videos, view = list(list_labelled(str(archive))), View(num_frames=8, height_px=64, width_px=64)
    clips = in_memory(videos, MOTIONS, ClipPlan(span_s=1.0, clips_per_video=clips_per_video), view)
    assert clips.labels_S.tolist() == [number for number in range(8) for _ in range(clips_per_video)]
    assert clips.frames_STHWC.shape == (8 * clips_per_video, 8, 64, 64, 3) and clips.frames_STHWC.dtype == torch.uint8
    assert {Path(name).name for name in clips.failures} == {"damaged.mp4", "text.mp4"}


def test_a_second_run_trains_no_more(data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert train("--data", data, "--output", run) == 0
    before, rows = weights(run), metrics(run)
    monkeypatch.setattr(pipelines.training_memory, "in_memory", lambda *args: pytest.fail("videos were read again"))
    capsys.readouterr()
    assert train("--data", data, "--output", run) == 0
    assert weights(run) == before and metrics(run) == rows
    assert capsys.readouterr().out == f"{run / 'model'}\n"


def stop_after_steps(monkeypatch, num_steps: int) -> None:
    """Interrupt the next run once it has done so many steps, before anything is saved or logged of the last."""
    step, done = Trainer._step, []

    def counted(self: Trainer, batch: Any) -> None:
        step(self, batch)
        done.append(1)
        if len(done) == num_steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", counted)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_stopped_at_any_step_it_continues_to_the_same_model(data, tmp_path, monkeypatch, num_steps):
    options = ["--data", data, "--checkpoint-every", 1]
    assert train(*options, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after_steps(patch, num_steps)
        assert train(*options, "--output", tmp_path / "stopped") == 130
    assert not (tmp_path / "stopped" / "model").exists()
    assert train(*options, "--output", tmp_path / "stopped") == 0
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    for kind in ("step", "epoch"):
        told = [[(row["step"], row["loss"]) for row in metrics(tmp_path / run, kind)] for run in ("whole", "stopped")]
        assert told[0] == told[1] and told[0]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_every_epoch_has_one_line_of_metrics_wherever_it_is_stopped(data, tmp_path, monkeypatch, moment):
    save, saved = LocalLink.save, []

    def save_and_stop(self: LocalLink, state: dict, metrics: dict) -> None:
        saved.append(state)
        if len(saved) == 1 and moment == "before":
            raise KeyboardInterrupt
        save(self, state, metrics)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalLink, "save", save_and_stop)
    assert train("--data", data, "--output", tmp_path / "run") == 130
    assert train("--data", data, "--output", tmp_path / "run") == 0
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_stopped_while_it_is_measured_it_only_measures_again(data, tmp_path, monkeypatch):
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.train_loop, "save_checkpoint", stop)
        assert train("--data", data, "--output", tmp_path / "run") == 130
    assert not (tmp_path / "run" / "model" / "config.json").exists()
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("it trained again"))
    assert train("--data", data, "--output", tmp_path / "run") == 0
    assert read_checkpoint(tmp_path / "run" / "model").config.num_classes == 8


def test_the_log_of_samples_has_each_once_an_epoch(data, tmp_path):
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 3, "--log-samples") == 0
    assert samples_of_epochs(tmp_path / "run", steps_per_epoch=5) == [[*range(18)]] * 2


def samples_of_epochs(run: Path, steps_per_epoch: int) -> list[list[int]]:
    """Sorted samples of each epoch in the history of the final model: of each step, its last start."""
    history: dict[int, tuple[str, list[int]]] = {}
    for file in sorted((run / "samples").iterdir()):
        start = file.name.split("-")[0]
        for row in map(json.loads, file.read_text().splitlines()):
            since, seen = history.get(row["step"], ("", []))
            history[row["step"]] = (start, (seen if since == start else []) + row["samples"])
    steps = sorted(history)
    assert steps == [*range(1, len(steps) + 1)]
    epochs = [steps[first : first + steps_per_epoch] for first in range(0, len(steps), steps_per_epoch)]
    return [sorted(sample for step in epoch for sample in history[step][1]) for epoch in epochs]


@pytest.mark.parametrize(
    "change",
    [["--recipe", "other"], ["--epochs", "3"], ["--seed", "1"], ["--data", "motions"], ["--drop-static", "2"]],
    ids=lambda c: c[0],
)
def test_another_run_needs_another_folder(data, tmp_path, capsys, change):
    run = tmp_path / "run"
    assert train("--data", data, "--output", run, "--epochs", 1) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    options = {"--recipe": "tiny", "--data": str(data), "--epochs": "1"} | dict([change])
    assert jobs.train.main([word for pair in options.items() for word in pair] + ["--output", str(run)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and str(run) in printed.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_clips_are_another_run(data, tmp_path):
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 1) == 0
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 2) == 2


def test_a_run_in_which_nothing_can_be_read_says_so(tmp_path, archive, capsys):
    table = write_labels(tmp_path / "bad.csv", [(str(archive.parent / "damaged.mp4"), "left", "train")])
    assert train("--data", table, "--output", tmp_path / "run") == 2
    assert "no clip" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite_is_status_1_and_no_such_state_is_kept(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny(learning_rate=float("nan")))
    assert train("--data", data, "--output", tmp_path / "run", "--checkpoint-every", 1) == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (["--num-workers", "two"], "--num-workers"),
        (["--num-workers", "2:1"], "--num-workers 2:1"),
        (["--num-workers", "0:2"], "--num-workers 0:2"),
        (["--cache", "s3://there"], "--cache must be a folder without --num-workers"),
        (["--storage", "there"], "--storage has no effect without --num-workers"),
        (["--address", "there"], "--address has no effect without --num-workers"),
        (["--cache-gb", "5"], "--cache-gb has no effect without --num-workers"),
        (["--max-failures", "5"], "--max-failures has no effect without --num-workers"),
        (["--max-failures", "-2", "--num-workers", "1"], "--max-failures must be at least -1, got -2"),
        (["--num-workers", "1", "--device", "abacus"], "--device must be cuda or cpu"),
        (["--strategy", "fsdp"], "--strategy fsdp needs --num-workers"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_without_effect_are_refused(data, tmp_path, capsys, options, named):
    assert train("--data", data, "--output", tmp_path / "run", *options) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and named in printed.err and not (tmp_path / "run").exists()


def test_every_recipe_is_a_whole_run():
    for name, recipe in RECIPES.items():
        values = recipe()
        assert values.train.epochs > 0 and (values.model is None or values.model.num_tokens > 0), name
