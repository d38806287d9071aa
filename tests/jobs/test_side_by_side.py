"""Real runs on Ray clusters that are as small as can be: alone, two at a time, and with a GPU that comes late.

GPUs are logical: what is tested is what is asked for, and that nothing waits for ever; the model runs on the CPU.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR
from tests.conftest import NUM_CLIPS, command_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster of one node."""
    started: list[Cluster] = []

    def start(**resources: float) -> Cluster:
        node = {"object_store_memory": 200 * 2**20, "include_dashboard": False} | resources
        started.append(Cluster(initialize_head=True, head_node_args=node))
        return started[-1]

    yield start
    for each in started:
        each.shutdown()


@pytest.fixture
def start(archive, model_folder, tmp_path) -> Iterator[Start]:
    """Starts a run in a folder of its own."""
    runs: list[subprocess.Popen[str]] = []

    def started(cluster: Cluster, name: str, *options: object) -> subprocess.Popen[str]:
        arguments = (archive, "--output", tmp_path / name, "--model", model_folder, "--address", cluster.address)
        command = command_of("annotate", *arguments, *options)
        runs.append(subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        return runs[-1]

    yield started
    for run in runs:
        run.kill()
        run.wait()


def assert_done(run: subprocess.Popen[str], folder: Path) -> None:
    _, stderr = run.communicate(timeout=600)
    assert run.returncode == 0, stderr
    found = audit(folder / MANIFEST_DIR, folder / ANNOTATIONS_DIR)
    assert found.clean and found.annotated == NUM_CLIPS


@pytest.mark.parametrize("num_cpus", [1, 2])
def test_two_runs_at_a_time_are_done_on_so_few_cpus(cluster, start, tmp_path, num_cpus):
    small = cluster(num_cpus=num_cpus)
    runs = {name: start(small, name) for name in ("one", "other")}
    for name, run in runs.items():
        assert_done(run, tmp_path / name)


def test_two_runs_share_the_only_gpu(cluster, start, tmp_path):
    small = cluster(num_cpus=2, num_gpus=1)
    runs = {name: start(small, name, "--gpus-per-worker", 0.5) for name in ("one", "other")}
    for name, run in runs.items():
        assert_done(run, tmp_path / name)


def test_a_run_that_asks_for_gpus_says_that_it_waits_and_takes_one_that_comes_late(cluster, start, tmp_path):
    growing = cluster(num_cpus=2)
    run = start(growing, "run", "--device", "cuda", "--num-model-workers", "2:2")  # of which one never comes
    said = next(line for line in run.stderr if line.startswith("model "))
    assert said.split(maxsplit=1)[1] == "2 processes on GPUs, 1 each, 0 up; waits for more\n"
    growing.add_node(num_cpus=1, num_gpus=1, object_store_memory=200 * 2**20)
    assert_done(run, tmp_path / "run")
