"""What runs ask for: the choice of the device, and that whatever runs hold, every node that decodes can go on."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.placement import Node, Wanted, place, task_memory

GIB = 2**30
HEAD = Node(0, 0, 8 * GIB)
CPUS = Node(32, 0, 64 * GIB)
GPU = Node(8, 1, 32 * GIB)


@pytest.mark.parametrize(
    ("wanted", "nodes", "device", "least", "most"),
    [
        (Wanted(), [HEAD, CPUS], "cpu", 1, 16),
        (Wanted(), [HEAD, CPUS, GPU], "cuda", 1, None),
        (Wanted(device="cpu"), [HEAD, CPUS, GPU], "cpu", 1, 20),
        (Wanted(device="cuda"), [HEAD], "cuda", 1, None),
        (Wanted(device="cuda", workers=(2, 3)), [HEAD], "cuda", 2, 3),
        (Wanted(workers=(2, 3)), [HEAD, CPUS], "cpu", 2, 3),
        (Wanted(gpus=0.25), [HEAD, GPU, GPU], "cuda", 1, 2),  # one for each, so that others get their shares
        (Wanted(gpus=0.25, workers=(1, 8)), [HEAD, GPU, GPU], "cuda", 1, 8),
        (Wanted(), [Node(1, 0, GIB)], "cpu", 1, 1),
    ],
)
def test_the_device_and_the_number_of_processes(wanted, nodes, device, least, most):
    placement = place(wanted, nodes)
    assert (placement.device, placement.least, placement.most) == (device, least, most)
    assert placement.gpus == (wanted.gpus if device == "cuda" else 0)


def test_the_reason_is_a_line_that_says_what_can_be_done():
    assert place(Wanted(), [CPUS]).reason == "1 to 16 processes on CPUs: no GPU is up; --device cuda waits for one"
    assert place(Wanted(), [GPU, GPU]).reason == "a process for each GPU on GPUs, 1 each, 2 up"
    waits = "2 processes on GPUs, 1 each, 1 up; waits for more"
    assert place(Wanted(device="cuda", workers=(2, 2)), [GPU]).reason == waits


nodes = st.lists(
    st.builds(Node, st.integers(1, 64), st.integers(0, 8), st.just(8 * GIB)),
    min_size=1,
    max_size=5,
)


@given(nodes, st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.integers(1, 90))
def test_beside_all_processes_that_fit_a_task_of_one_cpu_fits_on_each_node(nodes, gpus, runs):
    """On GPUs as many as there are shares; on CPUs those that every run has at least."""
    with_gpus = [node for node in nodes if node.gpus]
    for node in with_gpus:
        held = node.gpus // gpus * place(Wanted(device="cuda", gpus=gpus), nodes).cpus
        assert held + 1 <= node.cpus or node.cpus < 2 <= max(node.cpus for node in nodes)
    largest = max(nodes, key=lambda node: node.cpus)
    assert runs * place(Wanted(device="cpu"), nodes).cpus + 1 <= largest.cpus


def test_nothing_computes_on_a_head_that_offers_no_cpu():
    for wanted in (Wanted(), Wanted(device="cuda")):
        for up in ([HEAD], [HEAD, CPUS], [HEAD, GPU]):
            placement = place(wanted, up)
            assert placement.cpus > 0 and placement.write_cpus > 0


@pytest.mark.parametrize("workers", [(0, 1), (2, 1), (1, -1)])
def test_impossible_numbers_of_processes_are_refused(workers):
    with pytest.raises(ValueError, match="model processes"):
        Wanted(workers=workers)


@pytest.mark.parametrize("gpus", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_impossible_shares_are_refused(gpus):
    with pytest.raises(ValueError, match="GPUs for each"):
        Wanted(gpus=gpus)


def test_a_task_asks_for_no_more_memory_than_a_node_that_computes_has():
    small = dataclasses.replace(CPUS, memory_bytes=GIB // 2)
    assert task_memory(GIB, [HEAD, CPUS]) == GIB
    assert task_memory(GIB, [HEAD, small]) == GIB // 2
    assert task_memory(GIB, [HEAD]) == GIB  # what will come is not known
