"""Heap settings of a training process: freed memory is kept for the next step."""

import contextlib
import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MADV_HUGEPAGE = 14  # sys/mman.h
LARGEST_HUGE_PAGE = 2 << 20  # some ARM systems have pages of 512 MB, far more than a step takes
HEAP_BLOCKS, HEAP_BLOCK = 64, 31 << 20  # the heap grows by 64 blocks of 31 MB, about 2 GB


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed, and Linux back the next 2 GB of the heap by huge pages.

    A training step takes and frees hundreds of megabytes. With pages of 4 kB handed back each time, the first epoch
    had 300,000 page faults. Does nothing with another C library. For programs only: it changes the whole process.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as file:
            page = int(file.read())
        if page <= LARGEST_HUGE_PAGE:
            _advise_huge_pages(libc, page)


def _advise_huge_pages(libc: ctypes.CDLL, page: int) -> None:
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    begin = -(-libc.sbrk(0) // page) * page
    blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(HEAP_BLOCK))) for _ in range(HEAP_BLOCKS)]
    size = libc.sbrk(0) - begin
    if size > 0:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)
