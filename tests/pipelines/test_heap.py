"""Memory that a process has had is there for what it does next."""

import os
import subprocess
import sys

import pytest

_PAGES = 8 << 20 >> 12
_SECOND_TIME = f"""
import resource, sys
from pipelines.heap import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * ({_PAGES} << 12)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="a setting of glibc")
def test_what_was_freed_needs_no_new_pages() -> None:
    assert _new_pages("kept") < _PAGES // 8
    assert _new_pages("given back") > _PAGES // 2


def _new_pages(how: str) -> int:
    """Page faults of eight megabytes that are allocated after as many were freed."""
    done = subprocess.run([sys.executable, "-c", _SECOND_TIME, how], capture_output=True, text=True, check=True)
    return int(done.stdout)
