"""Ray Train for real, on two CPUs: any number of workers gives the same model, also when some of them are killed."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import jobs.train
from jobs.recipes import RECIPES, Recipe
from jobs.run_log import RunLog
from mone.checkpoint import read_checkpoint
from mone.clips import Batch, MemoryClips
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import DivergedError
from pipelines.train_loop import LocalLink, Sources, TrainJob, train_loop
from pipelines.train_storage import last_listed
from tests.conftest import TINY, write_labels
from tests.jobs.test_train import metrics, samples_of_epochs, weights
from tests.media import indexed_frames, write_video

pytestmark = pytest.mark.ray

LABELS = ("left", "right")
RUN = {"data": "noise", "fold": "split", "recipe": "tiny"}
NUM_SAMPLES, BATCH, STEPS = 70, 4, 18  # an odd last batch
# Sums of floats in another order, through 36 steps of AdamW. The model is saved in bfloat16.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-2


def recipe(learning_rate: float = 1e-3, epochs: int = 1) -> Recipe:
    stages = (
        Stage(name="nested", epochs=epochs, routing="nested", learning_rate=learning_rate),
        Stage(name="adaptive", epochs=epochs, routing="mone", learning_rate=learning_rate),
    )
    sizes = dataclasses.replace(TINY, num_classes=2, num_frames=4, height_px=32, width_px=32)
    return Recipe(model=sizes, train=TrainConfig(stages=stages, batch_size=BATCH), num_clips=NUM_SAMPLES)


def job(output: Path, **changes: Any) -> TrainJob:
    output.mkdir(exist_ok=True)
    whole = recipe()
    common = {"train": whole.train, "checkpoint_every": 5, "log_every": 1, "log_samples": True}
    return TrainJob(model=whole.sizes, labels=LABELS, output=str(output), **(common | changes))


def noise(num_samples: int = NUM_SAMPLES) -> MemoryClips:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (num_samples, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return MemoryClips(frames, torch.arange(num_samples) % 2)


def checkpoints(run: Path) -> list[Path]:
    """Those that Ray Train would continue from, once it has said so."""
    snapshot = run / "checkpoints" / "checkpoint_manager_snapshot.json"
    return sorted(snapshot.parent.glob("checkpoint_20*")) if snapshot.exists() else []


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come"
        time.sleep(0.02)


class Deadly(MemoryClips):
    """Clips whose reader is killed before the batch of one step, the first time on this disk."""

    def __init__(self, clips: MemoryClips, marker: Path, at_sample: int) -> None:
        super().__init__(clips.frames_STHWC, clips.labels_S)
        self.marker, self.at_sample = marker, at_sample

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        for batch in super().batches(plan):
            if self.at_sample in batch.samples_B.tolist() and not self.marker.exists():
                wait_for(lambda: checkpoints(self.marker.parent / "run"))
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def sources_of(marker: Path | None = None, at_sample: int = -1) -> Sources:
    torch.set_num_threads(1)
    train = Deadly(noise(), marker, at_sample) if marker else noise()
    return Sources(train, noise(6), noise(0))


def log_of(output: Path) -> functools.partial[RunLog]:
    return functools.partial(RunLog, str(output), RUN)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = metrics(run, "step") + metrics(run, "epoch")
    return sorted((row["step"], row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process, without Ray."""
    output = tmp_path_factory.mktemp("alone")
    link = LocalLink(output, log_of(output)())
    train_loop(job(output), sources_of(), Parallel(torch.device("cpu")), link)
    return output


def assert_same(run: Path, other: Path) -> None:
    """The same model and the same curve, but for the order of sums."""
    pairs = list(zip(losses(run), losses(other), strict=True))
    assert len(pairs) == 2 * STEPS
    for (step, loss), (same_step, same_loss) in pairs:
        assert step == same_step and abs(loss - same_loss) < LOSS_TOLERANCE
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=WEIGHT_TOLERANCE, rtol=WEIGHT_TOLERANCE)


def fit_here(run: TrainJob, sources: Any, count: int | tuple[int, int], **options: Any) -> None:
    from pipelines.train_ray import Workers, fit

    output = Path(run.output)
    asked = Workers(count=count, storage=str(output), **({"strategy": "ddp"} | options))
    fit(run, sources, asked, log_of(output))


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("device", "use_gpu"), [("", False), ("cpu", False), ("cuda", True)])
def test_gpus_are_asked_for_where_none_is_up_only_if_they_are_wanted(device, use_gpu):
    from pipelines.train_ray import Workers

    assert Workers(count=1, strategy="ddp", storage="", device=device).use_gpu == use_gpu


