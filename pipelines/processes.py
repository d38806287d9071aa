"""Processes for work that holds Python's lock."""

import multiprocessing
import os
from multiprocessing.pool import Pool

# Imported once, in the server that all others are forked from.
_PRELOADED = ["pipelines.synthetic_stream"]


def processes(num_chunks: int, count: int | None = None) -> Pool:
    """A pool of processes, one for each core unless a count is given, and no more than there are chunks of work.

    They are forked from a server which has imported torch: "spawn" would do so in each of them, for half a minute on a
    machine of many cores, and "fork" would copy the threads that torch has here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context.Pool(max(1, min(count or os.cpu_count() or 1, num_chunks)))
