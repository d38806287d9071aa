"""What a benchmark prints: every row, operations by the formula, ratios of what it measured. No time is asserted."""

import json
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jobs.benchmark
from jobs.benchmarks.kernels import variants_of
from jobs.inputs import BUNDLED, BUNDLED_MODEL
from mone.baselines import METHODS, capacities_of, sharing_weights, with_method
from mone.checkpoint import save_checkpoint
from mone.compute import clip_compute, training_flops
from mone.config import ModelConfig, preset
from mone.engine.tilings import Attending, default_tilings
from mone.model import ViViT
from pipelines.synthetic import MOTIONS
from tests.conftest import TINY, run_job

SMALL = ["--preset", "tiny", "--frames", "4", "--size", "32", "--batch-size", "2"]
CAPACITIES = (0.2, 1.0)
BUNDLED_LABELS = str(BUNDLED / "clips" / "labels.csv")
ASKED = ["--capacity", *map(str, CAPACITIES)]


@pytest.fixture
def measured(capsys) -> Callable[..., dict[str, Any]]:
    """Run a benchmark in this process; its JSON."""

    def run(*arguments: object) -> dict[str, Any]:
        status = jobs.benchmark.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert status == 0, printed.err
        *table, last = printed.out.splitlines()
        record = json.loads(last)
        assert len(table) == len(record["rows"]) + 2  # what was measured, and the header
        return record

    return run


@pytest.fixture
def refused(capsys) -> Callable[..., None]:
    """Run a benchmark on bad input: status 2 and one line that names it."""

    def check(*arguments: object, names: str) -> None:
        assert jobs.benchmark.main(list(map(str, arguments))) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
        assert printed.err.startswith("python -m jobs.benchmark: ") and names in printed.err

    return check


def check_rows(record: dict[str, Any], config: ModelConfig, *, embedded: bool = False) -> None:
    """Operations are the formula's, and everything else follows from them and the measured times."""
    embedding = 2 * config.dim * config.patch_values * embedded
    dense, dense_flops = record["rows"][0], clip_compute(config, 1.0).dense_flops
    dense_flops -= embedding * config.num_indices * config.num_tokens
    assert dense["method"] == "dense" and dense["times_faster"] == 1
    for row in record["rows"]:
        places = config.num_indices * config.num_tokens
        num_kept = round((1 - row["static_share"]) * places) if row["static_share"] else None
        flops = clip_compute(with_method(config, row["method"]), row["capacity"], num_kept).flops
        flops -= embedding * (num_kept or places)
        assert row["flops_per_clip"] == flops and row["dense_flops_per_clip"] == dense_flops
        assert row["flops_share"] == flops / dense_flops
        times_ms = row["batch_ms_repeats"]
        assert len(times_ms) == record["config"]["repeats"]
        assert row["batch_ms"] == pytest.approx(statistics.median(times_ms))
        assert row["clips_per_s"] == pytest.approx(record["config"]["batch_size"] / row["batch_ms"] * 1e3)
        assert row["tflop_per_s"] == pytest.approx(flops * row["clips_per_s"] / 1e12)
        faster = sorted(a / b for a, b in zip(dense["batch_ms_repeats"], times_ms, strict=True))
        shown = [row[name] for name in ("times_faster_min", "times_faster", "times_faster_max")]
        assert shown == pytest.approx([faster[0], statistics.median(faster), faster[-1]])
        if row["flops_share"] > 0.99:
            assert row["realised_saving"] is None
        else:
            saved = 1 - 1 / row["times_faster"]
            assert row["realised_saving"] == pytest.approx(saved / (1 - row["flops_share"]))
        assert (row["peak_memory_bytes"] is None) == (not torch.cuda.is_available())


def test_every_method_at_every_capacity_once(measured):
    record = measured("model", *SMALL, *ASKED, "--repeats", 3, "--device", "cpu", "--methods", *METHODS)
    config = preset("tiny", num_classes=400, num_frames=4, height_px=32, width_px=32)
    expected = [(name, of) for name in ["dense", *METHODS] for of in capacities_of(name, config, CAPACITIES)]
    assert [(row["method"], row["capacity"]) for row in record["rows"]] == list(dict.fromkeys(expected))
    assert record["dtype"] == "float32" and record["torch"] == torch.__version__ and record["device"]
    check_rows(record, config)


