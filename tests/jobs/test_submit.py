"""Jobs that are really submitted, with the command of the documentation: followed, stopped, submitted again."""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.annotate import Annotate
from pipelines.annotate import MANIFEST_DIR
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# The head has a token of its own, and so asks for it. Whoever submits must have it, too, and say so.
NOT_INHERITED = ("RAY_ADDRESS", "RAY_AUTH_MODE", "PYTHONPATH")
OF_THE_HEAD = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
OF_THE_HEAD |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
ENVIRONMENT = OF_THE_HEAD | {"RAY_AUTH_MODE": "token"}
# Many clips that overlap, at first one at a time: there has to be time to stop the job between two files of them.
STRIDE_S = 0.001
SLOWLY = ["--batch-size", 1, "--num-model-workers", 1]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


GCS_PORT = free_port()


def wait_for(condition: Callable[[], object], limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A cluster of one node, on ports of its own."""
    dashboard = free_port()
    with tempfile.TemporaryDirectory(prefix="submit-", ignore_cleanup_errors=True) as temp:
        options = [
            *("--head", "--block", "--disable-usage-stats", "--num-cpus=2", "--object-store-memory=200000000"),
            *("--node-ip-address=127.0.0.1", f"--port={GCS_PORT}", f"--temp-dir={temp}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"),
        ]
        head = subprocess.Popen(
            [*RAY, "start", *options],
            env=OF_THE_HEAD,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for(lambda: answers(dashboard) or head.poll() is not None, limit_s=120)
            assert head.poll() is None
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)  # what is left of it
            head.wait()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ray_job(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(*RAY, "job", *arguments, environment=ENVIRONMENT)


def run(*command: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    arguments = list(map(str, command))
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def submit(url: str, name: str, *arguments: object, wait: bool = True, job: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as docs/cluster.md has it; this machine's Python in place of that of the path."""
    options = ["--address", url, "--working-dir", ".", f"--submission-id={job}", *([] if wait else ["--no-wait"])]
    return ray_job("submit", *options, "--", sys.executable, "-m", f"jobs.{name}", *arguments)


def details(url: str, job: str) -> dict[str, Any]:
    """What the cluster says of a job."""
    ask = "import ray.job_submission, sys; print(ray.job_submission.JobSubmissionClient(sys.argv[1])"
    command = [sys.executable, "-c", f"{ask}.get_job_info(sys.argv[2]).json())", url, job]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(ended.stdout)


def state(url: str, job: str) -> str:
    return details(url, job)["status"]


def own_status(url: str, job: str) -> int | None:
    return details(url, job)["driver_exit_code"]


def test_a_job_is_stopped_and_submitted_again(url, archive, model_folder, tmp_path):
    output = tmp_path / "out"
    arguments = [archive, "--output", output, "--model", model_folder, "--stride", STRIDE_S]
    started = submit(url, "annotate", *arguments, *SLOWLY, wait=False, job="first")
    assert started.returncode == 0, started.stderr
    wait_for(lambda: [*(output / ANNOTATIONS_DIR).glob("*.parquet")], limit_s=180)
    assert ray_job("stop", "--address", url, "first").returncode == 0
    assert state(url, "first") == "STOPPED", ray_job("logs", "--address", url, "first").stdout
    assert "Job 'first' was stopped" in ray_job("status", "--address", url, "first").stdout
    kept = {path: path.read_bytes() for path in (output / ANNOTATIONS_DIR).glob("*.parquet")}
    assert not audit(output / MANIFEST_DIR, output / ANNOTATIONS_DIR).clean

    ended = submit(url, "annotate", *arguments, job="second")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert state(url, "second") == "SUCCEEDED" and own_status(url, "second") == 0
    assert f"rows      {output / ANNOTATIONS_DIR}" in ended.stdout  # its own stdout, followed
    assert audit(output / MANIFEST_DIR, output / ANNOTATIONS_DIR).clean
    assert {path: path.read_bytes() for path in kept} == kept
    record = json.loads((output / "run.json").read_text())
    options = Annotate(archive=str(archive), output=str(output), model=str(model_folder), stride=STRIDE_S)
    assert record["config"] == dataclasses.asdict(options)
    assert submit(url, "audit", output, job="audit").returncode == 0


def test_a_failed_outcome_and_bad_input_are_failed_jobs_with_the_jobs_own_status(url, archive, model_folder, tmp_path):
    arguments = ["--output", tmp_path / "out", "--model", model_folder, "--max-failed-share", 0]
    ended = submit(url, "annotate", archive, *arguments, job="too-many-failures")
    assert (ended.returncode, own_status(url, "too-many-failures")) == (1, 1)
    ended = submit(url, "annotate", tmp_path / "nothing", *arguments, job="nothing-there")
    assert (ended.returncode, own_status(url, "nothing-there")) == (1, 2)


def test_a_relative_output_is_refused_and_the_line_is_in_the_logs(url, archive):
    ended = submit(url, "annotate", archive, "--output", "out", job="relative")
    assert (ended.returncode, own_status(url, "relative")) == (1, 2)
    assert "python -m jobs.annotate: --output out is not a place that all nodes see" in ended.stdout
    assert not (ROOT / "out").exists()


def test_the_doctor_and_the_bundled_model_travel(url, archive, tmp_path):
    ended = submit(url, "doctor", "--output", tmp_path, "--archive", archive, job="doctor")
    assert ended.returncode == 0, ended.stdout
    assert f"{tmp_path} is written and read by 1 node" in ended.stdout


def test_who_comes_without_the_token_is_told_what_to_do(url, model_folder):
    ended = run(*RAY, "job", "submit", "--address", url, "--", "true", environment=OF_THE_HEAD)
    assert ended.returncode == 1 and "Missing authentication token" in ended.stderr
    for environment, advice in (
        (OF_THE_HEAD, "export RAY_AUTH_MODE=token"),
        (ENVIRONMENT | {"RAY_AUTH_TOKEN": "0" * 64}, "the token of its head"),
    ):
        doctor = [sys.executable, "-m", "jobs.doctor", "--address", f"127.0.0.1:{GCS_PORT}", "--model", model_folder]
        ended = run(*doctor, environment=environment)
        last = ended.stderr.splitlines()[-1]
        assert ended.returncode == 2 and last.startswith("python -m jobs.doctor: no Ray cluster") and advice in last
