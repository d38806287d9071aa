"""cluster.yaml and the variants in its comments, by Ray's own checks; and what of it is a matter of safety."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parents[2] / "cluster.yaml"
VARIANTS = re.findall(r"^# --- (\w+ \w+).*\n((?:#.*\n)+)", PATH.read_text(), re.MULTILINE)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


def with_variant(cluster: dict[str, Any], comment: str) -> dict[str, Any]:
    """The file after somebody has followed the comment; what is null there is to be left out."""
    changed = cluster | yaml.safe_load("\n".join(line[2:] for line in comment.splitlines()))
    return {key: value for key, value in changed.items() if value is not None}


def test_ray_accepts_it(cluster):
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("comment", [comment for _, comment in VARIANTS], ids=[name for name, _ in VARIANTS])
def test_ray_accepts_its_variants(cluster, comment):
    changed = with_variant(cluster, comment)
    assert changed["provider"]["type"] != cluster["provider"]["type"]
    validate_config(prepare_config(changed))


def test_there_is_a_variant_for_gcp_and_one_on_premises(cluster):
    types = {with_variant(cluster, comment)["provider"]["type"] for _, comment in VARIANTS}
    assert types == {"gcp", "local"}


def test_the_dashboard_listens_to_this_machine_alone(cluster):
    starts = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1 and "--dashboard-host=127.0.0.1" in starts[0].split()


def test_nothing_runs_on_the_head_and_it_is_no_spot_instance(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0 and "InstanceMarketOptions" not in head["node_config"]


def test_pools_add_up(cluster):
    pools = [pool for name, pool in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert cluster["max_workers"] == sum(pool["max_workers"] for pool in pools)
    assert all(pool["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for pool in pools)


def test_there_is_no_key_and_no_account_in_it():
    text = PATH.read_text()
    assert not re.search(
        r"AKIA|ssh_private_key|KeyName|password|secret|token|\b\d{12}\b|\b(sg|subnet|ami|fs)-[0-9a-f]+", text
    )


def test_the_files_that_it_sends_and_installs_are_there(cluster):
    assert any("constraints.txt" in line for line in cluster["setup_commands"])
    assert (PATH.parent / "constraints.txt").is_file() and (PATH.parent / "pyproject.toml").is_file()


def test_the_image_has_the_ray_that_is_installed_into_it(cluster):
    pinned = re.search(r"^ray==(\S+)", (PATH.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and cluster["docker"]["image"] == f"rayproject/ray:{pinned[1]}-py311"
