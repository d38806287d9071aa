"""Many runs to one table and one plot: grouping, spread, files that are the same whenever they are made, bad input."""

import dataclasses
import json
import random
import statistics
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import jobs.curves
from jobs.curve_record import CurveRecord, from_json, read_records, to_json, write_record
from jobs.curve_rows import markdown, rows_of
from mone.baselines import METHODS
from mone.curve import CurvePoint

CAPACITIES = (0.2, 0.4, 0.6, 1.0)
FILES = ["curves.json", "curves.md", "curves.png", "curves.svg"]


def some_point(method="mone", capacity=0.4, top1=0.5, **changes) -> CurvePoint:
    flops = {"flops_per_clip": 4e9 * (0.2 + 0.8 * capacity), "dense_flops_per_clip": 4_000_000_000}
    return CurvePoint(
        **{"method": method, "capacity": capacity, "top1": top1, "nll": 1 - top1, "num_clips": 200} | flops | changes
    )


def some_record(method="mone", seed=0, *, points=(), **changes) -> CurveRecord:
    points = points or [
        some_point(method, capacity, (100 + 40 * capacity + seed) / 200)
        for capacity in ([1.0] if method == "dense" else CAPACITIES)
    ]
    about = {"data": "motions", "fold": "split", "split": "val", "recipe": "motions", "capacity": None}
    return CurveRecord(
        **about
        | {"epochs": 40, "train_clips": 600}
        | {"method": method, "seed": seed, "train_flops": 2.5e18 + seed * 1e17, "points": tuple(points)}
        | changes
    )


@pytest.fixture
def runs(tmp_path):
    """Folders of eight methods and three seeds, and dense runs of other epochs."""
    folders = []
    for method in METHODS:
        for epochs in (40, 90) if method == "dense" else (40,):
            for seed in range(3):
                folder = tmp_path / "runs" / f"{method}_{epochs}_{seed}"
                folder.mkdir(parents=True)
                write_record(some_record(method, seed, epochs=epochs), folder)
                folders.append(str(folder))
    return folders


def curves(*arguments: object) -> int:
    return jobs.curves.main([*map(str, arguments)])


