"""Planning from the command line, in the session's Ray."""

import contextlib

import pyarrow.parquet as pq
import pytest

import jobs.plan
from pipelines.planning import MANIFEST_DIR
from tests.conftest import NUM_CLIPS, NUM_VIDEOS

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _in_the_sessions_ray(shared_ray, monkeypatch):
    monkeypatch.setattr(jobs.plan, "connected", lambda address: contextlib.nullcontext())


def plan(archive, out, model, *options: str) -> int:
    return jobs.plan.main([str(archive), "--output", str(out), "--model", str(model), *options])


@pytest.mark.parametrize(
    "options, num_clips",
    [
        ([], NUM_CLIPS),
        (["--span", "0.5"], 4 * NUM_VIDEOS + 2),
        (["--stride", "0.5"], 3 * NUM_VIDEOS + 2),
        (["--clips-per-video", "5"], 5 * NUM_VIDEOS + 2),
    ],
    ids=str,
)
def test_a_plan_is_a_manifest_and_what_it_would_cost(tmp_path, archive, model_folder, capsys, options, num_clips):
    assert plan(archive, tmp_path / "out", model_folder, *options) == 0
    printed = capsys.readouterr().out
    assert f"videos   {NUM_VIDEOS + 2} (2 cannot be read)" in printed and f"clips    {num_clips}, " in printed
    table = pq.read_table(tmp_path / "out" / MANIFEST_DIR)
    assert len(table) == num_clips == len(set(table["clip_id"].to_pylist()))


def test_planning_again_is_refused_and_changes_nothing(tmp_path, archive, model_folder, capsys):
    assert plan(archive, tmp_path / "out", model_folder) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")}
    capsys.readouterr()
    assert plan(archive, tmp_path / "out", model_folder, "--span", "0.5") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and MANIFEST_DIR in printed.err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")} == before


@pytest.mark.parametrize("options", [["--span", "0.5"], ["another archive"]], ids=str)
def test_annotating_does_not_take_over_a_plan_of_something_else(
    tmp_path, archive, model_folder, capsys, monkeypatch, options
):
    import jobs.annotate

    monkeypatch.setattr(jobs.annotate, "connected", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(jobs.annotate, "write_annotations", lambda *args: pytest.fail("the plan was taken over"))
    assert plan(archive, tmp_path / "out", model_folder) == 0
    place = archive.parent if options == ["another archive"] else archive
    options = [] if options == ["another archive"] else options
    arguments = [str(place), "--output", str(tmp_path / "out"), "--model", str(model_folder), *options]
    assert jobs.annotate.main(arguments) == 2