@pytest.mark.parametrize("encoder", ["factorised", "joint", "spatial", "blocks"])
def test_static_patches_are_more_rows(measured, encoder):
    record = measured(
        *("model", *SMALL, *ASKED, "--repeats", 1, "--device", "cpu", "--encoder", encoder, "--methods", "mone"),
        *("--static-share", 0.3, "--dtype", "bf16"),
    )
    rows = [(row["method"], row["capacity"], row["static_share"]) for row in record["rows"]]
    full = [("dense", 1.0), ("mone", 0.2), ("mone", 1.0)]
    # Of 8 patches, 2 are at most 30 %.
    assert rows == [(*of, 0.0) for of in full] + [(*of, 0.25) for of in full]
    sizes = {"temporal_depth": 0} if encoder in ("spatial", "blocks") else {"encoder": encoder}
    config = preset("tiny", num_classes=400, num_frames=4, height_px=32, width_px=32, **sizes)
    check_rows(record, config, embedded=encoder == "blocks")


def test_a_model_folder_gives_its_sizes(measured, model_folder):
    record = measured("model", "--model", model_folder, "--repeats", 1, "--device", "cpu", "--capacity", "0.4")
    assert record["model_config"]["dim"] == TINY.dim
    check_rows(record, TINY)


def test_rows_run_the_methods_on_the_weights_of_the_folder(checkpoint):
    base, rng = checkpoint.build(), torch.Generator().manual_seed(0)
    shape = (2, TINY.num_indices, TINY.num_tokens, TINY.patch_values)
    patches = torch.randint(256, shape, dtype=torch.uint8, generator=rng)
    for method in METHODS:
        config = with_method(TINY, method)
        shared = sharing_weights(base, config)
        assert shared.head.weight.data_ptr() == base.head.weight.data_ptr() and not shared.training
        with torch.inference_mode():
            own = checkpoint.with_config(config).build()(patches, 0.4).logits_BC
            torch.testing.assert_close(shared(patches, 0.4).logits_BC, own)  # alignment in memory may move last bits


@pytest.fixture(scope="module")
def motion_model(tmp_path_factory):
    """Like the bundled model, its router looks at pixels."""
    torch.manual_seed(3)
    config = ModelConfig(**{name: getattr(TINY, name) for name in TINY.__slots__} | {"router": "motion"})
    model = ViViT(config)
    torch.nn.init.normal_(model.head.weight)
    return save_checkpoint(model, MOTIONS, tmp_path_factory.mktemp("motion") / "model")


def test_float64_is_exact_and_fewer_bits_are_worse(measured, motion_model):
    dtypes = ["float64", "float32", "bf16", "bf16_autocast"]
    record = measured(
        *("precision", "--model", motion_model, "--random", "--clips", 5, "--batch-size", 2),
        *(*ASKED, "--device", "cpu", "--dtypes", *dtypes),
    )
    rows = {(row["dtype"], row["capacity"]): row for row in record["rows"]}
    assert set(rows) == {(dtype, capacity) for dtype in dtypes for capacity in CAPACITIES}
    for capacity in CAPACITIES:
        exact, single, *halves = (rows[dtype, capacity] for dtype in dtypes)
        assert not any(value for name, value in exact.items() if name not in ("dtype", "capacity"))
        assert 0 < single["relative_rms_error"] < 1e-5
        for suffix in ("", "_same_routing"):
            names = [f"max_abs_error{suffix}", f"relative_rms_error{suffix}"]
            assert all(half[name] > 100 * single[name] for half in halves for name in names)
            assert all(half[f"relative_rms_error{suffix}"] < 0.5 for half in halves)
    assert all(rows[dtype, 1.0]["rerouted_share"] == 0 for dtype in dtypes)  # there is only one expert to go to


def test_precision_reads_videos_and_leaves_out_what_it_cannot_read(measured, model_folder, archive):
    record = measured("precision", "--model", model_folder, "--data", archive, "--capacity", "0.4", "--device", "cpu")
    assert (record["clips"], record["failed"]) == (8, 2)
    assert [row["dtype"] for row in record["rows"]] == ["float32", "bf16", "bf16_autocast"]


def test_the_last_line_of_the_process_is_json(model_folder):
    ended = run_job("benchmark", "model", "--model", model_folder, "--repeats", 1, "--methods", "mone")
    assert ended.returncode == 0, ended.stderr
    record = json.loads(ended.stdout.splitlines()[-1])
    assert record["benchmark"] == "model" and record["config"]["repeats"] == 1 and record["date"]


