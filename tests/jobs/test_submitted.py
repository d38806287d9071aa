"""Places that a submitted job may name; what the environment looks like there is checked in test_submit."""

import json
from pathlib import Path

import pytest

import jobs.annotate
import jobs.audit
import jobs.evaluate
import jobs.train
from jobs.annotate import Annotate
from jobs.audit import AuditJob
from jobs.submitted import stray_place
from jobs.train_options import Train


@pytest.fixture(autouse=True)
def copy(monkeypatch, tmp_path) -> Path:
    """The copy that the job runs in, and the directory that it was made from."""
    monkeypatch.chdir(tmp_path)
    environment = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(environment))
    return tmp_path


@pytest.mark.parametrize("place", ["out", "./out", "../out", "runs/out"])
def test_a_relative_output_is_refused_in_one_line(capsys, place):
    assert jobs.annotate.main(["/videos", "--output", place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m jobs.annotate: --output {place} ") and "absolute" in line


def test_so_are_archives_folders_and_labels(capsys):
    assert jobs.annotate.main(["videos", "--output", "/out"]) == 2
    assert jobs.audit.main(["out"]) == 2
    assert jobs.train.main(["--data", "labels.csv", "--output", "/out"]) == 2
    said = [line.split(": ")[1].split(" is ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["ARCHIVE videos", "DIR out", "--data labels.csv"]


def test_an_absolute_path_into_the_copy_is_no_better(copy):
    assert stray_place(Annotate(archive="/videos", output=f"{copy}/out"))


@pytest.mark.parametrize("place", ["/shared/videos", "s3://bucket/videos", "https://host/a.mp4"])
def test_what_all_nodes_see_is_left_to_the_job(place):
    assert stray_place(Annotate(archive=place, output="/shared/out")) == ""


def test_generated_data_is_no_place():
    assert stray_place(Train(data="motions", output="/shared/out")) == ""


def test_a_model_may_come_with_the_copy(copy):
    options = Annotate(archive="/videos", output="/out", model="models/tiny")
    assert "--model models/tiny" in stray_place(options) and ".rayignore" in stray_place(options)
    (copy / "models/tiny").mkdir(parents=True)
    assert stray_place(options) == ""
    assert stray_place(Annotate(archive="/videos", output="/out")) == ""  # the bundled one


def test_without_a_copy_relative_is_relative_to_a_directory_of_the_head(monkeypatch, copy):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    assert stray_place(AuditJob(folder="out"))
    assert stray_place(AuditJob(folder=f"{copy}/out")) == ""


def test_a_job_that_was_not_submitted_may_name_what_it_wants(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert stray_place(Annotate(archive="videos", output="out")) == ""
