"""The decoding stage: manifest rows to uint8 patches, row for row."""

import dataclasses
import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mone.config import ModelConfig
from pipelines import nvdec
from pipelines.failure import DecodeFailure
from pipelines.limits import DEFAULT_LIMITS, DecoderChoice, Limits
from pipelines.manifest import decode_videos
from pipelines.patches import Patches, decode_patches, view_of
from pipelines.schema import DECODED, PlannedClip
from pipelines.view import WHOLE_CLIPS, TokenOptions

_ROWS = pa.schema([field for field in DECODED if field.name not in ("patches", "kept")])


def tokenize_table(
    manifest: pa.Table,
    config: ModelConfig,
    options: TokenOptions = WHOLE_CLIPS,
    limits: Limits = DEFAULT_LIMITS,
    decoder: DecoderChoice = "cpu",
) -> pa.Table:
    """Decode and cut planned clips: MANIFEST rows to DECODED rows, one for one, in order.

    Neighbouring rows of one video share one pass over it. Nothing raises: a clip that cannot be decoded is a row with
    its status and no patches.

    Args:
        manifest: Rows of the manifest.
        config: The model whose patches are wanted.
        options: Views, and whether static patches are dropped.
        limits: Of each video.
        decoder: Whether a GPU decodes, too.
    """
    return _table(list(_decoded(manifest, config, options, limits, decoder)))


def tokenize_tables(
    manifest: pa.Table,
    config: ModelConfig,
    options: TokenOptions = WHOLE_CLIPS,
    limits: Limits = DEFAULT_LIMITS,
    decoder: DecoderChoice = "cpu",
    *,
    rows_each: int,
) -> Iterator[pa.Table]:
    """As `tokenize_table`, in tables of so many rows; the last one has what is left.

    Clips of a video share a pass over it wherever a table ends, and decoding goes on while a table is used.
    """
    decoded = _decoded(manifest, config, options, limits, decoder, at_once=rows_each)
    for _ in range(0, len(manifest), rows_each):
        yield _table(list(itertools.islice(decoded, rows_each)))  # nothing here holds it while the next clips come


def _decoded(
    manifest: pa.Table,
    config: ModelConfig,
    options: TokenOptions,
    limits: Limits,
    decoder: DecoderChoice,
    at_once: int = sys.maxsize,
) -> Iterator[tuple[dict, Patches | DecodeFailure]]:
    """A row without its patches, and these, for each row of the manifest."""
    clips = [PlannedClip(**row) for row in manifest.to_pylist()]
    decode = functools.partial(decode_patches, config, options, decoder)
    first = None if decoder == "cpu" else nvdec.PREPARATION
    view = view_of(config, options.views)
    for same_video, decoded in decode_videos(clips, view, limits, decode, first, at_once):
        decode_ms = decoded.decode_s * 1e3 / len(same_video)
        for clip, outcome in zip(same_video, decoded.outcomes, strict=True):
            yield _row(clip, outcome) | {"decode_ms": decode_ms}, outcome


def _table(decoded: list[tuple[dict, Patches | DecodeFailure]]) -> pa.Table:
    columns = pa.Table.from_pylist([row for row, _ in decoded], schema=_ROWS).columns
    found = [None if isinstance(outcome, DecodeFailure) else outcome for _, outcome in decoded]
    patches, kept = ([getattr(of, name, None) for of in found] for name in ("patches", "kept_K"))
    return pa.Table.from_arrays([*columns, _as_they_are(patches), _as_they_are(kept)], schema=DECODED)


def _row(clip: PlannedClip, outcome: Patches | DecodeFailure) -> dict:
    row = dataclasses.asdict(clip) | {"decoder": "", "repeated_share": None}
    if isinstance(outcome, DecodeFailure):
        return row | {"status": outcome.status.value, "error": str(outcome)}
    note = "; ".join(filter(None, (clip.note, outcome.note)))
    return row | {"decoder": outcome.decoder, "note": note, "repeated_share": outcome.repeated_share}


def _as_they_are(arrays: list[np.ndarray | None]) -> pa.ChunkedArray:
    """A column of bytes where they lie: megabytes a clip, of which Arrow would make a copy."""
    kind = pa.large_binary()
    chunks = [
        pa.nulls(1, kind)
        if array is None
        else pa.Array.from_buffers(
            kind, 1, [None, pa.py_buffer(np.array([0, array.nbytes], np.int64)), pa.py_buffer(array)]
        )
        for array in arrays
    ]
    return pa.chunked_array(chunks, kind)


class Tokens(NamedTuple):
    """Clips of one size, as a model takes them.

    Attributes:
        rows: Their rows in the table, ascending.
        clips: uint8 [V, F, N, P] of each, or [1, K, P] where static patches were dropped; where the table has them.
        kept_BK: int64 places of the kept patches; None where all are there.
    """

    rows: list[int]
    clips: list[np.ndarray]
    kept_BK: np.ndarray | None

    @property
    def patches(self) -> np.ndarray:
        """A copy of all clips, uint8 [B, V, F, N, P] or [B, 1, K, P]."""
        return np.stack(self.clips)

    def slice(self, start: int, stop: int) -> "Tokens":
        """Some neighbours."""
        kept_BK = None if self.kept_BK is None else self.kept_BK[start:stop]
        return Tokens(self.rows[start:stop], self.clips[start:stop], kept_BK)


def tokens_of(decoded: pa.Table, config: ModelConfig) -> list[Tokens]:
    """The clips of the rows that have patches, those of one size together."""
    rows_of_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    patches, kept = ([value.as_buffer() for value in decoded[name]] for name in ("patches", "kept"))
    for row, buffers in enumerate(zip(patches, kept, strict=True)):
        if buffers[0] is not None:
            rows_of_size[len(buffers[0]), 0 if buffers[1] is None else len(buffers[1])].append(row)
    groups = []
    for (_, kept_bytes), rows in sorted(rows_of_size.items()):
        shape = (kept_bytes // 4,) if kept_bytes else (config.num_indices, config.num_tokens)
        clips = [np.frombuffer(patches[row], dtype=np.uint8).reshape(-1, *shape, config.patch_values) for row in rows]
        places = [np.frombuffer(kept[row], dtype=np.int32).astype(np.int64) for row in rows] if kept_bytes else None
        groups.append(Tokens(rows, clips, None if places is None else np.stack(places)))
    return groups
