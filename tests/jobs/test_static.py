"""Annotating with static patches dropped, through Ray, from the command line to the page: every saving is told."""

import base64
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jobs.annotate
import jobs.report
from mone.compute import clip_compute
from mone.static import kept_patches
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR
from pipelines.schema import MANIFEST
from pipelines.tokenize import tokenize_table, tokens_of
from tests.conftest import NUM_CLIPS, NUM_VIDEOS, TINY, complaints

THRESHOLD = 4.0

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


def annotate(monkeypatch, archive: Path, model: Path, output: Path, *options: object) -> int:
    """The job, in the session's Ray."""
    monkeypatch.setattr(jobs.annotate, "connected", lambda address: contextlib.nullcontext())
    return jobs.annotate.main(list(map(str, [archive, "--output", output, "--model", model, *options])))


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """Lines that the run of `folder` printed."""
    return []


@pytest.fixture(scope="module")
def folder(ray_session, archive, model_folder, tmp_path_factory, printed) -> Path:
    output = tmp_path_factory.mktemp("static") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert annotate(monkeypatch, archive, model_folder, output, "--drop-static", THRESHOLD) == 0
    printed.extend(stdout.getvalue().splitlines())
    return output


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    return pa.concat_tables(pq.read_table(path) for path in (folder / ANNOTATIONS_DIR).glob("*.parquet")).to_pylist()


@pytest.fixture(scope="module")
def num_kept(folder) -> dict[str, int]:
    """Patches that each clip keeps, by hand from whole clips."""
    manifest = pa.concat_tables(
        pq.read_table(path, schema=MANIFEST) for path in (folder / MANIFEST_DIR).glob("*.parquet")
    )
    (tokens,) = tokens_of(tokenize_table(manifest, TINY), TINY)
    ids = manifest["clip_id"].to_pylist()
    return {
        ids[row]: len(kept_patches(patches_VFNP[0], THRESHOLD))
        for row, patches_VFNP in zip(tokens.rows, tokens.patches, strict=True)
    }


def test_every_clip_has_its_row(folder):
    found = audit(folder / MANIFEST_DIR, folder / ANNOTATIONS_DIR)
    assert found.clean and found.annotated == NUM_CLIPS


def test_rows_have_the_compute_of_what_each_clip_kept(rows, num_kept):
    assert len(set(num_kept.values())) > 1
    for row in rows:
        if row["status"] != "ok":
            assert row["flops"] == row["kept_flops"] == row["dense_flops"] == 0
            continue
        compute = clip_compute(TINY, 0.4, num_kept[row["clip_id"]])
        assert (row["flops"], row["kept_flops"], row["dense_flops"]) == (
            compute.flops,
            compute.kept_flops,
            compute.dense_flops,
        )
        assert 0 < row["flops"] <= row["kept_flops"] <= row["dense_flops"]
        assert sum(row["tokens_per_expert"]) == num_kept[row["clip_id"]]
    assert sum(row["status"] == "ok" for row in rows) == 2 * NUM_VIDEOS


def test_the_record_and_the_summary_tell_both_savings(folder, rows, printed):
    totals = json.loads((folder / "run.json").read_text())["totals"]
    flops, kept, dense = (sum(row[name] for row in rows) for name in ("flops", "kept_flops", "dense_flops"))
    assert (totals["flops"], totals["kept_flops"], totals["dense_flops"]) == (flops, kept, dense)
    assert totals["dropped_share"] == pytest.approx(1 - kept / dense, abs=1e-6) and totals["dropped_share"] > 0
    assert totals["routed_share"] == pytest.approx((kept - flops) / dense, abs=1e-6) and totals["routed_share"] > 0
    assert totals["saved_share"] == pytest.approx(totals["dropped_share"] + totals["routed_share"], abs=2e-6)
    said = f"{1 - kept / dense:.1%} by static patches, {(kept - flops) / dense:.1%} by routing"
    assert any(line.strip() == said for line in printed)


def test_the_page_tells_both_savings_and_dims_what_was_dropped(folder, rows):
    assert jobs.report.main([str(folder), "--clips", "100"]) == 0
    page = (folder / "report.html").read_text()
    totals = json.loads((folder / "run.json").read_text())["totals"]
    for name, of in (("dropped_share", "by dropping static patches"), ("routed_share", "by routing")):
        assert f"saved {of}</th><td>{100 * totals[name]:.1f} %</td>" in page
    assert "dropped: it did not change" in page and "of the patches that were kept" in page

    sections = page.split('<section class="clip">')[1:]
    assert len(sections) == 2 * NUM_VIDEOS
    drawn = [
        [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(float) for data in pictures]
        for pictures in (re.findall(r'src="data:image/jpeg;base64,([^"]+)"', section) for section in sections)
    ]
    # Four moments plain, then the same with experts. In the first frame nothing is dropped, so every patch has a
    # colour; of later ones those that are dimmed are darker in all channels.
    dimmed_later = 0
    for pictures in drawn:
        shares = [dimmed_share(plain, tinted) for plain, tinted in zip(pictures[:4], pictures[4:], strict=True)]
        assert shares[0] < 0.05
        dimmed_later += max(shares[1:]) > 0.2
    assert dimmed_later > len(drawn) / 2


def dimmed_share(plain: np.ndarray, tinted: np.ndarray) -> float:
    """Share of patches that are 0.55 of what they were, as far as a JPEG keeps it."""
    side = plain.shape[0] // TINY.grid[0]
    patches = [image.reshape(TINY.grid[0], side, TINY.grid[1], side, 3).mean(axis=(1, 3)) for image in (plain, tinted)]
    return float((np.abs(patches[1] - 0.55 * patches[0]) < 4).all(-1).mean())


@pytest.mark.parametrize("options", [["--drop-static", 5], [], ["--views", 3]], ids=str)
def test_other_tokens_need_another_folder(folder, archive, model_folder, monkeypatch, capsys, options):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert annotate(monkeypatch, archive, model_folder, folder, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "tokens" in printed.err and str(folder) in printed.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("part", [MANIFEST_DIR, ANNOTATIONS_DIR])
def test_a_run_whose_files_were_damaged_is_not_continued(
    folder, archive, model_folder, tmp_path, monkeypatch, capsys, part
):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / part / "broken.parquet").write_bytes(b"PAR1")
    assert annotate(monkeypatch, archive, model_folder, copy, "--drop-static", THRESHOLD) == 2
    said = complaints(capsys.readouterr().err, "annotate")
    assert len(said) == 1 and f"{part}/broken.parquet" in said[0]
