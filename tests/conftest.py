"""What the tests of pipelines and jobs share: a Ray, a tiny model, and an archive with two files that are no videos."""

import csv
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.config import ModelConfig
from mone.model import ViViT
from pipelines.synthetic import MOTIONS, render, split_seeds, write_clip
from tests.web_server import FaultyApp, S3Bucket, WebServer, serving

# Two clips of a second in each rendered video of two.
TINY = ModelConfig(
    num_classes=len(MOTIONS),
    num_frames=8,
    height_px=64,
    width_px=64,
    tubelet_px=16,
    dim=32,
    num_heads=4,
    depth=2,
    temporal_depth=1,
    pixels="centred",
    span_s=1.0,
)
NUM_VIDEOS, NUM_CLIPS = 8, 2 * 8 + 2  # with the two that are no videos


def pytest_runtest_setup() -> None:
    torch.set_num_threads(1)  # models here are too small for more


@pytest.fixture(scope="session")
def ray_session(s3_server) -> Iterator[None]:
    """A Ray in this process, started once; its workers know the S3 server."""
    import ray
    from ray.data import DataContext

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 2**20,
    )
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def shared_ray(ray_session) -> None:
    """The session's Ray."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model in which no parameter is at a special value, so that its answers differ from clip to clip."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = ViViT(TINY)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
        model.head.weight.normal_()
    return save_checkpoint(model, MOTIONS, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def checkpoint(model_folder) -> Checkpoint:
    return read_checkpoint(model_folder)


@pytest.fixture(scope="session")
def archive(tmp_path_factory) -> Path:
    """A table of eight motions and two files that are no videos: the seventh and eighth row are the split "val"."""
    folder = tmp_path_factory.mktemp("archive")
    rows = []
    for number, seed in enumerate(split_seeds("test", NUM_VIDEOS)):
        clip = render(seed, num_frames=16, size_px=64)
        write_clip(clip, folder / f"{clip.label}.mp4")
        rows.append((f"{clip.label}.mp4", clip.label, "train" if number < 6 else "val"))
    (folder / "damaged.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    rows += [("damaged.mp4", MOTIONS[0], "train"), ("text.mp4", MOTIONS[1], "train")]
    return write_labels(folder / "labels.csv", rows)


@pytest.fixture
def web(tmp_path) -> Iterator[WebServer]:
    """A web server of the files in `tmp_path / "web"`."""
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FaultyApp]:
    """A real S3-protocol server on loopback, which the environment of this process and its children points to."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = FaultyApp(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "an-id")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield app
    server.shutdown()


@pytest.fixture
def bucket(s3_server) -> S3Bucket:
    """An empty bucket there."""
    s3_server.faults.clear()
    s3_server.requests.clear()
    return S3Bucket.create(s3_server)


def run_job(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.NAME` in a process of its own, with a Ray of its own."""
    return subprocess.run(**command_of(name, *arguments), capture_output=True, timeout=180, check=False)


def command_of(name: str, *arguments: object) -> dict[str, Any]:
    """What `subprocess` needs to run a job."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", f"jobs.{name}", *map(str, arguments)]
    return {"args": command, "env": environment, "cwd": Path(__file__).parents[1], "text": True}


def complaints(stderr: str, name: str) -> list[str]:
    """The lines that a job itself says on stderr, beside its progress bars."""
    return [line for line in re.split("[\r\n]", stderr) if line.startswith(f"python -m jobs.{name}: ")]


def write_labels(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A table of labelled videos: file, label, split."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("video", "label", "split"), *rows])
    return path
