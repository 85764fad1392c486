"""How the C library treats freed memory in a training process on a CPU."""

import ctypes
import platform

# numbers of <malloc.h>
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the rest of the process; False where the C library is another one.

    It hands blocks above 32 MB back to the system when they are freed, and every page of the next one is then faulted in
    and zeroed again: for activations, several times per layer and step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
