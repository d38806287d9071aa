"""Checkpoints of Ray Train in a storage that may fail for a while, or in the middle of a write.

In a folder a checkpoint appears whole, by one rename, so that it counts even where Ray Train's list of them is lost.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs
import ray.train
from ray.train import Checkpoint

from pipelines.output import in_output, write_probe
from pipelines.patience import tried

RUN_NAME = "checkpoints"
# Ray Train's list of checkpoints, and how it names them.
_LIST, _NAMED, _PARTIAL = "checkpoint_manager_snapshot.json", "checkpoint_*", ".partial"

T = TypeVar("T")


def in_storage(storage: str, do: Callable[[], T]) -> T:
    """Do something in a folder, or at an address that pyarrow knows, until that can be done.

    Raises:
        OutputFailedError: The folder has failed for too long.
        OutOfPatienceError: The address has.
        OSError: A failure that does not pass.
    """
    return tried(do, storage, _passing) if "://" in storage else in_output(Path(storage), do)


def _passing(failure: Exception) -> str:
    final = isinstance(failure, FileNotFoundError | PermissionError) or "ACCESS_DENIED" in str(failure)
    return "" if final or not isinstance(failure, OSError) else " ".join(str(failure).split())


def make_storage(storage: str) -> None:
    """Make the folder, if it is one.

    Raises:
        OSError: It cannot be made.
    """
    if "://" not in storage:
        (Path(storage) / RUN_NAME).mkdir(parents=True, exist_ok=True)


def make_ready(storage: str) -> None:
    """Wait until a folder can be written, and take away what was cut short in it.

    Ray Train writes its list in place; it would not start with one that a kill or a full disk has cut short.
    """
    if "://" not in storage:
        in_output(Path(storage), lambda: write_probe(Path(storage)))
        in_output(Path(storage), lambda: _mend(Path(storage) / RUN_NAME))


def _mend(folder: Path) -> None:
    for partial in folder.glob(f"{_NAMED}{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)
    if (folder / _LIST).exists() and not _is_json((folder / _LIST).read_text(errors="replace")):
        (folder / _LIST).unlink()


def _is_json(text: str) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


def last_listed(storage: str) -> str:
    """Name of the checkpoint that Ray Train would continue from; "" where there is none."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage)
    try:
        with filesystem.open_input_stream(f"{path}/{RUN_NAME}/{_LIST}") as file:
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    last = json.loads(text)["latest_checkpoint_result"] if _is_json(text) else None
    return last["checkpoint_dir_name"] if last else ""


def load_last(load: Callable[[Path], T]) -> T | None:
    """On a worker: what is in that checkpoint, or in the last one of a folder whose list was lost.

    Args:
        load: From a folder with the files of a checkpoint.
    """
    folder = _folder()
    if folder is None:
        checkpoint = ray.train.get_checkpoint()
        return tried(lambda: _loaded(load, checkpoint), _context().storage_fs_path, _passing) if checkpoint else None
    return in_output(folder.parent, lambda: _loaded(load, ray.train.get_checkpoint() or _last_whole(folder)))


def _loaded(load: Callable[[Path], T], checkpoint: Checkpoint | None) -> T | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as files:
        return load(Path(files))


def _last_whole(folder: Path) -> Checkpoint | None:
    whole = [path for path in folder.glob(_NAMED) if path.suffix != _PARTIAL]
    return Checkpoint.from_directory(max(whole)) if whole else None


def store(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """On a worker: bring a checkpoint to the storage, for `ray.train.report`."""
    storage, folder = _context(), _folder()
    if folder is None:
        return tried(lambda: storage.persist_current_checkpoint(checkpoint, name), storage.storage_fs_path, _passing)
    in_output(folder.parent, lambda: _copy(Path(checkpoint.path), folder / name))
    return Checkpoint(str(folder / name), filesystem=storage.storage_filesystem)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + _PARTIAL)
    if not target.exists():
        shutil.copytree(source, partial, dirs_exist_ok=True)
        partial.rename(target)


def _folder() -> Path | None:
    """Of the checkpoints, where the storage is one of folders."""
    storage = _context()
    local = isinstance(storage.storage_filesystem, pyarrow.fs.LocalFileSystem)
    return Path(storage.experiment_fs_path) if local else None


def _context() -> Any:
    return ray.train.get_context().get_storage()