@pytest.mark.parametrize(
    "options, names",
    [
        (["--methods", "mone", "magic"], "magic"),
        (["--preset", "huge"], "huge"),
        (["--capacity", "0.4", "7"], "7"),
        (["--capacity", "nan"], "capacity"),
        (["--capacity"], "--capacity"),
        (["--repeats", "4"], "--repeats"),
        (["--repeats=-1"], "--repeats"),
        (["--batch-size", "0"], "--batch-size"),
        (["--static-share", "0.95"], "--static-share"),
        (["--static-share", "nan"], "--static-share"),
        (["--frames", "5"], "num_frames"),
        (["--size=-16"], "height_px"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "no-such-model", "--preset", "tiny"], "--preset"),
    ],
)
def test_bad_options_of_model(refused, options, names):
    refused("model", *options, names=names)


@pytest.mark.parametrize(
    "options, names",
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--data", "no-such-videos"], "no-such-videos"),
        (["--data", "videos", "--random"], "--data"),
        (["--dtypes", "float32", "int8"], "int8"),
        (["--device", "cpu", "--dtypes", "fp16_autocast"], "fp16_autocast"),
        (["--capacity", "0"], "capacity"),
        (["--capacity"], "--capacity"),
        (["--clips", "0"], "--clips"),
        (["--batch-size=-1"], "--batch-size"),
    ],
)
def test_bad_options_of_precision(refused, options, names):
    refused("precision", *options, names=names)


@pytest.mark.parametrize(
    "name", sorted(jobs.benchmark.BENCHMARKS.keys() - {"control", "cpu", "kernels", "pipeline", "scaling", "tune"})
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused, name):
    refused(name, "--device", "cuda", names="cuda")


def test_a_processor_is_timed_with_both_engines(measured):
    record = measured(
        "cpu", "--preset", "tiny", "--frames", "2", "--batch-size", "1", "--capacity", "0.4", "--repeats", "1"
    )
    assert [(row["engine"], row["method"]) for row in record["rows"]] == [
        (engine, method) for engine in ("reference", "layout") for method in ("dense", "mone")
    ]
    assert record["benchmark"] == "cpu" and "CPU" in record["device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["kernels", "tune"])
def test_kernels_are_measured_on_a_gpu_alone(refused, name):
    refused(name, names="there is none")


def test_each_kernel_is_taken_away_once():
    roles, plain = (default_tilings((9, 0), 0.4, 50_000, roles=roles) for roles in (True, False))
    variants = variants_of(roles, plain, has_narrow=True)
    assert len(set(variants.values())) == len(variants) == 7
    assert variants["as it is"] == roles
    assert variants["narrow MLPs whose warps have roles"].narrow == plain.narrow
    assert list(variants_of(roles, plain, has_narrow=False)) == list(variants)[:3]
    online = roles._replace(attention=Attending(whole=False, roles=True))
    assert list(variants_of(online, plain, has_narrow=False)) == ["as it is"]
    assert list(variants_of(plain, plain, has_narrow=True)) == [
        "as it is", "attention of whole heads", "narrow MLPs in one launch", "all of these"
    ]  # fmt: skip


@pytest.mark.gpu
def test_what_kernels_are_worth(measured):
    record = measured("kernels", "--capacity", "0.4", "1", "--batch-size", "2", "--repeats", "1")
    assert {row["capacity"] for row in record["rows"]} == {0.4, 1.0}
    assert all(row["times_slower"] == 1 for row in record["rows"] if row["without"] == "as it is")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--data", "motions"], "labelled videos"),
        (["--data", BUNDLED_LABELS, "--workers", "0"], "--workers"),
        (["--data", BUNDLED_LABELS, "--batch-size", "64"], "--clips-per-video"),
        (["--data", "no/such.csv"], "no/such.csv"),
    ],
)
def test_bad_options_of_scaling(refused, options, names):
    refused("scaling", *options, names=names)


