"""What the driver says of an output that is away, and how a run ends for which that took too long."""

import threading
import time
from pathlib import Path

import pytest

import jobs.waits
from jobs.cli import JobFailed
from jobs.waits import waiting_shown
from pipelines import patience
from pipelines.output import OutputFailedError, in_output


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(jobs.waits, "_POLL_S", 0.01)
    monkeypatch.setattr(patience, "_LONGEST_WAIT_S", 0.01)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    return tmp_path / "run"


def waiting_lines(capsys, until: int = 0) -> list[str]:
    lines, deadline_s = list[str](), time.monotonic() + 30
    while len(lines) < max(until, 1) and time.monotonic() < deadline_s:
        lines += [line for line in capsys.readouterr().err.splitlines() if line.startswith("waiting ")]
        if not until:
            break
    return lines


def test_a_folder_that_is_away_is_said_in_one_line(run, capsys):
    away = run.with_name("away")
    with waiting_shown(run):
        run.rename(away)
        lines = waiting_lines(capsys, until=1)
        threading.Timer(0.1, lambda: away.rename(run)).start()
        assert in_output(run, lambda: "done") == "done"
    lines += waiting_lines(capsys)
    assert len(lines) == 1 and f"{run}: it is missing or empty" in lines[0]
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_a_mount_that_hangs_is_said(run, capsys, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(jobs.waits, "_NO_ANSWER_S", 0.05)
    monkeypatch.setattr(jobs.waits, "failure_of", lambda output: hangs.wait() and "")
    with waiting_shown(run):
        (line,) = waiting_lines(capsys, until=1)
        monkeypatch.setattr(jobs.waits, "failure_of", lambda output: "")
        hangs.set()
    assert f"{run}: it does not answer" in line


def test_a_run_that_has_waited_too_long_fails_with_what_to_do(run):
    with pytest.raises(JobFailed, match=r"^the folder fails; put that right$"), waiting_shown(run):
        raise OutputFailedError("the folder fails; put that right")
    with pytest.raises(KeyError), waiting_shown(run):
        raise KeyError("of another kind")
