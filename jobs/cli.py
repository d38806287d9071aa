"""The command line of a job: one frozen dataclass in, an exit status out, errors in one line."""

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

import tyro

from jobs.submitted import stray_place

Config = TypeVar("Config")

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """Something that the person who started the job can put right; one line that says what."""


class JobFailed(Exception):  # noqa: N818 - an outcome, not a defect
    """The job ran to its end and the outcome is a failure; one line that says why."""


@contextlib.contextmanager
def checking_input() -> Iterator[None]:
    """What goes wrong in this block is the input's fault, not ours: said in one line, exit status 2."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror}: {error.filename}" if error.filename else str(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def run(
    name: str,
    config_type: type[Config],
    job: Callable[[Config], None],
    argv: Sequence[str] | None,
    description: str | None = None,
) -> int:
    """Parse the arguments, run the job, and turn its end into an exit status.

    Args:
        name: The job, as in `python -m jobs.NAME`.
        config_type: Dataclass whose fields are the options; a union of such is a job with subcommands.
        job: The work.
        argv: Arguments without the program's name; None takes those of the process.
        description: Words for --help in place of the dataclass's docstring.

    Returns:
        0 done, 1 failed outcome, 2 bad input, 130 stopped by Ctrl-C or SIGTERM.
    """
    program = f"python -m jobs.{name}"
    handler = signal.getsignal(signal.SIGTERM)
    interrupt_on_sigterm()
    try:
        config = _parse(config_type, sys.argv[1:] if argv is None else list(argv), program, description)
        if stray := stray_place(config):
            raise UserError(stray)
        job(config)
    except UserError as error:
        return _say(program, error, BAD_INPUT)
    except JobFailed as failure:
        return _say(program, failure, FAILED)
    except KeyboardInterrupt:
        return _say(program, "stopped; what was committed stays, the same command continues", INTERRUPTED)
    except SystemExit as end:  # --help
        return int(end.code or DONE)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return DONE


def _say(program: str, message: object, status: int) -> int:
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def _parse(config_type: type[Config], argv: list[str], program: str, description: str | None) -> Config:
    """Parse with tyro, whose boxed error is folded into one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_type, args=argv, prog=program, description=description)
    except SystemExit as end:
        if not end.code:
            raise
        body = re.split(r"\n\W*[-─]{5,}\W*\n", complaint.getvalue())[1]
        raise UserError(f"{' '.join(body.split())} (--help lists the options)") from None


def interrupt_on_sigterm() -> None:
    """Let SIGTERM stop a job as Ctrl-C does: schedulers and `ray job stop` send it, and Ray's start takes it over."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
