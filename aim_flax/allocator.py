"""Memory that is given back and asked for again by each call of a compiled program on CPU.

XLA asks the C library for the buffers of each call anew. glibc gives large ones back to the system
as soon as they are free, so that all their pages have to be cleared and mapped again at the next
call. Here it is told to keep them; and, where the system lends them on request, to lie on huge
pages, of which a call needs few. (man 3 mallopt, man 2 madvise.)
"""

import contextlib
import ctypes
import mmap
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_HUGE_PAGE = 2 << 20


def keep_memory() -> bool:
    """Makes the C library keep the memory that this process frees, on huge pages where it can.

    Nothing is taken that was not asked for, but the process stays as large as it once was. Nothing
    is done with other C libraries than glibc, nor where GLIBC_TUNABLES sets any of malloc's. Must
    be called before JAX starts its threads: all of them then share one arena, for the others can't
    hold large buffers.

    Returns:
      Whether it does.
    """
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    kept = all(library.mallopt(*option) for option in options.items())
    if kept:
        with contextlib.suppress(OSError, ValueError):
            _ask_for_huge_pages(library, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)
    return kept


def _ask_for_huge_pages(library: ctypes.CDLL, size: int) -> None:
    """Reserves addresses for `size` bytes behind what the process has, and frees them at once.

    They stay with malloc, without memory behind them until they are used.
    """
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = library.malloc(size)
    if start is None:
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    length = (start + size - first) // _HUGE_PAGE * _HUGE_PAGE
    library.madvise(first, length, mmap.MADV_HUGEPAGE)
    library.free(start)
