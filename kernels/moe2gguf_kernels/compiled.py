"""How functions are compiled for the CPU: once, kept beside their source, and without Python's lock while they run."""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core.compiler import Compiler
from numba.extending import intrinsic


class _Unaliased(Compiler):
    """Nothing that is written through one argument is read or written through another."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, result: Any, flags: Any, locals: Any):
        flags.noalias = True
        super().__init__(typing, target, library, args, result, flags, locals)


def compiled(function: Callable) -> Callable:
    return _compiled(function, Compiler)


def unaliased(function: Callable) -> Callable:
    """As compiled, for functions whose loops over rows are so short that to look for overlaps takes as long as they do.

    What is written through one argument must not be read or written through another.
    """
    return _compiled(function, _Unaliased)


def _compiled(function: Callable, pipeline: type[Compiler]) -> Callable:
    def dispatcher(cache: bool) -> Callable:
        # fast math is all but what presumes that there are no infinities or NaN
        fast = {"reassoc", "contract", "arcp", "nsz"}
        return numba.njit(nogil=True, cache=cache, error_model="numpy", fastmath=fast, pipeline_class=pipeline)(
            function
        )

    try:
        return dispatcher(cache=True)
    except RuntimeError:  # neither the package's folder nor the user's can be written: some seconds each time
        return dispatcher(cache=False)


def _reinterpreted(signature: Any, llvm_type: ir.Type) -> tuple[Any, Callable]:
    def code(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return builder.bitcast(arguments[0], llvm_type)

    return signature, code


def _as_int(_typing: Any, _x: Any) -> Any:
    return _reinterpreted(numba.int32(numba.float32), ir.IntType(32))


def _as_float(_typing: Any, _bits: Any) -> Any:
    return _reinterpreted(numba.float32(numba.int32), ir.FloatType())


# the bits of an f32 as an i32, and back
as_int: Callable[[Any], Any] = intrinsic(_as_int)
as_float: Callable[[Any], Any] = intrinsic(_as_float)
