"""The columns that users' scripts rely on are there, with their names and types."""

import pyarrow as pa
import pytest

from pipelines.schema import ANNOTATIONS, DECODED, MANIFEST, PlannedClip, Status

PROMISED = {
    **dict.fromkeys(("clip_id", "video", "status", "error", "label", "decoder", "model_id"), pa.string()),
    **dict.fromkeys(("start_s", "end_s"), pa.float64()),
    **dict.fromkeys(("score", "capacity", "decode_ms", "repeated_share", "model_ms"), pa.float32()),
    **dict.fromkeys(("flops", "dense_flops"), pa.int64()),
    "labels": pa.list_(pa.string()),
    "scores": pa.list_(pa.float32()),
    "tokens_per_expert": pa.list_(pa.int64()),
}


@pytest.mark.parametrize("column", PROMISED)
def test_annotations_have_the_promised_column(column):
    assert ANNOTATIONS.field(column).type == PROMISED[column]


def test_statuses_are_the_promised_ones():
    promised = {"ok", "decode_error", "timeout", "empty", "unsupported", "missing", "model_error"}
    assert {status.value for status in Status} == promised


@pytest.mark.parametrize("schema", [MANIFEST, DECODED, ANNOTATIONS], ids=["manifest", "decoded", "annotations"])
def test_no_column_twice(schema):
    assert len(set(schema.names)) == len(schema.names)


def test_a_planned_clip_is_a_manifest_row():
    values = {str: "x", float: 0.25, int: 7}
    row = {name: values[kind] for name, kind in PlannedClip.__annotations__.items()}
    assert PlannedClip(**pa.Table.from_pylist([row], schema=MANIFEST).to_pylist()[0]) == PlannedClip(**row)


def test_decoding_keeps_every_manifest_column():
    assert {field.name: field.type for field in MANIFEST}.items() <= {f.name: f.type for f in DECODED}.items()
