"""Baselines by name, in evaluate and train: the config that each stands for, at the capacities that it has."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

import jobs.annotate
import jobs.evaluate
import jobs.train
from mone.baselines import METHODS, with_method
from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.compute import clip_compute
from pipelines.archive import list_labelled
from pipelines.evaluate import ScoredClip, Scorer
from pipelines.manifest import plan_video
from pipelines.predict import Annotator
from pipelines.schema import MANIFEST
from pipelines.synthetic import MOTIONS
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from pipelines.view import WHOLE_CLIPS, TokenOptions
from tests.conftest import NUM_VIDEOS, TINY

ASKED = (0.2, 0.5, 1.0)
OWN = {"dense": [1.0], "uniform": [(1 / 8 + 1 / 4 + 1 / 2 + 1) / 4], "proportionate": [4 / 15]}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _on_one_cpu_without_ray(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))


@pytest.fixture
def loop(monkeypatch) -> None:
    """Score in a loop over the graph's own functions; that the graph says the same is tested with Ray elsewhere."""

    def score_videos(videos, plan, checkpoint, capacities, options, engine, placement):
        clips = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, plan)]
        decoded = tokenize_table(pa.Table.from_pylist(clips, schema=MANIFEST), checkpoint.config, options)
        for row in Scorer(checkpoint, capacities, engine)(decoded).to_pylist():
            scores_KC = np.array(row["probabilities"], dtype=np.float32).reshape(len(capacities), -1)
            yield ScoredClip(
                row["video"], row["label"], row["error"], scores_KC, tuple(row["flops"]), row["dense_flops"]
            )

    monkeypatch.setattr(jobs.evaluate, "score_videos", score_videos)
    monkeypatch.setattr(jobs.evaluate, "connected", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(jobs.evaluate, "placed", lambda *_: None)


def evaluated(capsys, data: Path, model: Path, *options: object) -> dict:
    """Result of the job, whose last line it is."""
    arguments = ["--data", data, "--model", model, "--capacity", *ASKED, *options]
    assert jobs.evaluate.main(list(map(str, arguments))) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@every_method
def test_evaluate_runs_a_method_at_the_capacities_that_it_has(loop, capsys, archive, model_folder, method):
    result = evaluated(capsys, archive, model_folder, "--method", method)
    config = with_method(TINY, method)
    assert (result["method"], result["views"], result["drop_static"]) == (method, 1, None)
    assert [row["capacity"] for row in result["results"]] == pytest.approx(OWN.get(method, ASKED))
    assert result["videos"] == NUM_VIDEOS + 2 and len(result["failures"]) == 2
    for row in result["results"]:
        assert row["flops_per_clip"] == clip_compute(config, row["capacity"]).flops
        assert row["dense_flops_per_clip"] == clip_compute(config, 1.0).dense_flops
        assert 0 <= row["low"] <= row["top1"] <= row["high"] <= 1
    as_it_is = read_checkpoint(model_folder).model_id
    assert (result["model_id"] == as_it_is) == (method in ("mone", "dense"))


def test_evaluate_counts_views_and_kept_patches(loop, capsys, archive, model_folder):
    one, dense = clip_compute(TINY, 0.5), clip_compute(TINY, 1.0)
    views = evaluated(capsys, archive, model_folder, "--views", 3)
    assert (views["views"], views["results"][1]["flops_per_clip"]) == (3, 3 * one.flops)
    assert views["results"][1]["dense_flops_per_clip"] == 3 * dense.flops
    kept = evaluated(capsys, archive, model_folder, "--drop-static", 4)
    assert kept["drop_static"] == 4 and kept["results"][1]["flops_per_clip"] < one.flops
    assert kept["results"][2]["dense_flops_per_clip"] == dense.flops


@pytest.fixture(scope="module")
def decoded(archive) -> pa.Table:
    videos = list(list_labelled(str(archive)))
    clips = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, ClipPlan(span_s=1.0))]
    return tokenize_table(pa.Table.from_pylist(clips, schema=MANIFEST), TINY, WHOLE_CLIPS)


def scores(checkpoint: Checkpoint, method: str, capacity: float, decoded: pa.Table) -> np.ndarray:
    model = checkpoint.with_config(with_method(checkpoint.config, method))
    rows = Scorer(model, (capacity,))(decoded).to_pylist()
    return np.array([row["probabilities"] for row in rows if row["status"] == "ok"])


