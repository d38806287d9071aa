"""A process that keeps the memory it has had: pages that are new cost more than all copies of what is in them."""

import contextlib
import ctypes
import functools

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_memory() -> None:
    """Let what this process frees be there for what it allocates next; where the C library is not glibc, nothing.

    By default glibc gives megabytes back to the system at once, and takes them as new pages, zeroed, for the next clip.
    """
    with contextlib.suppress(AttributeError, OSError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        c_library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
