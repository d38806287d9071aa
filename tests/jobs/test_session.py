"""How well a run used the cluster, from sessions written by hand; and that a session is recorded however it ends."""

import pytest

from jobs.run_record import read_run, write_run
from jobs.session import Session, efficiency, run_name, speed
from pipelines.ledger import Totals
from pipelines.metrics import RunMetrics

TOTALS = Totals(hours=3.0, decode_s=6000.0, model_s=900.0)
ON_CPUS = {"wall_s": 1000.0, "cpu_s": 8000.0, "gpu_s": 0.0}
ON_GPUS = [{"wall_s": 600.0, "cpu_s": 8000.0, "gpu_s": 1200.0, "cost": 2.0}, ON_CPUS]


def test_with_gpus_the_model_is_measured_by_their_time():
    found = efficiency(TOTALS, ON_GPUS)
    assert found["wall_s"] == 1600 and found["cost"] == 2
    assert found["efficiency"] == {"decode_busy_share": 6000 / 16000, "model_busy_share": 900 / 1200}
    assert found["video_hours_per_day_per_gpu"] == pytest.approx(3 / (1200 / 86400))
    assert speed(found) == "216.0 video hours a day per GPU; CPUs 38% busy decoding, GPUs 75% with the model"


def test_without_a_gpu_both_are_measured_by_the_cpus_time():
    found = efficiency(TOTALS, [ON_CPUS])
    assert found["efficiency"] == {"decode_busy_share": 0.75, "model_busy_share": 0.1125}
    assert found["video_hours_per_day_per_gpu"] is None and "cost" not in found
    assert found["video_hours_per_day_per_cpu"] == pytest.approx(3 / (8000 / 86400))
    assert speed(found) == "32.4 video hours a day per CPU; CPUs 75% busy decoding, CPUs 11% with the model"


def test_where_a_session_did_not_measure_nothing_is_made_up():
    found = efficiency(TOTALS, [ON_CPUS, {"wall_s": 5.0}])
    assert found["wall_s"] == 1005 and speed(found) == ""
    assert found["efficiency"] == {"decode_busy_share": None, "model_busy_share": None}


def test_folders_of_the_same_name_are_different_runs(tmp_path):
    names = [run_name(tmp_path / parent / "out") for parent in ("a", "a", "b")]
    assert names[0] == names[1] != names[2] and all(name.startswith("out-") for name in names)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_session_that_is_stopped_is_recorded_beside_those_before_it(tmp_path):
    record = {"identity": {}, "sessions": [ON_CPUS]}
    write_run(tmp_path, record)
    session = Session(tmp_path, record, RunMetrics("stopped"), price_per_hour=1.0)
    with pytest.raises(KeyboardInterrupt), session.measured():
        raise KeyboardInterrupt
    before, stopped = read_run(tmp_path)["sessions"]
    assert before == ON_CPUS and set(stopped) == {"started", "wall_s", "cpu_s", "gpu_s", "cost"}
    assert stopped["cpu_s"] == pytest.approx(2 * stopped["wall_s"], abs=0.01)
