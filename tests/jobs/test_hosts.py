"""Annotating over two hosts that have addresses of their own: network namespaces of this machine, and a cable."""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR
from tests.conftest import NUM_VIDEOS, command_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Of the block that is set aside for tests of networks.
ADDRESSES = ("198.18.77.1", "198.18.77.2")
PORT = 6379
# Ray's nodes and their users know each other by a token.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Each video is decoded for seconds, so that there is work for both.
MANY_CLIPS = ["--span", 0.2, "--stride", 0.02, "--batch-size", 1]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that reach each other, and nothing else."""
    names = [f"mone{os.getpid()}{letter}" for letter in "ab"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "cable0", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable0")
                for device in ("lo", "cable0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', b'') or error}")
        yield names


@contextlib.contextmanager
def node(host: str, address: str, *options: str) -> Iterator[None]:
    """A Ray node on a host, with a disk of its own for what Ray writes."""
    with contextlib.ExitStack() as stack:
        temp = stack.enter_context(tempfile.TemporaryDirectory(prefix="host-", ignore_cleanup_errors=True))
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={address}", "--num-cpus=1", f"--object-store-memory={100 * 2**20}"]
        if "--head" in options:
            command += [f"--temp-dir={temp}"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, *command, *options],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            process.terminate()  # which ends what it has started
            process.wait(timeout=60)


def test_two_hosts_share_the_work(hosts, archive, model_folder, tmp_path):
    with (
        node(hosts[0], ADDRESSES[0], "--head", f"--port={PORT}", "--include-dashboard=false"),
        node(hosts[1], ADDRESSES[1], f"--address={ADDRESSES[0]}:{PORT}"),
    ):
        address = f"{ADDRESSES[0]}:{PORT}"
        seen = on_host(hosts[0], sys.executable, "-c", WAIT_FOR_BOTH, address)
        assert seen.returncode == 0, seen.stderr
        assert seen.stdout.split() == sorted(ADDRESSES)
        command = command_of(
            *("annotate", archive, "--output", tmp_path / "run", "--model", model_folder, "--address", address),
            *MANY_CLIPS,
        )["args"]
        ended = on_host(hosts[0], *command)
        assert ended.returncode == 0, ended.stderr
        found = audit(tmp_path / "run" / MANIFEST_DIR, tmp_path / "run" / ANNOTATIONS_DIR)
        assert found.clean and found.annotated > 20 * NUM_VIDEOS
        worked = on_host(hosts[0], sys.executable, "-c", WHO_DECODED, address)
        assert worked.returncode == 0, worked.stderr
        assert worked.stdout.split() == sorted(ADDRESSES)


def environment() -> dict[str, str]:
    """Of all processes of the cluster and of its user."""
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | TOKEN


def on_host(host: str, *command: str) -> subprocess.CompletedProcess[str]:
    given = command_of("annotate") | {"args": ["ip", "netns", "exec", host, *command], "env": environment()}
    return subprocess.run(**given, capture_output=True, timeout=300, check=False)


WAIT_FOR_BOTH = """
import sys, time, ray
deadline_s = time.monotonic() + 60
while True:
    try:
        ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
        break
    except (ConnectionError, RuntimeError, TimeoutError):
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
while len(up := sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])) < 2:
    assert time.monotonic() < deadline_s
    time.sleep(0.1)
print(*up)
"""
# Counters of ended processes are there with a node's next report.
WHO_DECODED = """
import sys, time, urllib.request, ray
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
deadline_s, worked = time.monotonic() + 30, set()
while len(worked) < 2 and time.monotonic() < deadline_s:
    for node in ray.nodes():
        address = node["NodeManagerAddress"]
        url = f"http://{address}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            if any(line.startswith(b"ray_mone_frames_decoded_total{") for line in answer):
                worked.add(address)
    time.sleep(0.3)
print(*sorted(worked))
"""
