"""The heap of a CPU rank: what a step frees stays with the process, for the next step to take.

glibc hands large freed blocks back to the kernel, and asks for them anew in the next step; each page of them is then
mapped and zeroed again, which took a tenth of a small model's step. As much as a step needs may stay. Larger blocks and
what is free beyond that, still go back. On a GPU torch's caching allocator does the same.
"""

from __future__ import annotations

import ctypes
import os
import threading

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # `mallopt` in glibc's malloc.h
_MOST = 2**31 - 1  # it takes an int
_lock = threading.Lock()
_kept_bytes = 2**26  # to which glibc raises them by itself


def keep_freed(step_bytes: int) -> bool:
    """Lets this process keep up to `step_bytes` of freed memory; says whether it does.

    It does not where the C library has no such setting, or its user set it: `MALLOC_TRIM_THRESHOLD_` and the like.
    """
    global _kept_bytes
    with _lock:
        if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
            return False
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "gnu_get_libc_version"):
            return False
        _kept_bytes = max(_kept_bytes, min(step_bytes, _MOST))
        return bool(libc.mallopt(_TRIM_THRESHOLD, _kept_bytes) and libc.mallopt(_MMAP_THRESHOLD, _kept_bytes))