@pytest.fixture
def gainless(checkpoint, tmp_path) -> Checkpoint:
    """The model with alpha 0, so that router probabilities play no part where every token has the full width."""
    model = checkpoint.build()
    with torch.no_grad():
        model.encoder.alpha_L.zero_()
    return read_checkpoint(save_checkpoint(model, checkpoint.labels, tmp_path / "gainless"))


@pytest.mark.parametrize("method", ["dense", "random_router", "submodel", "token_drop", "tome"])
def test_at_full_capacity_methods_that_have_it_are_the_same_model(gainless, decoded, method):
    full = scores(gainless, "mone", 1.0, decoded)
    np.testing.assert_allclose(scores(gainless, method, 1.0, decoded), full, rtol=1e-3, atol=1e-5)


def test_dense_is_the_model_at_full_capacity(checkpoint, decoded):
    np.testing.assert_array_equal(scores(checkpoint, "dense", 1.0, decoded), scores(checkpoint, "mone", 1.0, decoded))


@pytest.mark.parametrize("allocation", ["uniform", "proportionate", "submodel", "token_drop", "tome"])
def test_dense_is_dense_whatever_the_model_was_trained_for(checkpoint, decoded, allocation):
    other = checkpoint.with_config(dataclasses.replace(TINY, allocation=allocation))
    np.testing.assert_array_equal(scores(other, "dense", 1.0, decoded), scores(checkpoint, "mone", 1.0, decoded))


def test_methods_differ_in_their_answers(checkpoint, decoded):
    found = {method: scores(checkpoint, method, OWN.get(method, [0.5])[0], decoded) for method in METHODS}
    for one in METHODS:
        assert all(np.abs(found[one] - found[other]).max() > 1e-3 for other in METHODS if other != one)


@pytest.fixture
def refused(capsys, archive, tmp_path):
    """Status 2, nothing on stdout, one line on stderr that names what is wrong, and nothing made."""

    def check(job, *options: object, names: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        arguments = [archive] if job is jobs.annotate else ["--data", archive]
        arguments += [] if job is jobs.evaluate else ["--output", tmp_path / "out"]
        assert job.main(list(map(str, [*arguments, *options]))) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        assert names in printed.err and sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("job", [jobs.evaluate, jobs.train], ids=["evaluate", "train"])
@pytest.mark.parametrize("method", ["nonsense", "", "MoNE"])
def test_an_unknown_method(refused, job, method):
    refused(job, "--method", method, names=f"unknown method {method!r}; there are mone, dense")


@pytest.mark.parametrize("job", [jobs.annotate, jobs.evaluate], ids=["annotate", "evaluate"])
@pytest.mark.parametrize(
    "options, names",
    [
        (["--drop-static", "-1"], "drop_static"),
        (["--views", "0"], "views"),
        (["--views", "3", "--drop-static", "2"], "drop_static"),
    ],
)
def test_options_of_tokens_out_of_range_or_combined(refused, model_folder, job, options, names):
    refused(job, "--model", model_folder, *options, names=names)


@pytest.mark.parametrize("method", ["tome", "token_drop"])
def test_static_patches_cannot_be_dropped_where_tokens_are_reduced(refused, checkpoint, model_folder, tmp_path, method):
    refused(jobs.evaluate, "--model", model_folder, "--method", method, "--drop-static", 2, names="--drop-static")
    config = with_method(TINY, method)
    save_checkpoint(checkpoint.with_config(config).build(), MOTIONS, tmp_path / "trained")
    for job in (jobs.annotate, jobs.evaluate):
        refused(job, "--model", tmp_path / "trained", "--drop-static", 2, names="--drop-static")


@every_method
def test_annotate_runs_a_model_at_the_capacity_that_it_has(checkpoint, decoded, tmp_path, method):
    config = with_method(TINY, method)
    model = save_checkpoint(checkpoint.with_config(config).build(), MOTIONS, tmp_path / "model")
    arguments = jobs.annotate.Annotate(archive="a", output="o", model=str(model), capacity=0.5)
    loaded, settings = jobs.annotate.check(arguments)
    expected = OWN.get(method, [0.5])[0] if method != "dense" else 0.5  # training alone makes a model dense
    assert settings.capacity == pytest.approx(expected) and settings.tokens == TokenOptions()
    row = Annotator(loaded, settings.capacity, 1)(decoded.slice(0, 1)).to_pylist()[0]
    assert row["capacity"] == pytest.approx(expected, rel=1e-6)
    assert row["flops"] == clip_compute(config, settings.capacity).flops
