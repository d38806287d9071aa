"""metrics.jsonl: whole lines, one of each kind and step, whatever was killed; TensorBoard shows the same."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest

import jobs.metrics
from jobs.metrics import MetricsWriter, read_metrics


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder) -> dict[tuple[str, int], list[float]]:
    """Scalars of TensorBoard's files, read from the bytes: length, checksum, event, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[tuple[str, int], list[float]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def test_a_line_per_record_and_the_same_for_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        assert writer.write("step", 1, {"loss": 2.5, "stage": "nested"})
        assert writer.write("step", 2, {"loss": 1.5, "stage": "nested"})
        assert writer.write("epoch", 1, {"val_top1": {0.2: 0.5, 1.0: 0.75}, "epochs": 4})
    assert lines(tmp_path) == read_metrics(tmp_path)
    assert lines(tmp_path) == [
        {"kind": "step", "step": 1, "loss": 2.5, "stage": "nested"},
        {"kind": "step", "step": 2, "loss": 1.5, "stage": "nested"},
        {"kind": "epoch", "step": 1, "val_top1": {"0.2": 0.5, "1.0": 0.75}, "epochs": 4},
    ]
    assert events(tmp_path) == {
        ("step/loss", 1): [2.5],
        ("step/loss", 2): [1.5],
        ("epoch/val_top1/0.2", 1): [0.5],
        ("epoch/val_top1/1.0", 1): [0.75],
        ("epoch/epochs", 1): [4.0],
    }


def test_a_run_that_continues_doubles_nothing(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write("step", step, {"loss": 1.0 / step})
        writer.write("epoch", 1, {"loss": 0.5})
        assert not writer.write("step", 3, {"loss": 9.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsWriter(tmp_path) as writer:
        assert not writer.write("step", 2, {"loss": 9.0})
        assert not writer.write("epoch", 1, {"loss": 9.0})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert writer.write("step", 4, {"loss": 0.25})
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        *(("step", 1), ("step", 2), ("step", 3), ("epoch", 1), ("step", 4))
    ]
    assert events(tmp_path)["step/loss", 2] == [0.5]
    assert len(events(tmp_path)) == 5 and all(len(values) == 1 for values in events(tmp_path).values())


def test_what_the_state_has_not_seen_goes(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write("step", step, {"loss": 1.0})
            writer.write("epoch", step, {"loss": 1.0})
    with MetricsWriter(tmp_path, done={"step": 2, "epoch": 3}) as writer:
        assert [writer.write(kind, 3, {"loss": 2.0}) for kind in ("step", "epoch")] == [True, False]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "step"] == [1, 2, 3]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "epoch"] == [1, 2, 3]
    assert events(tmp_path)["step/loss", 3] == [2.0] and ("step/loss", 4) not in events(tmp_path)


def test_a_line_that_was_cut_short_is_written_again(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("step", 1, {"loss": 2.0})
        writer.write("step", 2, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        with MetricsWriter(tmp_path) as writer:
            assert writer.write("step", 2, {"loss": 1.0})
        assert path.read_bytes() == whole


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("step", 1, {"loss": 2.0})
    assert len(lines(tmp_path)) == 1
    writer.close()


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("epoch", 1, {"loss": math.nan, "val_top1": {0.2: math.inf}, "rate": 0.5})
    assert lines(tmp_path) == [{"kind": "epoch", "step": 1, "loss": None, "val_top1": {"0.2": None}, "rate": 0.5}]
    assert events(tmp_path) == {("epoch/rate", 1): [0.5]}


def test_without_tensorboardx_there_is_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write("epoch", 1, {"loss": 1.0})
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["no json", "[]", '{"kind": "step"}', '{"kind": 1, "step": 1}', '{"step": 1.5}'])
def test_a_file_that_no_writer_wrote_is_left_alone(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "step", "step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is no record"):
        MetricsWriter(tmp_path)
    assert line in (tmp_path / "metrics.jsonl").read_text()


def test_a_disk_that_fails_costs_neither_a_line_nor_an_event(tmp_path, monkeypatch):
    """TensorBoard's is full; then that of metrics.jsonl fails with half a line there, and with a whole one."""
    append, left = jobs.metrics.append_line, [5, None]

    def failing(path: Path, line: bytes) -> None:
        append(path, line)
        if left:
            cut = left.pop(0)
            os.truncate(path, path.stat().st_size - len(line[cut:]) if cut else path.stat().st_size)
            raise OSError(errno.EIO, "no answer")

    with MetricsWriter(tmp_path) as writer:
        writer.write("step", 1, {"loss": 2.5})
        with Path("/dev/full").open("wb", buffering=0) as full:
            writer._board._events._py_recordio_writer._writer = full
            writer.write("step", 2, {"loss": 2.5})
        monkeypatch.setattr("jobs.metrics.append_line", failing)
        for step in (3, 4):
            writer.write("step", step, {"loss": 2.5})
    assert not left and [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert events(tmp_path) == {("step/loss", step): [2.5] for step in (1, 2, 3, 4)}
