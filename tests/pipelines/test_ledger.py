"""The audit against sets, the totals against sums by hand."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.clip_ids
from pipelines.ledger import audit, totals
from pipelines.row_files import LedgerError, parquet_files
from pipelines.schema import ANNOTATIONS, MANIFEST

oracle = settings(max_examples=30, deadline=None, derandomize=True)


def write(folder: Path, schema: pa.Schema, *files: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for number, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"part {number}+.parquet")
    return folder


def ids(text: str) -> list[dict]:
    return [{"clip_id": letter} for letter in text]


def audit_of(tmp_path: Path, planned: list[str], annotated: list[str]):
    return audit(
        write(tmp_path / "manifest", MANIFEST, *map(ids, planned)),
        write(tmp_path / "annotations", ANNOTATIONS, *map(ids, annotated)),
    )


@pytest.mark.parametrize(
    "planned, annotated, missing, doubled, unknown",
    [
        (["abc"], ["cab"], "", "", ""),
        (["ab", "c"], ["c", "a", "b"], "", "", ""),
        (["abc"], ["b"], "ac", "", ""),
        (["abc"], [], "abc", "", ""),
        (["abc"], ["abc", "b"], "", "b", ""),
        (["abc"], ["abcc"], "", "c", ""),
        (["aab"], ["ab"], "", "a", ""),
        (["ab"], ["abz"], "", "", "z"),
        (["abc"], ["bb", "xy"], "ac", "b", "xy"),
        ([""], [], "", "", ""),
    ],
)
def test_the_audit_names_every_clip_that_is_not_there_exactly_once(
    tmp_path, planned, annotated, missing, doubled, unknown
):
    found = audit_of(tmp_path, planned, annotated)
    assert (found.missing, found.doubled, found.unknown) == (list(missing), list(doubled), list(unknown))
    assert found.planned == sum(map(len, planned)) and found.annotated == sum(map(len, annotated))
    assert found.clean == (not missing + doubled + unknown)


@pytest.mark.parametrize("ids_per_part", [1, 7, 1000])
def test_the_audit_in_parts_is_that_of_the_whole(tmp_path, monkeypatch, ids_per_part):
    monkeypatch.setattr(pipelines.clip_ids, "_IDS_PER_PART", ids_per_part)
    ids = [f"{number * 7919 % 4096:03x}{number}" for number in range(300)]
    planned, annotated = ids[:250] + ids[:3], ids[50:300] + ids[60:62]
    manifest = write(tmp_path / "manifest", MANIFEST, [{"clip_id": id_} for id_ in planned])
    found = audit(manifest, write(tmp_path / "annotations", ANNOTATIONS, [{"clip_id": id_} for id_ in annotated]))
    assert (found.planned, found.annotated) == (253, 252)
    assert found.missing == sorted(ids[:50]) and found.unknown == sorted(ids[250:])
    assert found.doubled == sorted(ids[:3] + ids[60:62])


@oracle
@given(st.text("abcdef", min_size=1, max_size=8), st.text("abcdefg", max_size=10))
def test_clean_means_the_same_ids_each_once(tmp_path_factory, planned, annotated):
    found = audit_of(tmp_path_factory.mktemp("run"), [planned], [annotated])
    assert found.clean == (sorted(planned) == sorted(annotated) and len(set(planned)) == len(planned))


def test_without_annotations_everything_is_missing(tmp_path):
    found = audit(write(tmp_path / "manifest", MANIFEST, ids("ab")), tmp_path / "annotations")
    assert (found.missing, found.annotated, found.clean) == (["a", "b"], 0, False)


def test_without_a_manifest_there_is_nothing_to_audit(tmp_path):
    with pytest.raises(LedgerError, match="manifest"):
        audit(tmp_path / "manifest", write(tmp_path / "annotations", ANNOTATIONS, ids("ab")))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"this is no parquet file" * 10])
def test_an_unreadable_file_is_named(tmp_path, content):
    manifest = write(tmp_path / "manifest", MANIFEST, ids("ab"))
    annotations = write(tmp_path / "annotations", ANNOTATIONS, [row("ok", label="run")])
    bad = annotations / "part 9.parquet"
    bad.write_bytes(content)
    for read in (lambda: audit(manifest, annotations), lambda: totals(annotations, frozenset())):
        with pytest.raises(LedgerError) as caught:
            read()
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [{"other": ["a"]}, {"clip_id": [["a"]]}], ids=["missing", "of lists"])
def test_a_file_without_the_right_columns_is_named(tmp_path, columns):
    manifest = write(tmp_path / "manifest", MANIFEST, ids("ab"))
    annotations = write(tmp_path / "annotations", ANNOTATIONS, ids("ab"))
    pq.write_table(pa.table(columns), annotations / "foreign.parquet")
    with pytest.raises(LedgerError, match=r"foreign\.parquet"):
        audit(manifest, annotations)


def test_files_are_sorted_and_others_ignored(tmp_path):
    for name in ("b.parquet", "a.parquet", "c.parquet.partial", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in parquet_files(tmp_path)] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_without_files_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LedgerError, match=folder):
        parquet_files(tmp_path / folder)


def row(status: str, **values) -> dict:
    nothing = dict.fromkeys(("start_s", "end_s", "decode_ms", "model_ms"), 0.0) | {"flops": 0, "dense_flops": 0}
    return {"clip_id": "x", "status": status, "error": "", "decoder": "", "true_label": ""} | nothing | values


def test_totals_are_sums(tmp_path):
    ok = {"decoder": "decord", "flops": 10, "dense_flops": 40, "decode_ms": 500.0, "model_ms": 250.0}
    first = [
        row("ok", start_s=0.0, end_s=1800.0, label="run", true_label="run", **ok),
        row("ok", start_s=1800.0, end_s=3600.0, label="run", true_label="walk", **ok),
        row("missing", error="no such file"),
    ]
    second = [
        row("ok", start_s=10.0, end_s=1810.0, label="walk", true_label="swim", **(ok | {"decoder": "pyav"})),
        row("ok", start_s=0.0, end_s=900.0, label="walk", true_label="", **ok),
        row("model_error", error="nan", start_s=0.0, end_s=7200.0, decode_ms=1000.0),
        row("missing", error="no such file"),
        row("decode_error", error="cut", decode_ms=500.0),
    ]
    found = totals(write(tmp_path / "annotations", ANNOTATIONS, first, second), frozenset({"run", "walk"}))
    assert (found.clips, found.failed) == (8, 4)
    assert found.hours == pytest.approx(1.75)  # 3 of half an hour and one of a quarter; failures do not count
    assert (found.flops, found.dense_flops, found.saved_share) == (40, 160, 0.75)
    assert found.decode_s == pytest.approx(3.5) and found.model_s == pytest.approx(1.0)
    assert found.statuses == Counter(ok=4, missing=2, model_error=1, decode_error=1)
    assert found.labels == Counter(run=2, walk=2)
    assert found.decoders == Counter(decord=3, pyav=1)
    assert found.failures == Counter(
        {("missing", "no such file"): 2, ("model_error", "nan"): 1, ("decode_error", "cut"): 1}
    )
    assert (found.labelled, found.right) == (2, 1)  # "swim" is not a class of the model, "" is no label


def test_what_was_saved_is_what_was_dropped_and_what_was_routed(tmp_path):
    files = [[row("ok", label="run", flops=10, kept_flops=60, dense_flops=100)], [row("missing", kept_flops=None)]]
    files.append([row("ok", label="run", flops=30, kept_flops=100, dense_flops=100)])
    found = totals(write(tmp_path / "annotations", ANNOTATIONS, *files), frozenset())
    assert (found.flops, found.kept_flops, found.dense_flops) == (40, 160, 200)
    assert (found.saved_share, found.dropped_share) == pytest.approx((0.8, 0.2))
    assert found.routed_share == pytest.approx(0.6)


def test_totals_of_failures_alone(tmp_path):
    annotations = write(tmp_path / "annotations", ANNOTATIONS, [row("missing", error="gone")])
    found = totals(annotations, frozenset())
    assert (found.clips, found.failed, found.hours, found.flops, found.saved_share) == (1, 1, 0, 0, 0)
    assert (found.dropped_share, found.routed_share) == (0, 0)


def test_a_null_counts_as_nothing(tmp_path):
    rows = [row("missing", flops=None, decode_ms=None), row("ok", label="run", flops=7, decode_ms=2000.0)]
    found = totals(write(tmp_path / "annotations", ANNOTATIONS, rows), frozenset())
    assert (found.flops, found.decode_s) == (7, 2.0)


def test_totals_can_be_written_as_json(tmp_path):
    found = totals(write(tmp_path / "annotations", ANNOTATIONS, [row("ok", label="run")]), frozenset())
    json.dumps([found.clips, found.hours, found.flops, found.dense_flops, found.decode_s, found.model_s, found.failed])


def test_times_of_many_clips_add_up(tmp_path):
    files = [[row("ok", label="run", decode_ms=1e9)], *[[row("ok", label="run", decode_ms=10.0)]] * 100]
    found = totals(write(tmp_path / "annotations", ANNOTATIONS, *files), frozenset())
    assert found.decode_s == pytest.approx(1_000_001, abs=1e-3)
