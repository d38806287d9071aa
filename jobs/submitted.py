"""Jobs that were submitted to a cluster: they run on its head, in a copy of the directory that they were sent from.

There a relative path is not what it was where it was typed: what is read from the copy other nodes may not have, and
what is written there goes with the job. Both are refused, in one line, before any work.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

# Options that name places which all nodes read or write, and how --help calls those without dashes.
_SHARED = ("archive", "data", "output", "folder", "runs", "storage", "cache")
_POSITIONAL = {"archive": "ARCHIVE", "folder": "DIR", "runs": "RUN"}
# A small model may come with the copy; the job hands it to the other nodes.
_CARRIED = ("model", "init")
_NO_PLACE = ("data", "motions")  # rendered, not read


def stray_place(config: Any) -> str:
    """A place that this job would look for in the copy; one line that says which, or "".

    Args:
        config: The job's options, a dataclass.
    """
    environment = _runtime_environment()
    if environment is None:
        return ""
    copy = Path.cwd() if environment.get("working_dir") else None
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        for place in value if isinstance(value, tuple) else (value,):
            if isinstance(place, str) and place and _is_stray(name, place, copy):
                option = _POSITIONAL.get(name, f"--{name.replace('_', '-')}")
                return (
                    f"{option} {place} is not a place that all nodes see: a submitted job runs on the head, in a copy "
                    f"of your directory{' without what .rayignore names' if name in _CARRIED else ''}; give an "
                    "absolute path on a shared disk"
                )
    return ""


def _runtime_environment() -> dict[str, Any] | None:
    """What the job was submitted with; None where it was not submitted."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return None if config is None else json.loads(config).get("runtime_env") or {}


def _is_stray(name: str, place: str, copy: Path | None) -> bool:
    if "://" in place or (name, place) == _NO_PLACE:
        return False
    if name in _CARRIED:
        return not Path(place).is_absolute() and not Path(place).exists()
    in_copy = copy is not None and Path(place).resolve().is_relative_to(copy.resolve())
    return name in _SHARED and (not Path(place).is_absolute() or in_copy)
