"""How a job ends: exit statuses, one line for people, --help; and what importing a job must not import."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

import jobs.annotate
import jobs.audit
import jobs.benchmark
import jobs.curves
import jobs.doctor
import jobs.evaluate
import jobs.plan
import jobs.render
import jobs.report
import jobs.sweep
import jobs.train
from jobs.cli import JobFailed, UserError, checking_input, run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Words for --help."""

    count: int = 3
    """How many."""
    sharp: bool = False
    """Whether."""


@pytest.fixture(autouse=True)
def _sigterm_as_before():
    """Jobs own their process and leave their handler; the tests' process is not theirs."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def end_of(job, argv=()) -> int:
    return run("some", Options, job, list(argv))


def raising(error: BaseException):
    def job(config: Options) -> None:
        raise error

    return job


def test_a_job_that_ends_is_done(capsys):
    seen = []
    assert end_of(seen.append, ["--count", "5", "--sharp"]) == 0
    assert seen == [Options(count=5, sharp=True)]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, status",
    [
        (JobFailed("too many\n  failed"), 1),
        (UserError("too many\n  failed"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_end_is_a_status_and_one_line(capsys, error, status):
    assert end_of(raising(error)) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("python -m jobs.some: ")
    assert len(printed.err.splitlines()) == 1
    if status != 130:
        assert printed.err == "python -m jobs.some: too many failed\n"


def test_a_defect_of_ours_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        end_of(raising(ZeroDivisionError()))


def test_sigterm_stops_a_job_as_ctrl_c_does(capsys):
    cleaned = []

    def job(config: Options) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(True)

    started_s = time.monotonic()
    assert end_of(job) == 130
    assert time.monotonic() - started_s < 30 and cleaned
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("argv", [["--count", "some"], ["--count"], ["--colour", "red"], ["stray"]])
def test_what_cannot_be_parsed_is_one_line(capsys, argv):
    assert end_of(lambda config: pytest.fail("the job ran"), argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert argv[0].lstrip("-") in printed.err and "--help" in printed.err


@pytest.mark.parametrize(
    "error, message",
    [
        (FileNotFoundError(2, "No such file or directory", "/some/file"), "No such file or directory: /some/file"),
        (OSError("something else"), "something else"),
        (ValueError("out of range"), "out of range"),
    ],
)
def test_checking_input_blames_the_input(error, message):
    with pytest.raises(UserError) as raised, checking_input():
        raise error
    assert str(raised.value) == message
    with pytest.raises(KeyError), checking_input():
        raise KeyError("ours")


@pytest.mark.parametrize(
    "main, config",
    [
        (jobs.annotate.main, jobs.annotate.Annotate),
        (jobs.audit.main, jobs.audit.AuditJob),
        (jobs.curves.main, jobs.curves.Curves),
        (jobs.doctor.main, jobs.doctor.Doctor),
        (jobs.evaluate.main, jobs.evaluate.Evaluate),
        (jobs.plan.main, jobs.plan.Plan),
        (jobs.render.main, jobs.render.Render),
        (jobs.report.main, jobs.report.Report),
        (jobs.sweep.main, jobs.sweep.Sweep),
        (jobs.train.main, jobs.train.Train),
    ],
)
def test_help_names_every_option(capsys, main, config):
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for field in dataclasses.fields(config):
        positional = {"archive": "ARCHIVE", "folder": "DIR", "runs": "RUN"}.get(field.name, "")
        option = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"({option}|{positional or option})[ ,]", printed.out), option


@pytest.mark.parametrize("name", jobs.benchmark.BENCHMARKS)
def test_help_of_a_benchmark_names_every_option(capsys, name):
    assert jobs.benchmark.main([name, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for field in dataclasses.fields(jobs.benchmark.BENCHMARKS[name]):
        assert f"--{field.name.replace('_', '-')}" in printed.out


def test_help_lists_the_benchmarks(capsys):
    assert jobs.benchmark.main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "JSON" in printed.out
    for name in jobs.benchmark.BENCHMARKS:
        assert f"• {name} " in printed.out


def imported_by(modules: str) -> set[str]:
    code = f"import sys, {modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_decoding_workers_need_no_torch():
    found = imported_by("mone.tubelets, pipelines.decode, pipelines.tokenize")
    assert "pyarrow" in found and "torch" not in found


@pytest.mark.parametrize("job", ["benchmark", "curves", "metrics", "sweep_runs", "train"])
def test_a_machine_that_only_trains_or_times_the_model_needs_no_ray_and_no_decoder(job):
    found = imported_by(f"jobs.{job}")
    assert "torch" in found and not found & {"ray", "av", "decord", "pyarrow"}
