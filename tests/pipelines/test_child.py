"""Whatever a call does to its process, the next one is served, and nothing is left behind."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines import waiting
from pipelines.child import Call, Killed, call, call_each, num_children
from pipelines.schema import Status

MEMORY_BYTES = 256 << 20


def task(function, *arguments, timeout_s: float = 60.0, memory_bytes: int = MEMORY_BYTES) -> Call:
    return Call(function, arguments, timeout_s, memory_bytes)


def hang_with_the_lock(marker: str = "") -> None:
    """Native code that never comes back and holds Python's lock: no signal handler, no other thread runs."""
    if marker:
        Path(marker).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)


def crash() -> None:
    ctypes.string_at(0)


def take_memory(num_bytes: int) -> int:
    return int(np.full(num_bytes, 1, np.uint8)[::4096].sum())


def take_memory_and_hang(num_bytes: int) -> None:
    held = np.full(num_bytes, 1, np.uint8)
    hang_with_the_lock()
    del held


def keep_memory(num_bytes: int) -> None:
    sys.modules[__name__].kept = np.full(num_bytes, 1, np.uint8)


def refuse(message: str) -> None:
    raise ValueError(message)


def slowly(number: int) -> int:
    time.sleep(0.2)
    return number


def wait_for_a_store(seconds: float) -> str:
    waiting.tell("s3://bucket: it is away")
    time.sleep(seconds)
    waiting.tell("")
    return "served"


def kept_bytes() -> int:
    return sys.modules[__name__].kept.nbytes


def killed(result: object) -> Killed:
    assert isinstance(result, Killed), result
    return result


