"""Stages that sleep where they would decode or compute, with the rows of the real ones.

Their workers import this module, and so nothing that takes seconds of each of them.
"""

import time
from collections.abc import Iterator

import pyarrow as pa

from pipelines.ingest import CLIPS_TOGETHER
from pipelines.schema import ANNOTATIONS, DECODED


def decode(manifest: pa.Table, seconds_per_clip: float) -> Iterator[pa.Table]:
    """MANIFEST rows to DECODED rows with next to no pixels, in the time that decoding would take."""
    for start in range(0, len(manifest), CLIPS_TOGETHER):
        clips = manifest.slice(start, CLIPS_TOGETHER)
        time.sleep(seconds_per_clip * len(clips))
        made = {
            "decoder": pa.repeat("none", len(clips)),
            "decode_ms": pa.repeat(pa.scalar(seconds_per_clip * 1e3, pa.float32()), len(clips)),
            "patches": pa.repeat(pa.scalar(b"0", pa.large_binary()), len(clips)),
        }
        yield _table(DECODED, made, clips)


class Label:
    """In place of the model: DECODED rows to ANNOTATIONS rows."""

    def __init__(self, seconds_per_clip: float, *, device: str, batch_size: int) -> None:
        """How long a clip takes, on any device, in batches of any size."""
        self.seconds_per_clip = seconds_per_clip

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Label a batch."""
        time.sleep(self.seconds_per_clip * len(decoded))
        count = len(decoded)
        made = {
            "label": pa.repeat("label", count),
            "labels": pa.array([["a", "b", "c", "d", "e"]] * count, ANNOTATIONS.field("labels").type),
            "scores": pa.array([[0.2] * 5] * count, ANNOTATIONS.field("scores").type),
            "tokens_per_expert": pa.array([[63, 54, 45, 34]] * count, ANNOTATIONS.field("tokens_per_expert").type),
            "flops": pa.repeat(1, count),
            "true_label": decoded["label"],
            "model_id": pa.repeat("none", count),
        }
        return _table(ANNOTATIONS, made, decoded)


def _table(schema: pa.Schema, made: dict[str, pa.Array], given: pa.Table) -> pa.Table:
    """Columns that were made, else given, else null."""
    columns = [
        made[field.name]
        if field.name in made
        else given[field.name]
        if field.name in given.column_names
        else pa.nulls(len(given), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
