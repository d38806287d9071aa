"""Bad input to every job: status 2, one line on stderr that names it, nothing on stdout, nothing created, no Ray."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import jobs.annotate
import jobs.audit
import jobs.benchmark
import jobs.doctor
import jobs.evaluate
import jobs.plan
import jobs.render
import jobs.report
import jobs.sweep
import jobs.train
import pipelines.patience
from tests.conftest import write_labels

JOBS = {
    "annotate": jobs.annotate.main,
    "audit": jobs.audit.main,
    "benchmark": jobs.benchmark.main,
    "doctor": jobs.doctor.main,
    "evaluate": jobs.evaluate.main,
    "plan": jobs.plan.main,
    "render": jobs.render.main,
    "report": jobs.report.main,
    "sweep": jobs.sweep.main,
    "train": jobs.train.main,
}


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("Ray was started before the input was checked")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(autouse=True)
def _no_s3(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(pipelines.patience, "_FIRST_WAIT_S", 0.0)


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., None]:
    """Run a job in an empty folder and check that it ends as a job has to that was given bad input."""

    def check(job: str, *arguments: object, names: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status = JOBS[job](list(map(str, arguments)))
        printed = capsys.readouterr()
        assert status == 2, printed
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith(f"python -m jobs.{job}: ")
        assert names in lines[0], lines[0]
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def options_of(job: str, archive: Path, model: Path, out: Path) -> list[object]:
    """A command line that only lacks what is wrong."""
    return {
        "annotate": [archive, "--output", out, "--model", model],
        "plan": [archive, "--output", out, "--model", model],
        "evaluate": ["--data", archive, "--model", model],
        "train": ["--data", archive, "--output", out],
        "sweep": ["--data", archive, "--output", out],
        "doctor": ["--archive", archive, "--model", model, "--output", out],
        "render": ["--output", out],
        "report": [out],
        "audit": [out],
        "benchmark": ["model", "--model", model],
    }[job]


WITH_ARCHIVE, WITH_DATA = ["annotate", "doctor", "plan"], ["evaluate", "train", "sweep"]
WITH_CAPACITY = ["annotate", "plan", "evaluate"]
WITH_MODEL, WITH_OUTPUT = [*WITH_CAPACITY, "doctor"], ["annotate", "doctor", "plan", "train", "sweep", "render"]


@pytest.mark.parametrize("job", WITH_ARCHIVE + WITH_DATA)
@pytest.mark.parametrize("name", ["nothing-there", "nothing-there.csv", "nothing/*.mp4", "s3://bucket/videos"])
def test_an_archive_that_is_not_there(refused, tmp_path, model_folder, out, job, name):
    place = name if "://" in name else tmp_path / name
    named = "s3://" if "://" in name else "nothing"
    refused(job, *options_of(job, place, model_folder, out), names=named)


@pytest.mark.parametrize("job", WITH_ARCHIVE + WITH_DATA)
def test_an_empty_folder(refused, tmp_path, model_folder, out, job):
    (tmp_path / "empty-folder").mkdir()
    refused(job, *options_of(job, tmp_path / "empty-folder", model_folder, out), names="empty-folder")


@pytest.mark.parametrize("job", WITH_ARCHIVE + WITH_DATA)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_without_the_column(refused, tmp_path, model_folder, out, job, suffix):
    table = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"path": ["a.mp4"]}), table)
    else:
        table.write_text("path\na.mp4\n" if suffix == ".csv" else '{"path": "a.mp4"}\n')
    refused(job, *options_of(job, table, model_folder, out), names="'video'")


@pytest.mark.parametrize("job", WITH_ARCHIVE + WITH_DATA)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_that_is_none(refused, tmp_path, model_folder, out, job, suffix):
    table = tmp_path / f"table{suffix}"
    table.write_bytes(b"\0\xff\xfe nothing of the kind")
    refused(job, *options_of(job, table, model_folder, out), names=table.name)


@pytest.mark.parametrize("job", WITH_DATA)
def test_data_without_labels(refused, tmp_path, model_folder, out, job):
    table = write_labels(tmp_path / "labels.csv", [("a.mp4", "left", "train"), ("unlabelled.mp4", "", "train")])
    refused(job, *options_of(job, table, model_folder, out), names="unlabelled.mp4")


@pytest.mark.parametrize("job", WITH_MODEL)
def test_a_model_that_is_not_there(refused, archive, tmp_path, out, job):
    refused(job, *options_of(job, archive, tmp_path / "no-model", out), names="no-model")


@pytest.mark.parametrize("job", WITH_MODEL)
@pytest.mark.parametrize("file", ["config.json", "labels.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_model(refused, archive, model_folder, tmp_path, out, job, file, damage):
    shutil.copytree(model_folder, tmp_path / "broken")
    content = (tmp_path / "broken" / file).read_bytes()
    (tmp_path / "broken" / file).unlink()
    if damage != "missing":
        (tmp_path / "broken" / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    refused(job, *options_of(job, archive, tmp_path / "broken", out), names="broken")


@pytest.mark.parametrize("job", WITH_CAPACITY)
@pytest.mark.parametrize("capacity", ["7", "0", "-0.4", "nan", "inf", "much", ""])
def test_a_capacity_out_of_range(refused, archive, model_folder, out, job, capacity):
    refused(job, *options_of(job, archive, model_folder, out), f"--capacity={capacity}", names="capacity")


def test_one_of_several_capacities_out_of_range(refused, archive, model_folder, out):
    options = options_of("evaluate", archive, model_folder, out)
    refused("evaluate", *options, "--capacity", "0.2", "7", names="7")
    refused("evaluate", *options, "--capacity", names="capacity")


@pytest.mark.parametrize("job", JOBS)
def test_an_unknown_option(refused, archive, model_folder, out, job):
    refused(job, *options_of(job, archive, model_folder, out), "--no-such-option", "1", names="--no-such-option")


@pytest.mark.parametrize(
    "job, named",
    [
        ("annotate", "ARCHIVE"),
        ("plan", "ARCHIVE"),
        ("evaluate", "--data"),
        ("train", "--data"),
        ("sweep", "--data"),
        ("render", "--output"),
        ("report", "DIR"),
        ("audit", "DIR"),
        ("benchmark", ", ".join(jobs.benchmark.BENCHMARKS)),
    ],
)
def test_nothing_at_all(refused, job, named):
    refused(job, names=named)


@pytest.mark.parametrize("job", [job for job in WITH_OUTPUT if job != "doctor"])
def test_a_missing_output(refused, archive, model_folder, out, job):
    options = options_of(job, archive, model_folder, out)
    place = options.index("--output")
    refused(job, *options[:place], *options[place + 2 :], names="--output")


@pytest.mark.parametrize("job", WITH_OUTPUT)
@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_an_output_that_is_a_file_or_below_one(refused, archive, model_folder, tmp_path, job, below):
    (tmp_path / "a-file").write_text("kept")
    refused(job, *options_of(job, archive, model_folder, tmp_path / "a-file" / below), names="a-file")
    assert (tmp_path / "a-file").read_text() == "kept"


@pytest.mark.parametrize("job", WITH_OUTPUT)
def test_an_output_that_is_no_folder(refused, monkeypatch, archive, model_folder, tmp_path, job):
    monkeypatch.chdir(tmp_path)
    options = options_of(job, archive, model_folder, Path("out"))
    refused(job, *("s3://bucket/out" if option == Path("out") else option for option in options), names="s3://bucket")


BAD_TOKENS = ["--drop-static=-1", "--drop-static=256", "--drop-static=nan", "--views=0", "--views=1.5"]
BAD_NUMBERS = {
    "annotate": [
        *("--span=-1", "--span=nan", "--span=inf", "--stride=-0.5", "--stride=nan", "--clips-per-video=-1"),
        *(
            "--clips-per-video=2.5",
            "--batch-size=-1",
            "--num-model-workers=-1",
            "--num-model-workers=2:1",
            "--top-k=0",
            "--top-k=-3",
        ),
        *("--max-failed-share=-0.1", "--max-failed-share=1.5", "--max-failed-share=nan", "--price-per-hour=-1"),
        *("--gpus-per-worker=0", "--gpus-per-worker=1.5", "--device=tpu"),
        *BAD_TOKENS,
    ],
    "doctor": ["--limit-s=0", "--limit-s=nan", "--limit-s=long"],
    "plan": ["--span=-1", "--stride=-1", "--clips-per-video=-1", "--span=long"],
    "evaluate": ["--span=-1", "--stride=-1", "--clips-per-video=-1", *BAD_TOKENS],
    "train": ["--num-clips=-1", "--epochs=-1", "--epochs=many"],
    "sweep": [
        "--num-clips=-1",
        "--epochs=-1",
        "--clips-per-video=0",
        "--drop-static=-1",
        "--gpus-per-run=-1",
        "--seeds=a",
    ],
    "render": ["--clips=0", "--size=-64", "--size=65", "--size=30", "--frames=1", "--frames=-1"],
}


def word_of(option: str) -> str:
    """What the line has to name; clip numbers are named in words."""
    return option.removeprefix("--").split("=")[0].split("-")[0]


@pytest.mark.parametrize("job, option", [(job, option) for job, options in BAD_NUMBERS.items() for option in options])
def test_a_number_out_of_range(refused, archive, model_folder, out, job, option):
    refused(job, *options_of(job, archive, model_folder, out), option, names=word_of(option))


def test_render_names_its_option(refused, out):
    refused("render", "--output", out, "--clips=-1", names="--clips")


@pytest.mark.parametrize("option", ["--clips-per-video=-1", "--device=abacus"])
def test_train_checks_all_its_options_first(refused, archive, model_folder, out, option):
    refused("train", *options_of("train", archive, model_folder, out), option, names=word_of(option))


@pytest.mark.parametrize("job", ["annotate", "plan", "evaluate"])
def test_a_stride_and_a_number_of_clips_exclude_each_other(refused, archive, model_folder, out, job):
    options = options_of(job, archive, model_folder, out)
    refused(job, *options, "--stride", "1", "--clips-per-video", "2", names="stride")


def test_an_unknown_recipe(refused, archive, out):
    for job in ("train", "sweep"):
        refused(job, "--data", archive, "--output", out, "--recipe", "pancakes", names="pancakes")


def test_an_unknown_split(refused, archive, model_folder, out):
    refused("evaluate", *options_of("evaluate", archive, model_folder, out), "--split", "holdout", names="holdout")
    refused("render", "--output", out, "--split", "holdout", names="holdout")


def test_training_data_without_a_training_split(refused, tmp_path, out):
    table = write_labels(tmp_path / "labels.csv", [("a.mp4", "left", "test")])
    for job in ("train", "sweep"):
        refused(job, "--data", table, "--output", out, names="labels.csv")


def test_a_label_that_the_model_does_not_know(refused, tmp_path, model_folder, out):
    table = write_labels(tmp_path / "labels.csv", [("a.mp4", "left", ""), ("b.mp4", "somersault", "")])
    refused("evaluate", *options_of("evaluate", table, model_folder, out), names="somersault")


@pytest.mark.parametrize("job", ["report", "audit"])
def test_a_folder_that_is_not_there_or_not_a_run(refused, tmp_path, job):
    refused(job, tmp_path / "no-run", names="no-run")
    (tmp_path / "other-folder").mkdir()
    refused(job, tmp_path / "other-folder", names="other-folder")
    (tmp_path / "a-file").touch()
    refused(job, tmp_path / "a-file", names="a-file")


def test_a_report_of_rows_that_are_not_there(refused, tmp_path):
    record = {"labels": [], "config": {}, "identity": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    refused("report", tmp_path, names="annotations")
    refused("report", tmp_path, "--clips=-1", names="--clips")


@pytest.mark.parametrize("text", ["", "{", "no json"])
def test_a_record_that_is_no_json(refused, tmp_path, archive, model_folder, text):
    (tmp_path / "run.json").write_text(text)
    refused("report", tmp_path, names="run.json")
    refused("annotate", archive, "--output", tmp_path, "--model", model_folder, names="run.json")


@pytest.mark.parametrize("record", [{"another": "program's"}, [1], {"identity": 3}])
def test_a_record_that_is_not_ours(refused, tmp_path, archive, model_folder, record):
    (tmp_path / "run.json").write_text(json.dumps(record))
    refused("report", tmp_path, names="run.json")
    refused("annotate", archive, "--output", tmp_path, "--model", model_folder, names="run.json")


def test_a_plan_that_is_there_already(refused, archive, model_folder, out):
    (out / "manifest").mkdir(parents=True)
    refused("plan", *options_of("plan", archive, model_folder, out), names="manifest")


@pytest.mark.parametrize("job", WITH_MODEL)
def test_a_cluster_that_does_not_answer(monkeypatch, capsys, archive, model_folder, out, job):
    """The input is good here: Ray is asked, and refuses."""

    def unreachable(address, **options):
        raise ConnectionError(f"Could not connect to {address}")

    monkeypatch.setattr(ray, "init", unreachable)
    arguments = [*options_of(job, archive.parent if job != "evaluate" else archive, model_folder, out)]
    assert JOBS[job]([*map(str, arguments), "--address", "10.0.0.9:6379"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "10.0.0.9:6379" in printed.err
