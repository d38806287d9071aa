"""What a run tells Prometheus, against what it wrote; and the dashboard, against what a run tells."""

import json
import re
import subprocess
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs.session import run_name, speed
from mone.compute import clip_compute
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import Totals, totals
from pipelines.metrics import COUNTERS, GAUGES
from tests.conftest import NUM_CLIPS, NUM_VIDEOS, TINY, command_of

pytestmark = pytest.mark.ray

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana/mone.json").read_text())
CHOSEN = "ray_mone_clips_left"  # whose runs can be chosen from
QUEUED = "ray_data_num_external_inqueue_blocks"
PRICE_PER_HOUR = 3600.0  # one for a second


class Sample(NamedTuple):
    """A line of Prometheus's text."""

    name: str
    labels: tuple[tuple[str, str], ...]


class Watched(NamedTuple):
    """A run that was scraped while it went on: the last value of each sample, and what it wrote."""

    samples: dict[Sample, float]
    record: dict[str, Any]
    totals: Totals
    stdout: str

    def sum(self, name: str, **labels: str) -> float:
        """Of all worker processes of the run."""
        wanted = {("run", self.record["run"]), *labels.items()}
        return sum(
            value for sample, value in self.samples.items() if sample.name == name and wanted <= {*sample.labels}
        )


def scrape(port: int, run: str) -> dict[Sample, float]:
    """What the node tells of a run; others may have been there before it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        Sample(sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == run or sample.labels.get("dataset", "").startswith(f"{run}_")
    }


@pytest.fixture(scope="module")
def watched(ray_session, archive, model_folder, tmp_path_factory) -> Watched:
    output, (node,) = tmp_path_factory.mktemp("watched") / "run", ray.nodes()
    arguments = (archive, "--output", output, "--model", model_folder, "--price-per-hour", PRICE_PER_HOUR)
    command = command_of("annotate", *arguments, "--address", ray.get_runtime_context().gcs_address)
    job = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    samples, deadline_s = dict[Sample, float](), time.monotonic() + 120
    # Gauges last for two reports after their process, so they are looked for while the run goes on. What workers count
    # is there when they have ended; Ray Data's own metrics, whose process stays, with its next report.
    while job.poll() is None or not everything_is_told(samples):
        assert time.monotonic() < deadline_s, sorted({sample.name for sample in samples})
        time.sleep(0.3)
        samples |= scrape(node["MetricsExportPort"], run_name(output))
    stdout, stderr = job.communicate()
    assert job.returncode == 0, stderr
    record = json.loads((output / "run.json").read_text())
    return Watched(samples, record, totals(output / ANNOTATIONS_DIR, frozenset()), stdout)


def everything_is_told(samples: dict[Sample, float]) -> bool:
    clips = sum(value for sample, value in samples.items() if sample.name == "ray_mone_clips_total")
    return clips >= NUM_CLIPS and any(sample.name == QUEUED for sample in samples)


def test_clips_by_status_are_the_rows(watched):
    found = {status: watched.sum("ray_mone_clips_total", status=status) for status in watched.totals.statuses}
    assert found == {"ok": 2 * NUM_VIDEOS, "empty": 1, "decode_error": 1} == watched.totals.statuses


def test_counters_are_the_totals_of_the_run(watched):
    compute = clip_compute(TINY, 0.4)
    assert watched.sum("ray_mone_flops_total") == watched.totals.flops == 2 * NUM_VIDEOS * compute.flops
    assert watched.sum("ray_mone_dense_flops_total") == watched.totals.dense_flops
    assert watched.sum("ray_mone_frames_decoded_total") == 2 * NUM_VIDEOS * TINY.num_frames
    for name, expected in {
        "video_seconds": watched.totals.hours * 3600,
        "decode_seconds": watched.totals.decode_s,
        "model_seconds": watched.totals.model_s,
    }.items():
        assert watched.sum(f"ray_mone_{name}_total") == pytest.approx(expected, rel=1e-4), name
    assert watched.sum("ray_mone_wait_seconds_total") > 0
    for expert, tokens in enumerate(compute.tokens_per_expert):
        assert watched.sum("ray_mone_expert_tokens_total", expert=str(expert)) == 2 * NUM_VIDEOS * tokens


def test_gauges_are_those_of_the_cluster_and_the_end_of_the_run(watched):
    assert watched.sum("ray_mone_cpus") == 2 and watched.sum("ray_mone_gpus") == 0
    assert watched.sum("ray_mone_clips_left") == 0
    assert 0 < watched.sum("ray_mone_cost") <= watched.record["totals"]["cost"]


def test_every_metric_is_labelled_with_the_run(watched):
    told = {sample.name: dict(sample.labels) for sample in watched.samples if sample.name.startswith("ray_mone_")}
    assert watched.record["run"] == run_name(Path(watched.record["config"]["output"]))
    assert told.keys() == {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}


def expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_a_panel_asks_for_what_a_run_tells(watched, title, expression):
    """Each selector finds samples, by its name, by its matchers, and by the labels that the panel groups by."""
    selectors = re.findall(r"(\w+)\{(\w+)=~\"([^\"]+)\"\}", expression)
    assert selectors and len(selectors) == len(re.findall("ray_", expression))
    for name, label, pattern in selectors:
        matcher = re.compile(pattern.replace("$run", re.escape(watched.record["run"])))
        found = [dict(sample.labels) for sample in watched.samples if sample.name == name]
        found = [labels for labels in found if matcher.fullmatch(labels[label])]
        assert found, name
        grouped = {by for clause in re.findall(r"by \(([^)]*)\)", expression) for by in clause.split(", ")}
        assert all(grouped & {"status", "expert", "operator"} <= labels.keys() for labels in found), (name, grouped)


def test_the_dashboard_is_imported_as_it_is():
    datasource, run = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    asked = [run["datasource"], *(panel["datasource"] for panel in DASHBOARD["panels"])]
    asked += [target["datasource"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert all(of == {"type": "prometheus", "uid": "${datasource}"} for of in asked)
    assert run["query"]["query"] == f"label_values({CHOSEN}, run)" and CHOSEN in {f"ray_{name}" for name in GAUGES}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert "__inputs" not in DASHBOARD  # which ask at the import


def test_panels_do_not_overlap():
    covered = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert set(covered.values()) == {1} and max(x for x, _ in covered) == 23


def test_the_record_the_summary_and_the_report_say_how_busy_the_cluster_was(watched):
    record, (session,) = watched.record["totals"], watched.record["sessions"]
    assert session["cpu_s"] == pytest.approx(2 * session["wall_s"], abs=0.01) and session["gpu_s"] == 0
    assert record["cost"] == pytest.approx(session["wall_s"] * PRICE_PER_HOUR / 3600, abs=0.01)
    shares = record["efficiency"]
    assert shares["decode_busy_share"] == pytest.approx(watched.totals.decode_s / session["cpu_s"], abs=1e-3)
    assert shares["model_busy_share"] == pytest.approx(watched.totals.model_s / session["cpu_s"], abs=1e-3)
    assert record["video_hours_per_day_per_gpu"] is None
    assert record["video_hours_per_day_per_cpu"] == pytest.approx(
        watched.totals.hours / session["cpu_s"] * 86400, rel=1e-3
    )
    (line,) = [line for line in watched.stdout.splitlines() if line.startswith("speed ")]
    assert line.split(maxsplit=1)[1] == speed(record)
