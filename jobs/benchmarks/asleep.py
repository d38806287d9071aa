"""Stages that sleep where they would decode or compute, with the rows of the real ones.

Their workers import this module, and so nothing that takes seconds of each of them.
"""

import time

import pyarrow as pa

from pipelines.schema import ANNOTATIONS, DECODED, MANIFEST


def decode(manifest: pa.Table, seconds_per_clip: float) -> pa.Table:
    """MANIFEST rows to DECODED rows with next to no pixels, in the time that decoding would take."""
    time.sleep(seconds_per_clip * len(manifest))
    made = {
        "decoder": pa.repeat("none", len(manifest)),
        "decode_ms": pa.repeat(pa.scalar(seconds_per_clip * 1e3, pa.float32()), len(manifest)),
        "patches": pa.repeat(pa.scalar(b"0", pa.large_binary()), len(manifest)),
    }
    columns = [
        made.get(field.name, pa.nulls(len(manifest), field.type))
        if field.name not in MANIFEST.names
        # without what Ray may have left of a longer table
        else manifest[field.name]
        for field in DECODED
    ]
    return pa.table(columns, schema=DECODED)


class Label:
    """In place of the model: DECODED rows to ANNOTATIONS rows."""

    def __init__(self, seconds_per_clip: float) -> None:
        """How long a clip takes."""
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
        columns = [
            made[field.name]
            if field.name in made
            else decoded[field.name]
            if field.name in decoded.column_names
            else pa.nulls(count, field.type)
            for field in ANNOTATIONS
        ]
        return pa.table(columns, schema=ANNOTATIONS)
