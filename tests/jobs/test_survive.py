"""Annotating on a cluster whose processes, nodes, head and driver are killed, and to which nodes come late."""

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.session import run_name
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR
from tests.conftest import command_of, run_job
from tests.jobs.test_watching import scrape
from tests.ray_nodes import Nodes, kill, nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONGEST_GAP_S, LONGEST_S = 8.0, 900.0
# Short overlapping clips one at a time: much work from eight small files.
MANY_CLIPS = ["--span", 0.2, "--stride", 0.02, "--batch-size", 1]
# Tasks that are left when a node has come: one takes up to 128 clips.
MORE_CLIPS = ["--span", 0.2, "--stride", 0.005]
COMPARED = ["clip_id", "status", "error", "label", "score", "flops"]


class Run:
    """A run in a folder, started as often as need be."""

    def __init__(self, archive: Path, model: Path, output: Path, clips: list[object] = MANY_CLIPS) -> None:
        self.output = output
        self.command = [archive, "--output", output, "--model", model, *clips]
        self.driver: subprocess.Popen[str] | None = None
        self.seen: dict[str, bytes] = {}

    def start(self, address: str) -> None:
        """Give the command."""
        command = command_of("annotate", *self.command, "--address", address)
        with self.log.open("a") as log:
            self.driver = subprocess.Popen(**command, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        """What all drivers said."""
        return self.output.with_suffix(".log")

    def committed(self) -> dict[str, bytes]:
        """Files of rows. What was there once must stay."""
        found = {path.name: path.read_bytes() for path in (self.output / ANNOTATIONS_DIR).glob("*.parquet")}
        assert self.seen.items() <= found.items()
        self.seen = found
        return found

    def rows(self) -> list[dict]:
        """Of each clip what does not depend on how it was run."""
        self.committed()
        found = audit(self.output / MANIFEST_DIR, self.output / ANNOTATIONS_DIR)
        assert found.clean and found.annotated == found.planned > 0
        rows = pq.read_table(self.output / ANNOTATIONS_DIR, columns=COMPARED).to_pylist()
        return sorted(rows, key=lambda row: row["clip_id"])


@pytest.fixture(scope="module")
def undisturbed(archive, model_folder, tmp_path_factory) -> list[dict]:
    """The rows of a run on this machine alone."""
    run = Run(archive, model_folder, tmp_path_factory.mktemp("undisturbed") / "run")
    ended = run_job("annotate", *run.command)
    assert ended.returncode == 0, ended.stderr
    return run.rows()


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes(2) as started:
        yield started


def strike(what: str, run: Run, cluster: Nodes, chance: random.Random) -> None:
    if what == "driver":
        run.driver.kill()
        run.driver.wait()
        run.committed()
        run.start(cluster.address)
    elif what == "node":
        cluster.kill_node(chance.choice(cluster.workers))
        cluster.add()
    else:
        kill(chance.choice([process for node in cluster.workers for process in cluster.worker_processes(node)]))


def test_each_clip_is_a_row_whatever_is_killed(archive, model_folder, undisturbed, cluster, tmp_path):
    """Runs one after the other, until so much was killed; each ends as if nothing had been."""
    chance = random.Random(7)
    victims = ["worker"] * 20 + ["node"] * 15 + ["driver"] * 15
    chance.shuffle(victims)
    num_runs, deadline_s = 0, time.monotonic() + LONGEST_S
    while victims:
        run = Run(archive, model_folder, tmp_path / f"run{num_runs}")
        num_runs += 1
        run.start(cluster.address)
        while run.driver.poll() is None:
            try:
                run.driver.wait(chance.uniform(0, LONGEST_GAP_S) if victims else 300)
            except subprocess.TimeoutExpired:
                assert victims and time.monotonic() < deadline_s, "it does not end"
                if victims[-1] != "worker" or any(map(cluster.worker_processes, cluster.workers)):
                    strike(victims.pop(), run, cluster, chance)
                run.committed()
        assert run.driver.returncode == 0, run.log.read_text()
        assert run.rows() == undisturbed


def test_a_node_that_joins_late_decodes(archive, model_folder, tmp_path):
    with nodes(1) as cluster:
        run = Run(archive, model_folder, tmp_path / "run", MORE_CLIPS)
        run.start(cluster.address)
        wait_until(run.committed, run)
        late = cluster.add()
        port = cluster.metrics_port(late)
        ended = wait_until(lambda: frames_decoded(port, run.output), None)
        assert run.driver.wait(timeout=300) == 0, run.log.read_text()
        assert ended and {row["status"] for row in run.rows()} == {"ok", "decode_error", "empty"}


def frames_decoded(port: int, output: Path) -> float:
    """By worker processes of one node."""
    samples = scrape(port, run_name(output))
    return sum(value for sample, value in samples.items() if sample.name == "ray_mone_frames_decoded_total")


def test_the_head_is_lost_and_a_new_cluster_continues(archive, model_folder, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # else a minute
    run = Run(archive, model_folder, tmp_path / "run")
    with nodes(2) as cluster:
        run.start(cluster.address)
        wait_until(run.committed, run)
        cluster.kill_all()
        assert run.driver.wait(timeout=120) != 0
        assert len(run.committed()) > 0
    with nodes(2) as cluster:
        run.start(cluster.address)
        assert run.driver.wait(timeout=300) == 0, run.log.read_text()
    assert run.rows() == undisturbed


def wait_until(condition: Callable[[], Any], run: Run | None) -> Any:
    deadline_s = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        assert run is None or run.driver.poll() is None, run.log.read_text()
        time.sleep(0.1)
    return found
