"""From what nodes say to findings, and what a node says of itself: no cluster, no Ray."""

import dataclasses
from pathlib import Path

import pytest

from jobs.diagnosis.checks import (
    NodeResources,
    check_answers,
    check_archive,
    check_capacity,
    check_clocks,
    check_decoders,
    check_gpus,
    check_output,
    check_shared_memory,
    check_versions,
)
from jobs.diagnosis.finding import Finding
from jobs.diagnosis.node import NodeFacts, examine, try_kernels
from jobs.diagnosis.shared_folder import probe_folder, unread_marks, write_mark

GIB = 1 << 30
VERSIONS = {"python": "3.11.7", "mone-video": "0.1.0", "ray": "2.60.0", "torch": "2.14.1+cu128", "av": "18.1.0"}
FACTS = NodeFacts(versions=VERSIONS, decoders={"decord": "", "pyav": ""}, shared_memory_bytes=16 * GIB)
RESOURCES = NodeResources(cpus=8, gpus=0, memory_bytes=24 * GIB, object_store_bytes=8 * GIB)


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert "\n" not in str(finding)
    assert bool(finding.remedy) == (finding.level != "ok")
    return finding


@pytest.mark.parametrize("package", ["python", "ray", "torch", "av"])
def test_a_version_that_differs_is_an_error_that_names_both_and_their_nodes(package):
    found = only(check_versions({"a": VERSIONS, "b": VERSIONS | {package: "0.9"}, "c": VERSIONS}))
    assert found.level == "error"
    version = VERSIONS[package].partition("+")[0]
    assert package in found.message and f"{version} on a, c" in found.message and "0.9 on b" in found.message


def test_a_package_that_is_missing_is_an_error_even_where_all_miss_it():
    found = only(check_versions({node: VERSIONS | {"av": "unknown"} for node in "ab"}))
    assert found.level == "error" and "av is not installed on a, b" in found.message


def test_builds_for_other_devices_are_the_same_version():
    found = only(check_versions({"a": VERSIONS, "b": VERSIONS | {"torch": "2.14.1+cpu"}}))
    assert found.level == "ok" and "2 nodes" in found.message


@pytest.mark.parametrize("other, level", [("unknown", "ok"), ("0.2.0", "error")])
def test_our_own_code_may_come_from_the_working_directory(other, level):
    assert only(check_versions({"a": VERSIONS, "b": VERSIONS | {"mone-video": other}})).level == level


def test_a_decoder_that_fails_is_an_error():
    broken = dataclasses.replace(FACTS, decoders={"decord": "ImportError: libx", "pyav": ""})
    found = only(check_decoders({"a": FACTS, "b": broken, "c": broken}))
    assert found.level == "error" and "decord fails on b, c: ImportError: libx" in found.message
    assert only(check_decoders({"a": FACTS})).level == "ok"
    optional = dataclasses.replace(FACTS, decoders=FACTS.decoders | {"torchcodec": "DecoderUnfit: not installed"})
    assert only(check_decoders({"a": FACTS, "b": optional})).level == "warning"


@pytest.mark.parametrize(
    "scheduled, seen, level", [(0, 0, "ok"), (1, 1, "ok"), (1, 0, "error"), (2, 1, "error"), (0, 1, "warning")]
)
def test_gpus_that_ray_schedules_are_those_that_torch_sees(scheduled, seen, level):
    facts = {"a": dataclasses.replace(FACTS, gpus=("A10G",) * seen)}
    assert only(check_gpus(facts, {"a": dataclasses.replace(RESOURCES, gpus=scheduled)})).level == level


def test_a_gpu_that_cannot_be_used_is_an_error_and_what_only_makes_it_faster_a_warning():
    facts = dataclasses.replace(FACTS, gpus=("A10G",), cuda="no kernel image")
    resources = {"a": dataclasses.replace(RESOURCES, gpus=1)}
    assert only(check_gpus({"a": facts}, resources)).level == "error"
    facts = dataclasses.replace(FACTS, gpus=("A10G",), kernels="no C compiler", nvdec="ImportError")
    found = check_gpus({"a": facts}, resources)
    assert [finding.check for finding in found] == ["triton", "nvdec"] and levels(found) == ["warning"] * 2


