"""An output folder that fails for a while is waited for, and what does not pass is final."""

import errno
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import patience
from pipelines.commit import ANNOTATIONS_DIR, CommittedFiles, StagedFiles, fence, write_remaining
from pipelines.output import OutputFailedError, failure_of, in_output, is_there, told_in
from pipelines.planning import MANIFEST_DIR
from pipelines.row_files import has_rows, parquet_files
from pipelines.schema import ANNOTATIONS, MANIFEST
from pipelines.waiting import told
from tests.pipelines.test_commit import committed_ids, rows, write


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "_LONGEST_WAIT_S", 0.01)


@pytest.fixture
def output(tmp_path) -> Path:
    """A run's folder, with the file that it has from its start."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    return tmp_path / "run"


class Failing:
    """Something that fails some times, each time with the next of these errors, and then gives 7."""

    def __init__(self, *numbers: int) -> None:
        self.left = list(numbers)

    def __call__(self) -> int:
        if self.left:
            number = self.left.pop(0)
            raise OSError(number, os.strerror(number))
        return 7


@contextmanager
def back_when_noticed(output: Path, put_back: Callable[[], None]) -> Iterator[list[str]]:
    """What is said while waiting; the folder is put back when something was."""
    said = list[str]()

    def listen(text: str) -> None:
        if text and not said:
            threading.Timer(0.1, put_back).start()
        said.append(text)

    with told(listen):
        yield said
    assert said and said[-1] == "" and said[0].startswith(f"{output}: ")


def test_failures_that_pass_are_waited_for_where_somebody_is_told(output):
    said = list[str]()
    with told(said.append):
        passing = [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EHOSTDOWN, errno.ETIMEDOUT]
        assert in_output(output, Failing(*passing)) == 7
    assert said[0] == f"{output}: Input/output error" and said[-1] == ""
    assert f"{output}: No space left on device" in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT])
def test_failures_that_do_not_pass_are_final_at_once(output, number):
    failing = Failing(number, number, number)
    with told(lambda text: None), pytest.raises(OSError) as caught:
        in_output(output, failing)
    assert caught.value.errno == number and len(failing.left) >= 1


def test_a_folder_that_does_not_come_back_is_given_up_with_what_to_do(output, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    with told(lambda text: None), pytest.raises(OutputFailedError) as caught:
        in_output(output, Failing(*[errno.ENOSPC] * 10_000))
    message = str(caught.value)
    assert str(output) in message and "No space left on device" in message and "the same command continues" in message
    told_by_ray = "".join(traceback.format_exception(caught.value)) + "\nTo change this, configure Ray."
    assert told_in(told_by_ray) == message and told_in("OSError: no space") == ""


def renamed_away(output: Path) -> Callable[[], None]:
    """As where the folder is below a mount point whose file system drops."""
    away = output.with_name("away")
    output.rename(away)
    return lambda: away.rename(output) and None


def hidden_by_an_empty_one(output: Path) -> Callable[[], None]:
    """As where it is the mount point."""
    put_back = renamed_away(output)
    output.mkdir()

    def empty_goes() -> None:
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        output.rmdir()
        put_back()

    return empty_goes


@pytest.mark.parametrize("drop", [renamed_away, hidden_by_an_empty_one])
def test_a_folder_that_is_away_is_neither_empty_nor_fenced(output, drop):
    writer = CommittedFiles(output)
    write(writer, "ab", task=0)
    (output / MANIFEST_DIR).mkdir()
    StagedFiles(output, MANIFEST_DIR).commit("rows.parquet", rows("abcd", MANIFEST))
    (manifest,) = parquet_files(output / MANIFEST_DIR)
    asked: dict[str, tuple[Callable[[], object], object]] = {
        "has_rows": (lambda: has_rows(output / ANNOTATIONS_DIR), True),
        "parquet_files": (lambda: len(parquet_files(output / MANIFEST_DIR)), 1),
        "write_remaining": (lambda: write_remaining(output, output / MANIFEST_DIR), 2),
        "read_table": (lambda: in_output(output, lambda: len(pq.read_table(manifest))), 4),
        "commit": (lambda: writer.files.commit("c.parquet", pa.concat_tables([rows("c")])), None),
        "fence": (lambda: fence(output), None),
    }
    for name, (ask, answer) in asked.items():
        put_back = drop(output)
        assert not is_there(output) and failure_of(output)
        with back_when_noticed(output, put_back) as said:
            assert ask() == answer, name
        assert "missing or empty" in said[0]
    assert committed_ids(output) == set("abc") and failure_of(output) == ""
    with told(lambda text: None), pytest.raises(FileNotFoundError):  # fenced, in a folder that is there
        writer.files.commit("d.parquet", rows("d", ANNOTATIONS))
    assert committed_ids(output) == set("abc")


def test_a_writer_waits_and_tells_by_the_run_s_folder(output, monkeypatch):
    writer = CommittedFiles(output)
    failing, fsync = Failing(errno.EIO, errno.EIO), os.fsync
    told_then = list[str]()

    def failing_fsync(descriptor: int) -> None:
        told_then.extend(path.read_text() for path in output.glob(".waiting/*"))
        failing()
        fsync(descriptor)

    monkeypatch.setattr("pipelines.commit.os.fsync", failing_fsync)
    write(writer, "ab")
    assert committed_ids(output) == set("ab") and set(told_then) == {f"{output}: Input/output error"}
