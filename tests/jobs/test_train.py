"""Training from the command line: a tiny recipe on labelled videos and on rendered motions."""

import json
import multiprocessing.pool
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs.train
import pipelines.synthetic_stream
import pipelines.training_stream
from jobs.recipes import RECIPES, Recipe
from mone.checkpoint import read_checkpoint
from mone.training import Stage, TrainConfig
from pipelines.synthetic import MOTIONS
from tests.conftest import TINY, write_labels


def tiny(learning_rate: float = 1e-3) -> Recipe:
    stages = (
        Stage(name="nested", epochs=1, routing="nested", learning_rate=learning_rate),
        Stage(name="adaptive", epochs=1, routing="mone", learning_rate=learning_rate),
    )
    return Recipe(model=TINY, train=TrainConfig(stages=stages, batch_size=8), num_clips=24)


@pytest.fixture(autouse=True)
def _tiny_recipes(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setitem(RECIPES, "other", lambda: tiny(learning_rate=5e-4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def threads(monkeypatch):
    """Decode in threads: processes take seconds to start, and one test here starts them."""
    monkeypatch.setattr(pipelines.training_stream, "_pool", lambda num_workers: multiprocessing.pool.ThreadPool(2))


@pytest.fixture
def few_held_out(monkeypatch):
    """Render a few held-out clips in place of 1200, and keep what was rendered."""
    rendered = {}

    def motions(split, count, config):
        rendered[split] = pipelines.synthetic_stream.motions(split, min(count, 24), config, num_workers=2)
        return rendered[split]

    monkeypatch.setattr(jobs.train, "motions", motions)
    return rendered


def train(*arguments: object) -> int:
    return jobs.train.main(["--recipe", "tiny", *map(str, arguments)])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_motions_are_rendered_and_learnt_from(few_held_out, tmp_path, capsys):
    assert train("--data", "motions", "--num-clips", 24, "--epochs", 1, "--output", tmp_path / "run") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'model'}\n"
    checkpoint = read_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.labels == MOTIONS and checkpoint.config == TINY
    rows = metrics(tmp_path / "run")
    assert [(row["epoch"], row["epochs"], row["stage"]) for row in rows] == [(1, 2, "nested"), (2, 2, "adaptive")]
    assert all(np.isfinite(row["loss"]) and set(row["val_top1"]) == {"0.2", "0.4", "1.0"} for row in rows)
    for split in ("train", "val"):
        clips = few_held_out[split]
        assert len(clips) == 24 and sorted(clips.labels_S.tolist()) == sorted([*range(12)] * 2)
    assert not torch.equal(few_held_out["train"].patches_SFNP, few_held_out["val"].patches_SFNP)


@pytest.fixture
def data(tmp_path, archive) -> Path:
    """Six training videos and a damaged one, two for validation, and a test split that nobody may read."""
    folder = archive.parent
    rows = [
        (str(folder / f"{label}.mp4"), label, "train" if number < 6 else "val")
        for number, label in enumerate(MOTIONS[:8])
    ]
    rows += [(str(folder / "damaged.mp4"), "left", "train"), (str(folder / "text.mp4"), "left", "test")]
    return write_labels(tmp_path / "data.csv", rows)


def test_videos_are_learnt_from_and_what_cannot_be_read_is_said_once(threads, data, tmp_path, capsys):
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 2) == 0
    printed = capsys.readouterr()
    left_out = [line for line in printed.err.splitlines() if line.startswith("left out")]
    assert len(left_out) == 1 and "damaged.mp4: empty" in left_out[0]
    assert "text.mp4" not in printed.err  # the test split
    checkpoint = read_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.labels == tuple(sorted(MOTIONS[:8]))
    assert len(metrics(tmp_path / "run")) == 2 and metrics(tmp_path / "run")[0]["val_top1"]


def test_the_test_split_is_never_opened(threads, data, tmp_path, monkeypatch):
    opened = []
    plan_video = pipelines.training_stream.plan_video
    monkeypatch.setattr(
        pipelines.training_stream, "plan_video", lambda video, plan: opened.append(video) or plan_video(video, plan)
    )
    assert train("--data", data, "--output", tmp_path / "run") == 0
    assert len(opened) == 9 and {video.split for video in opened} == {"train", "val"}


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_clips_are_those_of_the_videos_in_order(threads, archive, clips_per_video):
    from pipelines.archive import list_labelled
    from pipelines.timeline import ClipPlan
    from pipelines.training_stream import labelled

    videos = list(list_labelled(str(archive)))
    found = labelled(videos, MOTIONS, ClipPlan(span_s=1.0, clips_per_video=clips_per_video), TINY)
    assert found.clips.labels_S.tolist() == [number for number in range(8) for _ in range(clips_per_video)]
    assert found.clips.patches_SFNP.shape == (8 * clips_per_video, TINY.num_indices, TINY.num_tokens, TINY.patch_values)
    assert {Path(name).name for name in found.failures} == {"damaged.mp4", "text.mp4"}


def test_a_second_run_trains_no_more(threads, data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert train("--data", data, "--output", run) == 0
    before, rows = weights(run), metrics(run)
    monkeypatch.setattr(pipelines.training_stream, "labelled", lambda *args: pytest.fail("videos were read again"))
    assert train("--data", data, "--output", run) == 0
    assert weights(run) == before and metrics(run) == rows
    assert "continue after epoch 2 of 2" in capsys.readouterr().err


def test_stopped_after_an_epoch_it_continues_to_the_same_model(threads, data, tmp_path, monkeypatch, capsys):
    assert train("--data", data, "--output", tmp_path / "whole") == 0
    save, saved = jobs.train.Trainer.save, []

    def save_and_stop(trainer, path):
        save(trainer, path)
        saved.append(path)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.train.Trainer, "save", save_and_stop)
    assert train("--data", data, "--output", tmp_path / "stopped") == 130
    assert not (tmp_path / "stopped" / "model").exists()
    assert train("--data", data, "--output", tmp_path / "stopped") == 0
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_every_epoch_has_one_line_of_metrics_wherever_it_is_stopped(threads, data, tmp_path, monkeypatch, moment):
    save, saved = jobs.train.Trainer.save, []

    def save_and_stop(trainer, path):
        saved.append(path)
        if len(saved) == 1 and moment == "before":
            raise KeyboardInterrupt
        save(trainer, path)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.train.Trainer, "save", save_and_stop)
    assert train("--data", data, "--output", tmp_path / "run") == 130
    assert train("--data", data, "--output", tmp_path / "run") == 0
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    "change", [["--recipe", "other"], ["--epochs", "3"], ["--seed", "1"], ["--data", "motions"]], ids=lambda c: c[0]
)
def test_another_run_needs_another_folder(threads, data, tmp_path, capsys, change):
    run = tmp_path / "run"
    assert train("--data", data, "--output", run, "--epochs", 1) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    options = {"--recipe": "tiny", "--data": str(data), "--epochs": "1"} | dict([change])
    assert jobs.train.main([word for pair in options.items() for word in pair] + ["--output", str(run)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and str(run) in printed.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_clips_are_another_run(threads, data, tmp_path):
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 1) == 0
    assert train("--data", data, "--output", tmp_path / "run", "--clips-per-video", 2) == 2


def test_a_run_in_which_nothing_can_be_read_says_so(threads, tmp_path, archive, capsys):
    table = write_labels(tmp_path / "bad.csv", [(str(archive.parent / "damaged.mp4"), "left", "train")])
    assert train("--data", table, "--output", tmp_path / "run") == 2
    assert "no clip" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite_is_status_1(threads, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny(learning_rate=float("nan")))
    assert train("--data", data, "--output", tmp_path / "run") == 1
    assert "loss" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()


def test_every_recipe_is_a_whole_run():
    for name, recipe in RECIPES.items():
        values = recipe()
        assert values.train.epochs > 0 and (values.model is None or values.model.num_tokens > 0), name
