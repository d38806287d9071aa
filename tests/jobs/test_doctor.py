"""The doctor on real nodes: Ray nodes of one machine, of which one does not see a disk that the others share."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray.cluster_utils

from tests.conftest import complaints, run_job

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # three nodes that start together

STORE_BYTES = 100 * 2**20
# A host name and mounts of its own, as any user may have them where the kernel allows it.
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount", "--uts"]


@dataclass(frozen=True)
class Shared:
    """A cluster; a folder that all its nodes see; one in place of which the node "lonely" sees an empty disk."""

    address: str
    everywhere: Path
    elsewhere: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Shared]:
    everywhere, elsewhere = tmp_path_factory.mktemp("everywhere"), tmp_path_factory.mktemp("elsewhere")
    with contextlib.ExitStack() as stack:
        temp = stack.enter_context(tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True))
        small = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"include_dashboard": False, "temp_dir": temp, **small}
        )
        stack.callback(cluster.shutdown)
        stack.enter_context(lonely_node(cluster.address, elsewhere))
        cluster.add_node(**small)
        deadline_s = time.monotonic() + 60
        while len([node for node in cluster.global_state.node_table() if node["Alive"]]) < 3:
            assert time.monotonic() < deadline_s, "the nodes do not come up"
            time.sleep(0.1)
        yield Shared(cluster.address, everywhere, elsewhere)


@contextlib.contextmanager
def lonely_node(address: str, hidden: Path) -> Iterator[None]:
    """A node that has not mounted the shared disk: where the others have it, it sees an empty one of its own."""
    script = f"hostname lonely && mount -t tmpfs none {shlex.quote(str(hidden))}"
    if not _works([*OWN_MOUNTS, "sh", "-c", script]):
        pytest.skip("no mount namespaces here")
    ray_start = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    ray_start += [f"--address={address}", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
    process = subprocess.Popen(
        [*OWN_MOUNTS, "sh", "-c", f"{script} && exec {shlex.join(ray_start)}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def visit(shared, archive) -> subprocess.CompletedProcess[str]:
    """One visit for all questions: it takes a while to import torch on three nodes."""
    return run_job("doctor", "--address", shared.address, "--archive", archive, "--output", shared.elsewhere)


@pytest.fixture
def record(visit) -> dict[str, Any]:
    assert visit.stdout, visit.stderr
    return json.loads(visit.stdout.splitlines()[-1])


def test_each_finding_is_a_line_and_an_error_is_status_1(visit, record):
    assert visit.returncode == 1, visit.stderr
    lines = visit.stdout.splitlines()[:-1]
    assert [line.split()[0] for line in lines] == [found["level"] for found in record["findings"]]
    assert all(found["remedy"] for found in record["findings"] if found["level"] != "ok")
    assert complaints(visit.stderr, "doctor") == [
        f"python -m jobs.doctor: {record['errors']} errors, {record['warnings']} warnings"
    ]


def test_a_node_that_does_not_see_the_shared_disk_is_found_and_no_other_is_blamed(record, shared):
    errors = [found for found in record["findings"] if found["level"] == "error"]
    assert [found["check"] for found in errors] == ["output"]
    assert "lonely" in errors[0]["message"] and f"cannot write to {shared.elsewhere}" in errors[0]["message"]
    assert list(shared.elsewhere.iterdir()) == []


def test_all_else_is_well_on_all_nodes(record):
    levels = {found["check"]: found["level"] for found in record["findings"]}
    assert {levels[check] for check in ("nodes", "cpu", "versions", "decoders", "gpu", "clock", "archive")} == {"ok"}
    assert len(record["nodes"]) == 3
    for node in record["nodes"].values():
        assert node["facts"]["decoders"] == {"decord": "", "pyav": ""} and node["resources"]["cpus"] == 1


@pytest.mark.slow
def test_on_a_disk_that_all_nodes_see_there_is_no_error(shared):
    ended = run_job("doctor", "--address", shared.address, "--output", shared.everywhere)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(shared.everywhere.iterdir()) == []


@pytest.mark.slow
def test_an_archive_that_one_node_does_not_see(shared, archive):
    (shared.elsewhere / "clip.mp4").write_bytes(next(archive.parent.glob("*.mp4")).read_bytes())
    ended = run_job("doctor", "--address", shared.address, "--archive", shared.elsewhere)
    assert ended.returncode == 1
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("error")]
    assert "lonely" in line and "No such file" in line


@pytest.mark.slow
def test_this_machine_alone():
    ended = run_job("doctor")
    record = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == (1 if record["errors"] else 0) and len(record["nodes"]) == 1