def children() -> set[int]:
    """Processes whose parent is this one, dead ones that nobody has waited for among them."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
        except OSError:
            pass
    return found


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("size", [0, 1, 8 << 20, (8 << 20) + 1, 50_000_000])
def test_arrays_come_back_as_they_are(size):
    sent = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    twice = call(task(np.concatenate, [sent, sent]))
    np.testing.assert_array_equal(twice, np.concatenate([sent, sent]))
    twice[:1] += 1  # they are ours


def test_one_process_serves_many_calls():
    pids = [*call_each([task(os.getpid)] * 3), call(task(os.getpid))]
    assert len(set(pids)) == 1 and pids[0] != os.getpid()


def test_results_are_those_of_a_loop_whatever_happens_between_them():
    tasks = [task(abs, number) for number in range(6)]
    tasks[1], tasks[4] = task(crash), task(refuse, "no")
    first, second, *rest, fifth, last = call_each(tasks)
    assert (first, rest, last) == (0, [2, 3], 5)
    assert killed(second).status == Status.DECODE_ERROR and "SIGSEGV" in str(second)
    assert isinstance(fifth, ValueError) and str(fifth) == "no"


def test_what_a_call_raises_is_raised_here_and_tells_where():
    with pytest.raises(ValueError, match="no") as caught:
        call(task(refuse, "no"))
    assert "in refuse" in caught.value.__notes__[0]


@pytest.mark.parametrize("end, name", [(crash, "SIGSEGV"), (os.abort, "SIGABRT"), (os._exit, "exit status 3")])
def test_a_crash_is_a_failure_with_its_name(end, name):
    (result,) = call_each([task(end, *([3] if end is os._exit else []))])
    assert killed(result).status == Status.DECODE_ERROR and name in str(result)


def test_a_hang_ends_at_its_limit():
    started_s = time.monotonic()
    hung, fine = call_each([task(hang_with_the_lock, timeout_s=0.5), task(abs, -1)])
    assert killed(hung).status == Status.TIMEOUT and "0.5 s" in str(hung) and fine == 1
    assert 0.5 <= time.monotonic() - started_s < 60


def test_memory_ends_at_its_limit():
    filled, fine = call_each([task(take_memory_and_hang, 2 * MEMORY_BYTES), task(take_memory, MEMORY_BYTES // 4)])
    assert killed(filled).status == Status.UNSUPPORTED and "0.25 GiB" in str(filled) and fine > 0


def test_far_more_than_the_limit_cannot_be_allocated_at_all():
    refused, fine = call_each([task(take_memory, 100 * MEMORY_BYTES), task(take_memory, MEMORY_BYTES // 4)])
    assert isinstance(refused, MemoryError) and fine > 0


def test_what_a_call_leaves_allocated_does_not_count_for_the_next():
    pid = call(task(os.getpid))
    call(task(keep_memory, MEMORY_BYTES * 3 // 4))
    assert call(task(take_memory, MEMORY_BYTES // 2)) > 0
    assert call(task(os.getpid)) != pid


def test_results_that_nobody_takes_are_not_taken_for_others():
    results = call_each([task(slowly, number) for number in range(3)])
    assert next(results) == 0
    assert call(task(abs, -7)) == 7  # another call in between
    assert next(results) == 1
    results.close()
    assert call(task(abs, -8)) == 8


def test_no_process_and_no_descriptor_is_left():
    call(task(abs, 1))
    before = len(children()), num_descriptors()
    for end in (crash, os.abort, hang_with_the_lock) * 2:
        list(call_each([task(end, timeout_s=0.2), task(abs, 1)]))
    assert (len(children()), num_descriptors()) == before


def test_each_thread_has_a_process_that_ends_with_it():
    call(task(os.getpid))
    before, pids = children(), []
    threads = [threading.Thread(target=lambda: pids.append(call(task(os.getpid)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pids)) == 3 and children() == before


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent_however_busy_it_is(tmp_path, signal_):
    script = "import sys; from tests.pipelines.test_child import *; call(task(hang_with_the_lock, sys.argv[1]))"
    marker = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", script, str(marker)])
    wait_for(lambda: marker.exists() and marker.read_text())
    pid = int(marker.read_text())
    assert is_running(pid)
    parent.send_signal(signal_)
    parent.wait()
    wait_for(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    "num_files, most, expected", [(0, 64, 1), (1, 64, 1), (5, 64, 2), (70, 64, 18), (1000, 64, 64)]
)
def test_a_child_is_started_for_several_files(num_files, most, expected):
    assert num_children(num_files, most) == expected


def test_waiting_for_a_store_is_passed_on_and_does_not_count():
    said: list[str] = []
    with waiting.told(said.append):
        assert call(task(wait_for_a_store, 1.0, timeout_s=0.5)) == "served"
    assert {*said} == {"s3://bucket: it is away", ""} and said[-1] == ""


def test_what_a_child_does_first_counts_against_no_call():
    first = task(keep_memory, 300 << 20, memory_bytes=1 << 30)

    def calls() -> list:
        return [
            *call_each([task(kept_bytes), task(take_memory, 10 << 20)], first),
            *call_each([task(kept_bytes)], first),
        ]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(calls).result() == [300 << 20, 10 << 8, 300 << 20]
        (result,) = thread.submit(lambda: [*call_each([task(take_memory_and_hang, 400 << 20)], first)]).result()
        assert killed(result).status == Status.UNSUPPORTED
        assert thread.submit(lambda: call(task(kept_bytes), first)).result() == 300 << 20


def test_a_child_that_does_not_survive_its_start_is_replaced():
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: call(task(slowly, 3), task(crash))).result() == 3


def remember(name: str) -> int:
    sys.modules[__name__].__dict__.setdefault("starts", []).append(name)
    return os.getpid()


def remembered() -> list[str]:
    return sys.modules[__name__].__dict__.get("starts", [])


def test_a_child_that_was_started_for_something_else_is_replaced():
    asked, one, other = task(remembered), task(remember, "one"), task(remember, "other")
    with ThreadPoolExecutor(1) as thread:
        answers = [
            thread.submit(lambda first=first: call(asked, first)).result() for first in (None, one, None, other, other)
        ]
    # Whoever wants no start takes what is there.
    assert answers == [[], ["one"], ["one"], ["other"], ["other"]]


def niceness() -> int:
    return os.nice(0)


def test_a_child_gives_way_to_who_hands_out_work():
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(call, task(niceness)).result() == min(19, os.nice(0) + 10)
