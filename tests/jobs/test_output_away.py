"""An output folder whose file system fails in the middle of a run: full, read-only, dropped, or away with its mount."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mone.checkpoint import read_checkpoint
from pipelines.commit import ANNOTATIONS_DIR, STAGING_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR
from pipelines.waiting import WAITING_DIR
from tests.conftest import NUM_VIDEOS, command_of
from tests.jobs.test_storage_away import MANY_CLIPS, run_through, wait_until
from tests.jobs.test_train import samples_of_epochs
from tests.pipelines.test_train_ray import BATCH, checkpoints, videos  # noqa: F401 - a fixture
from tests.pipelines.test_train_ray import command_of as tiny_command

pytestmark = pytest.mark.ray

AWAY_S = 30.0
REASONS = {"read_only": "Read-only file system", "full": "No space left on device", "dropped": "missing or empty"}


class Mount:
    """A small file system in memory, which can be made to fail."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self._command("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """As the kernel makes it after errors. It refuses while a file is open for writing."""
        while subprocess.run(["mount", "-o", "remount,ro", self.place], capture_output=True, check=False).returncode:
            pass
        yield
        self._command("mount", "-o", "remount,rw", self.place)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Nothing is left, whatever was free."""
        ballast = self.place / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                while self._fits(file, size):
                    pass
        yield
        ballast.unlink()

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """Another, empty folder is in its place; what is open stays open."""
        elsewhere = self.place.with_name("elsewhere")
        elsewhere.mkdir()
        self._command("mount", "--move", self.place, elsewhere)
        yield
        self._command("mount", "--move", elsewhere, self.place)

    def end(self) -> None:
        self._command("umount", "--lazy", self.place)

    @staticmethod
    def _fits(file, size: int) -> bool:
        try:
            return file.write(bytes(size)) == size
        except OSError:
            return False

    @staticmethod
    def _command(*words: object) -> None:
        subprocess.run(list(map(str, words)), capture_output=True, check=True)


@contextmanager
def renamed(output: Path) -> Iterator[None]:
    output.rename(output.with_name("away"))
    yield
    output.with_name("away").rename(output)


def annotate_through(command: dict, output: Path, away: Callable, away_s: float, log: Path) -> str:
    """As `run_through`, once rows are there; then each clip has one."""
    line = run_through(command, lambda: any((output / ANNOTATIONS_DIR).glob("*.parquet")), away, away_s, log)
    found = audit(output / MANIFEST_DIR, output / ANNOTATIONS_DIR)
    assert found.clean and found.planned > 20 * NUM_VIDEOS
    assert not any((output / name).exists() for name in (WAITING_DIR, STAGING_DIR))
    return line


def test_a_run_waits_for_its_folder(archive, model_folder, tmp_path):
    run = tmp_path / "run"
    fewer_clips = ["--span", 0.2, "--stride", 0.05, "--batch-size", 1]
    command = command_of("annotate", archive, "--output", run, "--model", model_folder, *fewer_clips)
    line = annotate_through(command, run, lambda: renamed(run), 1.0, tmp_path / "log")
    assert str(run) in line and "missing or empty" in line


@pytest.mark.slow  # three minutes, and not less on the workers
def test_a_folder_that_stays_away_ends_the_run_with_what_to_do(archive, model_folder, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = command_of("annotate", archive, "--output", run, "--model", model_folder, *MANY_CLIPS)
    with log.open("w") as said:
        job = subprocess.Popen(**command, stdout=said, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: any((run / ANNOTATIONS_DIR).glob("*.parquet")), job)
        with renamed(run):
            assert job.wait(timeout=400) == 1
    finally:
        job.kill()
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"python -m jobs.annotate: the output folder {run} fails on ")
    assert "missing or empty" in last and "the same command continues" in last
    kept = {path: path.read_bytes() for path in (run / ANNOTATIONS_DIR).iterdir()}
    ended = subprocess.run(**command, capture_output=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR).clean
    assert kept and {path: path.read_bytes() for path in kept} == kept


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    if os.geteuid():
        pytest.skip("only root mounts")
    try:
        mounted = Mount(tmp_path / "mount")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel lets nobody mount: {error.stderr}")
    yield mounted
    mounted.end()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["read_only", "full", "dropped"])
def test_a_run_waits_for_its_file_system(mount, way, archive, model_folder, tmp_path):
    # The mount point itself, of which an empty folder is left.
    command = command_of("annotate", archive, "--output", mount.place, "--model", model_folder, *MANY_CLIPS)
    line = annotate_through(command, mount.place, getattr(mount, way), AWAY_S, tmp_path / "log")
    assert str(mount.place) in line and REASONS[way] in line


@pytest.mark.slow
@pytest.mark.parametrize("way", ["read_only", "full", "dropped"])
def test_training_waits_for_its_file_system(mount, way, videos, tmp_path):  # noqa: F811
    """Checkpoints after every third step, of 2 x 2 epochs."""
    run = mount.place
    options = ["--recipe", "long", "--data", videos, "--clips-per-video", 12, "--num-workers", 2]
    options += ["--checkpoint-every", 3, "--log-samples", "--output", run]
    line = run_through(tiny_command(*options), lambda: checkpoints(run), getattr(mount, way), AWAY_S, tmp_path / "log")
    assert str(run) in line and REASONS[way] in line
    assert read_checkpoint(run / "model").labels
    rows = [json.loads(line) for file in (run / "samples").iterdir() for line in file.read_text().splitlines()]
    num_samples = 1 + max(sample for row in rows for sample in row["samples"])
    assert samples_of_epochs(run, -(-num_samples // BATCH)) == [[*range(num_samples)]] * 4
