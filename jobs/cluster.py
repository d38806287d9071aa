"""Starting or joining Ray."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from jobs.cli import UserError, interrupt_on_sigterm


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray for the time of a job: a cluster, or one inside this process.

    Args:
        address: A cluster's address ("auto", "ray://host:10001"); "" takes RAY_ADDRESS, else starts Ray here.

    Raises:
        UserError: No cluster answers at the address.
    """
    set_ray_options()
    address = address or os.environ.get("RAY_ADDRESS", "")
    options = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            ray.init(address, **options)
        else:
            ray.init("local", include_dashboard=False, **options)  # even where another Ray runs on this machine
    except (ConnectionError, ValueError, AuthenticationError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {_first_line(error)}{_token_advice()}") from error
    interrupt_on_sigterm()
    # One progress bar, ours, in clips; Ray Data's speaks of blocks and operators.
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]


def _token_advice() -> str:
    """A cluster that asks for a token says nothing else to who comes without one."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return "; has ~/.ray/auth_token (or RAY_AUTH_TOKEN) the token of its head?"
    return "; if it asks for a token (docs/cluster.md): export RAY_AUTH_MODE=token"


def set_ray_options() -> None:
    """Options of a Ray that is started from this process, where the user has not set them."""
    options = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` re-installs in every worker
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # else a warning about its own actors for every run
        # Else workers beyond one for each CPU end after a second without work, and others take as long to start.
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
    }
    for name, value in options.items():
        os.environ.setdefault(name, value)
