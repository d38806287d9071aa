"""cluster.yaml against Ray's own schema, and the parts of it that are a matter of safety."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

PATH = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load(PATH.read_text())


def test_ray_accepts_it(cluster):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_the_dashboard_listens_to_this_machine_alone(cluster):
    starts = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1 and "--dashboard-host=127.0.0.1" in starts[0].split()


def test_nothing_runs_on_the_head(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0


def test_the_files_that_it_sends_and_installs_are_there(cluster):
    assert any("constraints.txt" in line for line in cluster["setup_commands"])
    assert (PATH.parent / "constraints.txt").is_file() and (PATH.parent / "pyproject.toml").is_file()
