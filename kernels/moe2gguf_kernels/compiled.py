"""How functions are compiled for the CPU: once, kept beside their source, and without Python's lock while they run."""

import numba

compiled = numba.njit(
    nogil=True,
    cache=True,
    error_model="numpy",
    # all but what presumes that there are no infinities or NaN
    fastmath={"reassoc", "contract", "arcp", "nsz"},
)
