"""One thread, and an allocator that keeps large blocks: for every side of a benchmark alike.

By default glibc gives large tensors back to the system and gets them again, zeroed page by page;
with its thresholds raised they are reused. That alone makes transformers' own loop faster, so it is
set for the whole process.
"""

import ctypes
import sys

from fedoppu.simulations.benchmarks.bench import one_thread

# of malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
THRESHOLD = 1 << 30


def even_settings() -> str:
    """Sets threads and allocator for the whole process, and says in a line what holds."""
    one_thread()
    import torch  # after the threads are set

    torch.set_num_threads(1)
    kept = _keep_large_blocks()
    how = f"mmap and trim thresholds {THRESHOLD >> 20} MiB" if kept else "as it comes"
    return f"all sides: {torch.get_num_threads()} thread, malloc {how}"


def _keep_large_blocks() -> bool:
    """Whether the C library took both thresholds; only glibc has them."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    try:
        mallopt = library.mallopt
    except AttributeError:
        return False
    return all(mallopt(name, THRESHOLD) for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
