"""What a server's process does with memory that it frees."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""See mallopt(3)."""
KEPT_BYTES = 1 << 30
LARGE_BYTES = 32 << 20
"""Arrays of this size are given back at once: tables, not messages."""


def keep_freed() -> None:
    """Let the memory of messages be used again, instead of given back and asked for again.

    Each message of a push or pull is megabytes that live for milliseconds. By default glibc gives
    much of it back to the kernel, which has to clear every page of the next one. One arena for all
    threads, because those that free are not those that allocate. Other C libraries decide for
    themselves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
