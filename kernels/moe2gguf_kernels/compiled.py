"""How functions are compiled for the CPU: once, kept beside their source, and without Python's lock while they run."""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    def dispatcher(cache: bool) -> Callable:
        # fast math is all but what presumes that there are no infinities or NaN
        fast = {"reassoc", "contract", "arcp", "nsz"}
        return numba.njit(nogil=True, cache=cache, error_model="numpy", fastmath=fast)(function)

    try:
        return dispatcher(cache=True)
    except RuntimeError:  # neither the package's folder nor the user's can be written: some seconds each time
        return dispatcher(cache=False)