@pytest.mark.usefixtures("shared_ray")
def test_a_worker_is_killed_and_the_model_is_that_of_one_process(alone, tmp_path):
    from mone.order import EpochOrder

    victim = int(EpochOrder(NUM_SAMPLES, 0).permutation(1)[BATCH * 8])  # step 9 of the second epoch
    run = job(tmp_path / "run")
    fit_here(run, functools.partial(sources_of, tmp_path / "killed", victim), 2)
    assert (tmp_path / "killed").exists()
    assert_same(tmp_path / "run", alone)
    assert samples_of_epochs(tmp_path / "run", STEPS) == [[*range(NUM_SAMPLES)]] * 2
    starts = {file.name.split("-")[0] for file in (tmp_path / "run" / "samples").iterdir()}
    assert len(starts) == 2
    again = steps_logged(tmp_path / "run", max(starts))
    assert 1 < min(again) <= STEPS + 9 and max(again) == 2 * STEPS  # not from the start


def steps_logged(run: Path, start: str) -> list[int]:
    files = (run / "samples").glob(f"{start}-*")
    return [json.loads(line)["step"] for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_loss_that_is_not_finite_ends_the_run_at_once_and_keeps_the_last_checkpoint(tmp_path):
    train = recipe(learning_rate=float("nan")).train
    run = job(tmp_path / "run", train=train, checkpoint_every=1)
    with pytest.raises(DivergedError, match="not finite at step 1"):
        fit_here(run, sources_of, 2)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2  # one start of two workers
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.usefixtures("shared_ray")
def test_more_workers_than_cpus_are_refused(tmp_path):
    from pipelines.train_ray import TooFewCpusError

    with pytest.raises(TooFewCpusError, match="needs 3 CPUs"):
        fit_here(job(tmp_path / "run"), sources_of, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("options", [{"count": 1}, {"count": (1, 2)}, {"count": 2, "strategy": "fsdp"}], ids=str)
def test_every_way_to_run_gives_the_same_model(alone, tmp_path, options):
    fit_here(job(tmp_path / "run"), sources_of, **options)
    assert_same(tmp_path / "run", alone)
    assert samples_of_epochs(tmp_path / "run", STEPS) == [[*range(NUM_SAMPLES)]] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_workers_that_fail_again_and_again_are_given_up(tmp_path):
    from pipelines.train_ray import WorkersFailedError

    with pytest.raises(WorkersFailedError, match=r"2 times in a row .* checkpoint: worker 0 failed: .*no clips today"):
        fit_here(job(tmp_path / "run"), functools.partial(no_sources, tmp_path / "run" / "asked"), 1, max_failures=1)
    assert (tmp_path / "run" / "asked").read_text() == "??"


def no_sources(asked: Path) -> Sources:
    with asked.open("a") as file:
        file.write("?")
    raise OSError("no clips today")


class Fallible(MemoryClips):
    """Clips whose reader fails after a new checkpoint, three times, and at one sample again and again."""

    def __init__(self, clips: MemoryClips, run: Path, bad_sample: int) -> None:
        super().__init__(clips.frames_STHWC, clips.labels_S)
        self.run, self.bad_sample, self.first = run, bad_sample, last_listed(str(run))

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        failed = self.run / "failed"
        for batch in super().batches(plan):
            if self.bad_sample in batch.samples_B.tolist():
                raise ValueError("a bad sample")
            before = failed.read_text() if failed.exists() else ""
            if len(before) < 3 and last_listed(str(self.run)) != self.first:
                failed.write_text(before + "!")
                raise RuntimeError("the machine is gone")
            time.sleep(0.1)  # a checkpoint comes while training goes on
            yield batch


def fallible(run: Path, bad_sample: int) -> Sources:
    torch.set_num_threads(1)
    return Sources(Fallible(noise(), run, bad_sample), noise(6), noise(0))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_run_that_gets_on_fails_as_often_as_it_likes(tmp_path):
    fit_here(job(tmp_path / "run"), functools.partial(fallible, tmp_path / "run", -1), 1, max_failures=1)
    assert (tmp_path / "run" / "failed").read_text() == "!!!"
    assert samples_of_epochs(tmp_path / "run", STEPS) == [[*range(NUM_SAMPLES)]] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_one_that_fails_at_the_same_place_again_and_again_is_given_up(tmp_path):
    from mone.order import EpochOrder
    from pipelines.train_ray import WorkersFailedError

    bad = int(EpochOrder(NUM_SAMPLES, 0).permutation(1)[BATCH * 8])
    with pytest.raises(WorkersFailedError, match=r"2 times in a row .*: a bad sample"):
        fit_here(job(tmp_path / "run"), functools.partial(fallible, tmp_path / "run", bad), 1, max_failures=1)
    starts = {file.name.split("-")[0] for file in (tmp_path / "run" / "samples").iterdir()}
    assert len(starts) <= 3 + 2  # those that got on, and the two that did not


@pytest.fixture
def videos(tmp_path) -> Path:
    """A table of lossless videos of 4 s; one that is empty, and one whose end is missing."""
    folder = tmp_path / "videos"
    folder.mkdir()
    rows = []
    for number in range(8):
        path = write_video(folder / f"{number}.mkv", indexed_frames(40, 48, 32, first=20 * number))
        rows.append((str(path), LABELS[number % 2], "train" if number < 6 else "val"))
    (folder / "empty.mkv").touch()
    rows.append((str(folder / "empty.mkv"), "left", "train"))
    whole = folder / "5.mkv"
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return write_labels(tmp_path / "videos.csv", rows)


def tiny_job(argv: Sequence[str]) -> int:
    """`jobs.train` in a process of its own, with a recipe for tests."""
    torch.set_num_threads(1)
    RECIPES["tiny"] = recipe
    RECIPES["long"] = functools.partial(recipe, epochs=2)
    return jobs.train.main(["--recipe", "tiny", *argv])


def command_of(*argv: object) -> dict[str, Any]:
    code = "import sys; from tests.pipelines.test_train_ray import tiny_job; sys.exit(tiny_job(sys.argv[1:]))"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", code, *map(str, argv)]
    return {"args": command, "env": environment, "cwd": Path(__file__).parents[2], "text": True}


def run_tiny(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command_of(*argv), capture_output=True, timeout=180, check=False)


def test_two_workers_learn_from_a_stream_and_say_what_they_leave_out(videos, tmp_path):
    ended = run_tiny("--data", videos, "--clips-per-video", 3, "--num-workers", 2, "--output", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{tmp_path / 'run' / 'model'}\n"
    left_out = [line.split("/")[-1] for line in ended.stderr.splitlines() if line.startswith("left out")]
    assert len([line for line in left_out if "empty.mkv: empty" in line]) == 1
    assert len(left_out) == len(set(left_out)) and all("empty.mkv" in line or "5.mkv" in line for line in left_out)
    assert [line for line in ended.stderr.splitlines() if line.startswith("epoch adaptive")]
    assert "Traceback" not in ended.stderr and "[State Transition]" not in ended.stderr
    assert read_checkpoint(tmp_path / "run" / "model").labels == LABELS
    assert [row["workers"] for row in metrics(tmp_path / "run")] == [2, 2]


@pytest.mark.slow
def test_a_cache_is_filled_once_and_gives_the_model_of_the_stream(videos, tmp_path):
    options = ["--data", videos, "--clips-per-video", 3, "--num-workers", 1, "--seed", 1]
    cached = [*options, "--cache", tmp_path / "cache"]
    streamed = run_tiny(*options, "--output", tmp_path / "streamed")
    assert streamed.returncode == 0, streamed.stderr
    ended = run_tiny(*cached, "--output", tmp_path / "first")
    assert ended.returncode == 0, ended.stderr
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")}
    assert shards
    # The manifest is there already, and no video is opened any more.
    shutil.copytree(tmp_path / "first" / "data", tmp_path / "second" / "data")
    for path in videos.parent.glob("videos/*.mkv"):
        path.write_bytes(b"gone")
    ended = run_tiny(*cached, "--output", tmp_path / "second")
    assert ended.returncode == 0, ended.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")} == shards
    assert weights(tmp_path / "first") == weights(tmp_path / "second") == weights(tmp_path / "streamed")


@pytest.mark.slow
def test_the_driver_is_killed_and_the_same_command_continues(videos, tmp_path):
    """Of 2 x 2 epochs of 18 steps; killed after a checkpoint, anywhere within an epoch."""
    options = ["--recipe", "long", "--data", videos, "--clips-per-video", 12, "--num-workers", 2]
    options += ["--checkpoint-every", 3, "--log-samples"]
    run = tmp_path / "run"
    driver = subprocess.Popen(**command_of(*options, "--output", run), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: checkpoints(run) or driver.poll() is not None, 120)
    finally:
        driver.kill()
    driver.communicate()
    assert not (run / "model").exists()
    ended = run_tiny(*options, "--output", run)
    assert ended.returncode == 0, ended.stderr
    starts = sorted({file.name.split("-")[0] for file in (run / "samples").iterdir()})
    assert len(starts) == 2
    assert min(steps_logged(run, starts[1])) > 1
    rows = [sample for file in (run / "samples").iterdir() for sample in file.read_text().splitlines()]
    num_samples = 1 + max(max(json.loads(row)["samples"], default=0) for row in rows)
    steps = -(-num_samples // BATCH)
    assert samples_of_epochs(run, steps) == [[*range(num_samples)]] * 4
    whole = run_tiny(*options, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=WEIGHT_TOLERANCE, rtol=WEIGHT_TOLERANCE)
