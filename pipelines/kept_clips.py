"""Clips in memory that stay on disk between runs: many runs on the same clips decode or render them once."""

import functools
import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from mone.clips import MemoryClips
from pipelines.view import PIXELS_VERSION

_FAILURES = "failures"


def kept(load: "functools.partial[MemoryClips]", folder: str | Path) -> MemoryClips:
    """The clips of a call, from FOLDER/HASH.safetensors where the same call was made before.

    Args:
        load: A function and its arguments, whose text tells calls apart; a changed file under the same name is not
            noticed.
        folder: Made where it does not exist. Its files can be deleted at any time.
    """
    call = f"{PIXELS_VERSION} {load.func.__name__} {load.args!r} {load.keywords!r}"
    path = Path(folder) / f"{hashlib.sha256(call.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        clips = load()
        partial = path.with_suffix(f".{os.getpid()}.partial")  # of each process its own
        tensors = {"frames_STHWC": clips.frames_STHWC, "labels_S": clips.labels_S}
        try:
            save_file(tensors, partial, metadata={_FAILURES: json.dumps(clips.failures)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return clips
    with safe_open(path, framework="pt") as file:
        clips = MemoryClips(file.get_tensor("frames_STHWC"), file.get_tensor("labels_S"))
        clips.failures = json.loads(file.metadata()[_FAILURES])
    return clips
