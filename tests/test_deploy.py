"""deploy/: manifests by the fields of KubeRay's types, commands by our own parsers, the image by its files."""

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tyro
import yaml

from jobs.annotate import Annotate, check
from jobs.train_options import Train, check_options

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "deploy/kuberay"
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(KUBERAY.glob("*.yaml"))}
RAY_VERSION = re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
JOBS = ["rayjob-annotate.yaml", "rayjob-train.yaml"]


def record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    fields = required | optional
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def items(schema: dict[str, Any], least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": least}


# Of ray.io/v1 (KubeRay 1.1 and later) and of Kubernetes' core/v1 the fields that our manifests use, with their types.
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = record(
    {
        "spec": record(
            {
                "containers": items(
                    record(
                        {"name": TEXT, "image": TEXT, "resources": record({"requests": TEXTS, "limits": TEXTS})},
                        ports=items(record({"name": TEXT, "containerPort": COUNT})),
                        volumeMounts=items(record({"name": TEXT, "mountPath": TEXT})),
                    )
                )
            },
            securityContext=record({}, fsGroup=COUNT),
            terminationGracePeriodSeconds=COUNT,
            nodeSelector=TEXTS,
            tolerations=items(
                record({"operator": {"enum": ["Exists", "Equal"]}}, key=TEXT, effect=TEXT, value=TEXT), 0
            ),
            volumes=items(
                record(
                    {"name": TEXT},
                    persistentVolumeClaim=record({"claimName": TEXT}),
                    emptyDir=record({"medium": TEXT, "sizeLimit": TEXT}),
                )
            ),
        )
    }
)
CLUSTER = record(
    {
        "headGroupSpec": record(
            {"rayStartParams": TEXTS, "template": POD}, serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}
        )
    },
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        {}, idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    workerGroupSpecs=items(
        record(
            {"groupName": TEXT, "minReplicas": COUNT, "maxReplicas": COUNT, "rayStartParams": TEXTS, "template": POD},
            replicas=COUNT,
        )
    ),
)
JOB = record(
    {"entrypoint": TEXT, "clusterSelector": record({"ray.io/cluster": TEXT})},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},  # SidecarMode selects no cluster
)


def manifest(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    # The operator refuses a name that is no DNS-1035 label; pods' and services' names are longer than that.
    names = record(
        {},
        name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$"},
        generateName={"type": "string", "pattern": "^[a-z][-a-z0-9]{0,40}$"},
    )
    return record({"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": names, "spec": spec})


@pytest.fixture
def cluster() -> dict[str, Any]:
    return MANIFESTS["raycluster.yaml"]


@pytest.fixture
def groups(cluster) -> list[dict[str, Any]]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def test_there_are_these_manifests_and_no_others():
    assert set(MANIFESTS) == {"raycluster.yaml", "networkpolicy.yaml", *JOBS}


def test_fields_are_those_of_kuberay(cluster):
    jsonschema.validate(cluster, manifest("RayCluster", CLUSTER))
    for name in JOBS:
        jsonschema.validate(MANIFESTS[name], manifest("RayJob", JOB))


def test_ray_is_the_one_that_is_tested(cluster):
    assert cluster["spec"]["rayVersion"] == RAY_VERSION
    assert f"FROM rayproject/ray:{RAY_VERSION}-py311\n" in (ROOT / "deploy/Dockerfile").read_text()


def test_groups_can_be_scheduled(groups):
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]  # so that memory is its own
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0)
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1


def test_nothing_runs_on_the_head_and_only_one_pool_has_gpus(groups):
    head, *workers = groups
    assert head["rayStartParams"]["num-cpus"] == "0"
    with_gpus = [group for group in workers if "nvidia.com/gpu" in str(group["template"]["spec"]["containers"])]
    assert [group["groupName"] for group in with_gpus] == ["predict"] and with_gpus[0]["minReplicas"] >= 1


def test_the_head_is_reached_by_its_own_pods_and_the_operator_alone(cluster):
    policy, name = MANIFESTS["networkpolicy.yaml"]["spec"], cluster["metadata"]["name"]
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert policy["policyTypes"] == ["Ingress"] and policy["podSelector"]["matchLabels"] == {"ray.io/cluster": name}
    allowed = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert allowed == [{"ray.io/cluster": name}, {"app.kubernetes.io/name": "kuberay-operator"}]


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_on_that_cluster(cluster, name):
    assert MANIFESTS[name]["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]


def options(name: str, config: type) -> Any:
    program, flag, module, *arguments = shlex.split(MANIFESTS[name]["spec"]["entrypoint"])
    assert (program, flag, module) == ("python", "-m", f"jobs.{config.__name__.lower()}")
    return tyro.cli(config, args=arguments)


def test_their_commands_are_jobs_of_ours(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # as KubeRay does
    check(options("rayjob-annotate.yaml", Annotate))
    assert check_options(options("rayjob-train.yaml", Train)) == (1, 2)


def test_the_image_is_made_of_files_that_are_there():
    lines = re.findall(r"^COPY --chown=\S+ (.*) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in lines for source in line.split()]
    assert {"mone", "pipelines", "jobs", "bundled/motions_model"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