def cells_of(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = some_record(points=[some_point(), some_point("tome", drop_static=None), some_point(drop_static=4.5)])
    path = write_record(record, tmp_path)
    assert path == tmp_path / "curve.json" and path.read_bytes().endswith(b"}\n")
    assert read_records(path) == read_records(tmp_path) == [record]
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.json"]


def test_a_row_is_the_mean_and_the_spread_of_its_seeds():
    top1 = {0: 0.5, 2: 0.56, 1: 0.53}
    records = [some_record("mone", seed, points=[some_point(top1=value)]) for seed, value in top1.items()]
    (row,) = rows_of(records)
    assert row.seeds == (0, 1, 2) and row.folds == ("split",) and (row.num_runs, row.num_clips) == (3, 200)
    assert row.top1 == pytest.approx(0.53) and (row.top1_min, row.top1_max) == (0.5, 0.56)
    assert row.top1_std == pytest.approx(0.03) == statistics.stdev(top1.values())
    assert row.nll == pytest.approx(0.47)
    assert row.train_flops == pytest.approx(2.6e18)
    (cells,) = cells_of(markdown([row]))
    assert cells == {
        "method": "mone",
        "capacity": "0.4",
        "GFLOP/clip": "2.080",
        "share of dense": "52.0%",
        "top-1 %": "53.0",
        "min..max": "50.0..56.0",
        "std": "3.00",
        "above dense": "",
        "runs": "3",
        "epochs": "40",
        "training EFLOP": "2.6",
    }


def test_the_difference_to_dense_is_between_runs_of_one_fold_and_seed():
    dense = {("a", 0): 0.5, ("a", 1): 0.6, ("b", 0): 0.9}
    mone = {("a", 0): 0.52, ("a", 1): 0.61, ("b", 0): 0.93, ("b", 1): 0.2}  # the last has no dense run beside it
    short = dict.fromkeys(dense, 0.1)  # dense of fewer epochs is not what is compared with
    records = [
        dataclasses.replace(some_record(method, seed, points=[some_point(method, top1=top1)]), fold=fold, epochs=epochs)
        for method, epochs, runs in (("dense", 40, dense), ("mone", 40, mone), ("dense", 20, short))
        for (fold, seed), top1 in runs.items()
    ]
    own, shorter, other = rows_of(records)
    assert own.above_dense == 0 and other.above_dense == pytest.approx(0.02)
    assert other.above_dense_error == pytest.approx(statistics.stdev([0.02, 0.01, 0.03]) / 3**0.5)
    assert shorter.above_dense == pytest.approx(0.3 / 3 - 2.0 / 3)
    assert cells_of(markdown([other]))[0]["above dense"] == "+2.0 ± 0.6"


def test_one_seed_has_no_spread():
    (row,) = rows_of([some_record(points=[some_point()])])
    assert row.top1_std is None
    (cells,) = cells_of(markdown([row]))
    assert (cells["std"], cells["min..max"], cells["runs"]) == ("", "", "1")


def test_rows_differ_in_method_epochs_weights_threshold_split_and_data():
    on_mone = some_record("mone", points=[some_point(), some_point("tome"), some_point(drop_static=4)])
    records = [
        some_record("dense", epochs=90),
        some_record("dense"),
        some_record("tome", points=[some_point("tome")]),
        on_mone,
        some_record("dense", data="more"),
        some_record("dense", split="test"),
    ]
    rows = rows_of(records)
    assert [(row.series.data, row.series.split, row.series.name, row.series.epochs) for row in rows] == [
        ("more", "val", "dense", 40),
        ("motions", "test", "dense", 40),
        ("motions", "val", "dense", 90),
        ("motions", "val", "dense", 40),
        ("motions", "val", "mone", 40),
        ("motions", "val", "mone, static dropped at 4", 40),
        ("motions", "val", "tome", 40),
        ("motions", "val", "tome on mone's weights", 40),
    ]
    assert rows_of(records[::-1]) == rows
    assert markdown(rows).count("\n## ") + 1 == 3


def test_folds_of_different_size_are_one_row():
    top1 = {("a", 0): 0.5, ("a", 1): 0.6, ("b", 0): 0.7, ("b", 1): 0.8}
    sizes = {"a": 200, "b": 150}
    records = [
        some_record(seed=seed, fold=fold, train_clips=3 * sizes[fold], points=[some_point(top1=value, num_clips=clips)])
        for (fold, seed), value in top1.items()
        for clips in [sizes[fold]]
    ]
    (row,) = rows_of(records)
    assert (row.num_runs, row.num_clips) == (4, 350)
    assert (row.seeds, row.folds) == ((0, 1), ("a", "b"))
    assert row.top1 == pytest.approx(0.65) and row.top1_std == pytest.approx(statistics.stdev(top1.values()))
    assert (row.top1_min, row.top1_max) == (0.5, 0.8)
    assert cells_of(markdown([row]))[0]["runs"] == "4"
    assert row.to_json()["folds"] == ["a", "b"] and json.loads(json.dumps(row.to_json()))["num_runs"] == 4
    with pytest.raises(ValueError, match="seed 1 is there twice"):
        rows_of([*records, records[-1]])
    smaller = dataclasses.replace(records[0], seed=2, points=(some_point(num_clips=199),))
    with pytest.raises(ValueError, match="differ in num_clips, 200 and 199"):
        rows_of([*records, smaller])


def test_models_of_one_capacity_each_are_one_series_beside_the_model_of_all(tmp_path):
    own = [some_record(seed=seed, capacity=capacity) for seed in (0, 1) for capacity in (0.4, 0.2)]
    everything = [some_record(seed=seed) for seed in (0, 1)]
    rows = rows_of([*own, *everything])
    name = "mone, a model per capacity"
    assert [(row.series.name, row.capacity) for row in rows] == [
        *(("mone", capacity) for capacity in CAPACITIES),
        *((name, capacity) for capacity in (0.2, 0.4)),  # each at its own, wherever else it was measured
    ]
    assert all(row.num_runs == 2 for row in rows) and rows_of([*everything, *own[::-1]]) == rows
    for number, record in enumerate([*own, *everything]):
        (tmp_path / str(number)).mkdir()
        write_record(record, tmp_path / str(number))
    assert curves(*(tmp_path / str(number) for number in range(6)), "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "curves.svg").read_text()
    assert f"<!-- {name} -->" in text and "<!-- mone -->" in text and "of 2 runs -->" in text
    assert rows_of(read_records(tmp_path / "out" / "curves.json")) == rows


def test_longer_training_comes_first():
    rows = rows_of([some_record("dense", epochs=epochs) for epochs in (40, 5, 90)])
    assert [row.series.epochs for row in rows] == [90, 40, 5]


def test_the_same_runs_give_the_same_files(runs, tmp_path, capsys):
    assert curves(*runs, "--output", tmp_path / "first") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out == (tmp_path / "first" / "curves.md").read_text()
    random.Random(0).shuffle(runs)
    assert curves(*runs, "--output", tmp_path / "second") == 0
    assert curves(tmp_path / "first" / "curves.json", "--output", tmp_path / "third") == 0
    assert sorted(entry.name for entry in (tmp_path / "first").iterdir()) == FILES
    for name in FILES:
        contents = {(tmp_path / again / name).read_bytes() for again in ("first", "second", "third")}
        assert len(contents) == 1, name
    rows = json.loads((tmp_path / "first" / "curves.json").read_text())["rows"]
    assert len(rows) == len(cells_of(printed.out)) == 2 + 7 * 4
    assert {(row["method"], row["epochs"]) for row in rows if row["method"] == "dense"} == {
        ("dense", 40),
        ("dense", 90),
    }
    assert all(row["seeds"] == [0, 1, 2] for row in rows)


def test_the_plot_has_every_method_and_no_date(runs, tmp_path):
    assert curves(*runs, "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "curves.svg").read_text()
    ElementTree.fromstring(text)
    assert "dc:date" not in text
    for method in METHODS:
        assert f"<!-- {method}, 40 epochs -->" in text
    assert "<!-- dense, 90 epochs -->" in text
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert "Software" not in image.info and image.width > 1000
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours


def test_a_panel_for_each_set_of_clips(tmp_path):
    for place, data in enumerate(("motions", "/data/a $very$ odd_name.csv")):
        (tmp_path / str(place)).mkdir()
        write_record(
            some_record(data=data, points=[some_point("mone"), some_point("dense", 1.0)]), tmp_path / str(place)
        )
    assert curves(tmp_path / "0", tmp_path / "1", "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "curves.svg").read_text()
    assert "<!-- a $very$ odd_name.csv, val: 200 clips" in text and "<!-- motions, val: 200 clips" in text


def test_one_run_at_its_end(tmp_path):
    record = some_record("mone", points=[some_point()])
    jobs.curves.write_run_curve(record, tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert sorted(before) == ["curve.json", "curve.md", "curve.png"]
    assert read_records(tmp_path) == [record]
    assert cells_of(before["curve.md"].decode())[0]["GFLOP/clip"] == "2.080"
    jobs.curves.write_run_curve(record, tmp_path)
    assert before == {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}


def test_a_record_that_cannot_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="nll must be a number of at least 0"):
        write_record(some_record(points=[some_point(nll=float("nan"))]), tmp_path)
    assert [*tmp_path.iterdir()] == []


BAD = {
    "seed is missing": lambda values: values.pop("seed"),
    "colour is unknown": lambda values: values.update(colour="red"),
    "version is 1": lambda values: values.update(version=1),
    "capacity must be null or a number": lambda values: values.update(capacity=True),
    "points has none at capacity 0.3, which it was trained at": lambda values: values.update(capacity=0.3),
    "fold must be text": lambda values: values.update(fold=1),
    "method must be one of mone, dense": lambda values: values.update(method="astrology"),
    "epochs must be a whole number above 0, got true": lambda values: values.update(epochs=True),
    'data must be text, got ""': lambda values: values.update(data=""),
    "train_flops must be a number of at least 0": lambda values: values.update(train_flops=-1),
    "points must be a list": lambda values: values.update(points={}),
    "points is empty": lambda values: values.update(points=[]),
    "points[1].top1 must be a number from 0 to 1, got 50": lambda values: values["points"][1].update(top1=50),
    "points[1].nll is missing": lambda values: values["points"][1].pop("nll"),
    "points[0].drop_static must be null or": lambda values: values["points"][0].update(drop_static="4"),
    "points[0] must be an object, not int": lambda values: values["points"].__setitem__(0, 7),
    "points has mone at capacity 0.2 twice": lambda values: values["points"].append(values["points"][0]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_is_one_line(tmp_path, capsys, message):
    values = json.loads(json.dumps(to_json(some_record())))
    BAD[message](values)
    (tmp_path / "curve.json").write_text(json.dumps(values))
    refused(capsys, [tmp_path], tmp_path / "curve.json", message)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[" * 100_000, ""),
        ("[]", "a record must be an object, not list"),
        ('{"runs": 3}', "not a list of runs"),
        ('{"version": 2, "runs": [{}]}', "capacity is missing"),
        ('{"version": 1, "runs": []}', "not a list of runs of version 2"),
        ("\xff", ""),
    ],
)
def test_what_is_no_record_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "curve.json").write_bytes(content.encode("latin-1"))
    refused(capsys, [tmp_path], tmp_path / "curve.json", message)


def refused(capsys, runs, *messages):
    assert curves(*runs, "--output", runs[0] / "out") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert all(str(message) in printed.err for message in messages)
    assert not (runs[0] / "out").exists()


def test_a_run_without_a_curve_is_one_line(tmp_path, capsys):
    refused(capsys, [tmp_path], "No such file", tmp_path / "curve.json")


def test_no_run_is_one_line(tmp_path, capsys):
    assert curves("--output", tmp_path / "out") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "seed 0 is there twice"),
        ({"seed": 1, "recipe": "adapt"}, "differ in recipe, motions and adapt"),
        ({"seed": 1, "train_clips": 60}, "differ in train_clips, 600 and 60"),
        ({"seed": 1, "points": [some_point(num_clips=100)]}, "differ in num_clips, 200 and 100"),
        ({"seed": 1, "points": [some_point(dense_flops_per_clip=8)]}, "differ in dense_flops_per_clip"),
        ({"fold": "other", "recipe": "adapt"}, "differ in recipe"),
        ({"method": "tome", "fold": "other"}, "differ in folds, split and other"),
        ({"method": "tome", "points": [some_point("tome", num_clips=100)]}, "differ in num_clips, 200 and 100"),
        ({"method": "tome", "points": [some_point("tome", dense_flops_per_clip=8)]}, "differ in dense_flops_per_clip"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_line(tmp_path, capsys, changes, message):
    folders = [tmp_path / name for name in "ab"]
    for folder, record in zip(folders, [some_record(), some_record(**changes)], strict=True):
        folder.mkdir()
        write_record(record, folder)
    refused(capsys, folders, message)


def test_models_that_differ_in_their_router_only_are_compared():
    records = [some_record(), some_record("random_router", points=[some_point("random_router")])]
    (point,) = records[1].points
    other = dataclasses.replace(point, dense_flops_per_clip=point.dense_flops_per_clip - 10_000_000)
    assert len(rows_of([records[0], dataclasses.replace(records[1], points=(other,))])) == 5


def test_the_schema_names_what_the_records_have():
    values = to_json(some_record())
    assert from_json(json.loads(json.dumps(values))) == some_record()
    assert values.keys() == {field.name for field in dataclasses.fields(CurveRecord)} | {"version"}