@pytest.mark.ray
@pytest.mark.slow
def test_training_with_one_worker_and_with_two_takes_as_many_steps(capsys):
    options = ["--preset", "tiny", "--frames", "4", "--size", "32", "--batch-size", "2", "--workers", "1", "2"]
    assert jobs.benchmark.main(["scaling", "--data", BUNDLED_LABELS, "--clips-per-video", "1", *options]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, two = record["rows"]
    assert (one["workers"], two["workers"]) == (1, 2) and one["efficiency"] == 1
    for row in record["rows"]:
        assert len(row["clips_per_s_intervals"]) >= 4
        assert row["clips_per_s"] == statistics.median(row["clips_per_s_intervals"])
        assert 0 <= row["data_wait_share"] <= 1
    assert two["efficiency"] == pytest.approx(two["clips_per_s"] / one["clips_per_s"] / 2)


def test_an_unknown_benchmark(refused):
    refused("astrology", names="astrology")


def test_training_steps_are_timed_for_each_method(capsys):
    options = (
        "--preset",
        "tiny",
        "--frames",
        "4",
        "--size",
        "32",
        "--batch-size",
        "2",
        "--repeats",
        "1",
        "--steps",
        "1",
    )
    methods = ("--methods", "mone", "token_drop", "--capacity", "0.4")
    assert jobs.benchmark.main(["train", *options, *methods, "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["method"], row["capacity"]) for row in record["rows"]] == [
        ("dense", 1.0),
        ("mone", 0.4),
        ("token_drop", 0.4),
    ]
    config = preset("tiny", num_classes=400, num_frames=4, height_px=32, width_px=32)
    flops = training_flops(config, config.token_counts(0.4)) * 2
    assert record["rows"][1]["training_flops_per_step"] == flops
    assert record["rows"][0]["times_faster"] == 1.0 and record["rows"][0]["mfu"] is None


def test_focus_says_where_the_compute_goes(measured, tmp_path):
    torch.manual_seed(0)
    model = ViViT(TINY)
    save_checkpoint(model, MOTIONS, tmp_path / "model")
    record = measured("focus", "--models", tmp_path / "model", "--clips", 24, "--capacity", 0.3, 1)
    some, all_of_it = record["rows"]
    assert (some["capacity"], all_of_it["capacity"]) == (0.3, 1)
    assert all_of_it["expert_share_of_moving"] == all_of_it["expert_share"] == 1
    assert all_of_it["width_of_moving"] == all_of_it["width"] == 1
    assert some["moving_share"] == all_of_it["moving_share"] == all_of_it["moving_share_of_expert"] > 0
    counts = TINY.token_counts(0.3)
    assert some["expert_share"] == pytest.approx(counts[some["expert"]] / sum(counts))


def test_focus_is_refused_where_nothing_can_be_said(refused, tmp_path):
    refused("focus", "--models", names="--models")
    refused("focus", "--models", tmp_path / "none", names="none")
    refused("focus", "--models", tmp_path, "--split", "train", names="--split")


def test_several_engines_are_several_rows(measured):
    options = ("--device", "cpu", "--repeats", 1, "--capacity", 0.4, "--methods", "mone")
    record = measured("model", *SMALL, *options, "--engine", "layout", "reference")
    rows = [(row["method"], row["engine"]) for row in record["rows"]]
    assert rows == [(method, engine) for engine in ("layout", "reference") for method in ("dense", "mone")]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--videos", "1"], "--videos"),
        (["--rounds", "0"], "--rounds"),
        (["--frames", "5"], "num_frames"),
        (["--size", "30"], "height_px"),
        (["--span=-1"], "span"),
        (["--resolution", "361"], "--resolution"),
        (["--resolution"], "--resolution"),
        (["--sampling", "some"], "some"),
        (["--duration", "nan"], "--duration"),
        (["--data", "no/such/videos"], "no/such/videos"),
        (["--data", BUNDLED_LABELS, "--keep", "here"], "--keep"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", str(BUNDLED_MODEL), "--scale", "100"], "--scale"),
        (["--scale", "50"], "--scale must be hundreds, got 50"),
    ],
)
def test_bad_options_of_pipeline(refused, options, names):
    refused("pipeline", *options, names=names)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--videos", "1"], "--videos"),
        (["--batch-size", "0"], "--batch-size"),
        (["--resolution"], "--resolution"),
        (["--resolution", "30"], "--resolution"),
        (["--duration", "nan"], "--duration"),
        (["--decoder", "gpu"], "--decoder"),
        (["--decoder", "nvdec", "--device", "cpu"], "--decoder nvdec needs a GPU"),
        (["--decoder", "cpu", "--preset", "giant"], "giant"),
    ],
)
def test_bad_options_of_annotate(refused, options, names):
    refused("annotate", *options, names=names)


