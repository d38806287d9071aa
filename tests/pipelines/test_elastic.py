"""Training over two nodes, of which one is lost and another comes: a worker less, and then one more."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray

import pipelines.train_ray
from mone.clips import Batch, MemoryClips
from pipelines.train_loop import Sources
from pipelines.train_ray import Workers, fit
from tests.jobs.test_train import samples_of_epochs
from tests.pipelines.test_train_ray import NUM_SAMPLES, STEPS, checkpoints, command_of, job, log_of, noise, recipe
from tests.ray_nodes import nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS, STEP_S, LOOK_S = 10, 0.5, 5.0


class Paced(MemoryClips):
    """Clips that come slowly, so that nodes can come and go meanwhile, until a file is there."""

    def __init__(self, clips: MemoryClips, go: Path) -> None:
        super().__init__(clips.frames_STHWC, clips.labels_S)
        self.go = go

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        for batch in super().batches(plan):
            if not self.go.exists():
                time.sleep(STEP_S)
            yield batch


def drive(address: str, output: str, go: str) -> None:
    """The driver. A worker takes all CPUs of its node, so that two are on two nodes."""
    ray.init(address, log_to_driver=False)
    pipelines.train_ray._WORKER_CPUS = 1.0
    run = job(Path(output), train=recipe(epochs=EPOCHS // 2).train)
    asked = Workers(count=(1, 2), strategy="ddp", storage=output, device="cpu", resize_s=LOOK_S)
    fit(run, lambda: Sources(Paced(noise(), Path(go)), noise(6), noise(0)), asked, log_of(Path(output)))


def test_a_lost_node_is_a_worker_less_and_a_new_one_a_worker_more(tmp_path):
    code = f"import sys; from {__name__} import drive; drive(*sys.argv[1:])"
    run, go = tmp_path / "run", tmp_path / "go"
    with nodes(2) as cluster, (tmp_path / "log").open("w") as log:
        arguments = {"args": [sys.executable, "-c", code, cluster.address, str(run), str(go)]}
        driver = subprocess.Popen(**(command_of() | arguments), stdout=log, stderr=log)
        try:

            def until(condition: Callable[[], object]) -> None:
                deadline_s = time.monotonic() + 180
                while not condition():
                    assert driver.poll() is None and time.monotonic() < deadline_s, (tmp_path / "log").read_text()
                    time.sleep(0.1)

            until(lambda: checkpoints(run) and worlds(run) == [2])
            cluster.kill_node(cluster.workers[0])
            until(lambda: worlds(run) == [2, 1])
            cluster.add()
            until(lambda: worlds(run) == [2, 1, 2])
            go.touch()
            assert driver.wait(timeout=300) == 0, (tmp_path / "log").read_text()
        finally:
            driver.kill()
    assert (run / "model" / "config.json").exists()
    assert samples_of_epochs(run, STEPS) == [[*range(NUM_SAMPLES)]] * EPOCHS


def worlds(run: Path) -> list[int]:
    """How many workers there were, one after the other."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    counts = [row["workers"] for row in rows if row["kind"] == "step"]
    return [count for number, count in enumerate(counts) if number == 0 or counts[number - 1] != count]
