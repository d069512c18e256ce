"""A numba that compiles nothing: vLLM 0.32 for CPUs does not start once the real one is imported.

It reads `vars(value).get` of every object in every module, and one of llvmlite has no dictionary there. Kimi K2.5's
processor of images is compiled by numba; text alone does not call it.
"""

from typing import Any


def njit(*given: Any, **options: Any) -> Any:
    """The function itself."""
    return given[0] if given else lambda function: function


jit, prange = njit, range


def get_num_threads() -> int:
    return 1


def set_num_threads(count: int) -> None:
    pass