@pytest.mark.slow
@pytest.mark.ray
def test_annotating_is_compared_with_the_model_and_the_decoders_alone(tmp_path, model_folder):
    options = ["--model", model_folder, "--videos", 2, "--duration", 3, "--resolution", 64, "--keep", tmp_path]
    ended = run_job("benchmark", "annotate", *options, "--decoder", "cpu", "auto", "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout.splitlines()[-1])["rows"]
    assert [row["decoder"] for row in rows] == ["cpu", "auto"]
    for row in rows:
        assert (row["videos"], row["clips"], row["failed_clips"]) == (2, 6, 0) and row["decoders"] == {"pyav": 6}
        assert row["share_of_limit"] == pytest.approx(row["clips_per_s"] / row["limit_clips_per_s"])
        assert row["share_of_model"] == pytest.approx(row["clips_per_s"] / row["model_clips_per_s"])
        assert 0 < row["model_busy_share"] < 1 and row["nvdec_clips_share"] == 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--clips"], "--clips"),
        (["--clips", "0"], "--clips"),
        (["--nodes", "0"], "--nodes"),
        (["--batch-size", "0"], "--batch-size"),
        (["--decode-ms=-1"], "--decode-ms"),
    ],
)
def test_bad_options_of_control(refused, options, names):
    refused("control", *options, names=names)


@pytest.mark.slow
@pytest.mark.ray
def test_the_control_path_of_several_nodes_leaves_a_row_for_each_clip():
    ended = run_job("benchmark", "control", "--clips", 70, 300, "--nodes", 2, "--cpus", 2, "--decode-ms", 1)
    assert ended.returncode == 0, ended.stderr
    *table, last = ended.stdout.splitlines()
    rows = json.loads(last)["rows"]
    assert len(table) == len(rows) + 2
    assert [(row["clips"], row["clean"]) for row in rows] == [(70, True), (300, True)]
    for row in rows:
        assert row["clips_per_s"] == pytest.approx(row["clips"] / row["seconds"])
        assert row["driver_us_per_clip"] > 0 < row["services_us_per_clip"] and row["files"] > 1


@pytest.mark.ray
def test_ever_more_clips_lie_on_a_line_or_it_says_how_far_off():
    ended = run_job("benchmark", "pipeline", "--scale", 300, 100, 200, "--rounds", 1)
    assert ended.returncode == 0, ended.stderr
    *table, last = ended.stdout.splitlines()
    rows = json.loads(last)["rows"]
    assert len(table) == len(rows) + 2 and [row["clips"] for row in rows] == [100, 200, 300]
    assert all(row["complete_clips"] == row["clips"] for row in rows)
    first, middle, end = (row["seconds"] for row in rows)
    assert [("off_the_line" in row, "ms_per_more_clip" in row) for row in rows] == [
        (False, False),
        (True, True),
        (False, True),
    ]
    assert rows[1]["off_the_line"] == pytest.approx(2 * middle / (first + end) - 1)
    assert rows[2]["ms_per_more_clip"] == pytest.approx((end - middle) * 10)


@pytest.mark.ray
def test_all_ways_give_all_frames_of_all_clips(tmp_path):
    options = ["--videos", 2, "--duration", 2, "--resolution", 64, "--rounds", 1, "--keep", tmp_path / "videos"]
    sizes = ["--frames", 4, "--size", 32, "--span", 0.5, "--full-frames"]
    ended = run_job("benchmark", "pipeline", *options, *sizes)
    assert ended.returncode == 0, ended.stderr
    *table, last = ended.stdout.splitlines()
    record = json.loads(last)
    assert len(table) == len(record["rows"]) + 2 and len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    ways = ["pipeline", "read_videos", "decoders alone", "read_videos, full frames"]
    assert [(row["sampling"], row["side"]) for row in record["rows"]] == [
        (sampling, way) for sampling in ("sparse", "dense") for way in ways
    ]
    for row in record["rows"]:
        assert (row["videos"], row["failed_clips"], row["spilled_bytes"]) == (2, 0, 0)
        assert row["clips"] == row["complete_clips"] == 8 and row["frames"] == 8 * 4
        assert row["seconds_rounds"] == [row["seconds"]] and row["clips_per_s_rounds"] == [row["clips_per_s"]]
        assert row["start_s"] == pytest.approx(row["seconds"] - 8 / row["clips_per_s"])
        assert row["cpu_s"] >= 0  # of which a clock tick may be more than so few frames take
        assert row["processes_bytes"] >= row["largest_process_bytes"] >= 0
    assert sum(row["cpu_s"] for row in record["rows"]) > 0 < max(row["largest_process_bytes"] for row in record["rows"])
    for row in record["rows"]:
        of = {other["side"]: other for other in record["rows"] if other["sampling"] == row["sampling"]}
        for key, other in (("share_of_limit", "decoders alone"), ("times_read_videos", "read_videos")):
            assert row[key] == pytest.approx(row["clips_per_s"] / of[other]["clips_per_s"])
            assert row[f"{key}_with_start"] == pytest.approx(of[other]["seconds"] / row["seconds"])