@pytest.mark.parametrize("cpus, level", [(0, "error"), (1, "warning"), (2, "ok")])
def test_training_needs_two_cpus_and_annotating_one_wherever_they_are(cpus, level):
    head = dataclasses.replace(RESOURCES, cpus=0)
    found = check_capacity({"head": head, "a": dataclasses.replace(RESOURCES, cpus=cpus)}, 1, GIB)
    assert [finding.level for finding in found if finding.check == "cpu"] == [level]


def test_memory_and_object_store_are_held_against_the_cpus_that_decode():
    assert levels(check_capacity({"a": RESOURCES}, 256 << 20, GIB)) == ["ok", "ok"]
    found = check_capacity({"a": dataclasses.replace(RESOURCES, memory_bytes=4 * GIB)}, 256 << 20, GIB)
    assert [(finding.check, finding.level) for finding in found][1] == ("memory", "warning")
    assert "memory for 4 decoding tasks on a, which has 8 CPUs" in found[1].message
    found = check_capacity({"a": RESOURCES}, 257 << 20, GIB)
    assert levels(found) == ["ok", "warning"] and found[1].check == "object store"


def test_shared_memory_holds_the_object_store():
    assert check_shared_memory({"a": FACTS}, {"a": RESOURCES}) == []
    found = only(check_shared_memory({"a": dataclasses.replace(FACTS, shared_memory_bytes=64 << 20)}, {"a": RESOURCES}))
    assert found.level == "warning" and "--shm-size" in found.remedy


@pytest.mark.parametrize("skew_s, level", [(0.5, "ok"), (30, "warning"), (3600, "error")])
def test_clocks_that_differ(skew_s, level):
    found = only(check_clocks({"a": 1000.0, "b": 1000.0 + skew_s, "c": 1000.1}))
    assert found.level == level
    assert level == "ok" or "b is" in found.message


def test_an_offset_that_is_not_known_better_is_no_skew():
    assert only(check_clocks({"a": 0.0, "b": 10.0}, uncertain_s=5.0)).level == "ok"


def test_a_node_that_cannot_write_is_one_error_and_not_one_for_each_other_node():
    found = only(check_output({"a": "", "b": "Permission denied"}, {"a": ["b"], "b": ["a", "b"]}, "/out"))
    assert found.level == "error" and "b cannot write to /out: Permission denied" in found.message


def test_a_folder_that_is_another_one_there():
    found = check_output({"a": "", "b": ""}, {"a": ["b"], "b": ["a"]}, "/out")
    assert levels(found) == ["error"] * 2 and "a does not see in /out what b wrote" in found[0].message
    assert only(check_output({"a": "", "b": ""}, {"a": [], "b": []}, "/out")).level == "ok"


def test_an_archive_that_is_another_one_there():
    found = only(check_archive({"a": "", "b": "x.mp4 is 'missing' there"}, "/videos", 4))
    assert found.level == "error" and "b sees /videos otherwise" in found.message
    assert only(check_archive({"a": ""}, "/videos", 4)).level == "ok"


def test_a_node_that_does_not_answer():
    found = only(check_answers({"a": "", "b": "ModuleNotFoundError: No module named 'jobs'"}))
    assert found.level == "error" and "'jobs'" in found.message and "--working-dir" in found.remedy
    assert only(check_answers({"a": ""})).level == "ok"


def test_this_machine_decodes():
    facts = examine()
    assert {"decord", "pyav"} <= set(facts.decoders) and not any(facts.decoders.values())
    assert facts.versions["python"] and facts.cuda == ""


def test_a_decoder_that_fails_gives_its_reason(monkeypatch):
    import pipelines.decode

    def broken(*arguments):
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(pipelines.decode.DECODERS, "decord", broken)
    decoders = examine().decoders
    assert (decoders["decord"], decoders["pyav"]) == ("RuntimeError: two lines", "")


def test_kernels_route_as_torch_does():
    import torch

    try_kernels("cuda" if torch.cuda.is_available() else "cpu")


def test_two_nodes_with_one_folder_read_each_other(tmp_path):
    with probe_folder(tmp_path) as folder:
        assert [write_mark(folder, node) for node in "ab"] == ["", ""]
        assert unread_marks(folder, ["a", "b"]) == []
        (folder / "b").write_text("something else")
        assert unread_marks(folder, ["a", "b", "c"]) == ["b", "c"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing", "file"])
def test_where_there_is_no_such_folder_none_is_made(tmp_path, place):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert write_mark(Path(tmp_path / place), "a") != ""
    assert sorted(tmp_path.rglob("*")) == before
