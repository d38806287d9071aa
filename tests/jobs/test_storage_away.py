"""A store that is away in the middle of a run, for longer than any single request is repeated."""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit, totals
from pipelines.planning import MANIFEST_DIR
from pipelines.waiting import WAITING_DIR
from tests.conftest import NUM_VIDEOS, command_of
from tests.web_server import FaultyApp, S3Bucket

pytestmark = [pytest.mark.ray, pytest.mark.slow]

AWAY_S = 30.0
# Many small tasks, each of which reads its file again.
MANY_CLIPS = ["--span", 0.2, "--stride", 0.02, "--batch-size", 1]


class Server:
    """An S3 server that can be stopped and started again, at the same address."""

    def __init__(self, app: FaultyApp) -> None:
        self.app, self.port = app, 0
        self.start()

    def start(self) -> None:
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", self.port, self.app, threaded=True)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    from moto.server import DomainDispatcherApplication, create_backend_app

    started = Server(FaultyApp(DomainDispatcherApplication(create_backend_app)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{started.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "something")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield started
    started.stop()


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    server.stop()
    yield
    server.start()


@contextmanager
def unwilling(server: Server) -> Iterator[None]:
    server.app.is_away = True
    yield
    server.app.is_away = False


@pytest.mark.parametrize(("away", "reason"), [(stopped, "cannot be asked"), (unwilling, "503")])
def test_a_run_waits_says_so_and_ends_as_if_nothing_had_been(
    server, away: Callable, reason: str, archive, model_folder, tmp_path
):
    bucket = S3Bucket.create(server.app)
    for path in archive.parent.glob("*.mp4"):
        bucket.put(f"v/{path.name}", path.read_bytes())
    run, log = tmp_path / "run", tmp_path / "log"
    # Less time for a file than the store is away.
    options = ["--output", run, "--model", model_folder, *MANY_CLIPS, "--timeout-s", 20]
    command = command_of("annotate", f"s3://{bucket.name}/v/", *options)
    rows = run / ANNOTATIONS_DIR
    line = run_through(command, lambda: any(rows.glob("*.parquet")), lambda: away(server), AWAY_S, log)
    assert f"s3://{bucket.name}" in line and reason in line
    found = audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR)
    assert found.clean and found.planned > 20 * NUM_VIDEOS
    failed = totals(run / ANNOTATIONS_DIR, frozenset()).failures
    assert sorted(status for status, _ in failed) == ["decode_error", "empty"]
    assert not (run / WAITING_DIR).exists()


def run_through(command: dict, has_begun: Callable, away: Callable, away_s: float, log: Path) -> str:
    """Run a job that is without a place once it has begun, for as long at least; the one line that it says of it."""
    with log.open("w") as said:
        job = subprocess.Popen(**command, stdout=said, stderr=subprocess.STDOUT)
    try:
        wait_until(has_begun, job)
        with away():
            wait_until(lambda: "waiting " in log.read_text(), job)
            with pytest.raises(subprocess.TimeoutExpired):
                job.wait(away_s)
        assert job.wait(timeout=300) == 0, log.read_text()
    finally:
        job.kill()
    (line,) = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.startswith("waiting ")]
    return line


def wait_until(condition: Callable[[], bool], job: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)
