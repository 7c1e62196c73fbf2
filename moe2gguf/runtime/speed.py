"""How long a layer's experts take for one token, by type. Run as `python -m moe2gguf.runtime.speed`.

In a child process, so that its memory and its threads go with it. Reads the question from stdin as JSON and prints a
line of JSON whenever all types had a turn: seconds of one expert's matrix, by type.

MUL_MAT_ID by the installed library's own kernels, weights rearranged for faster ones wherever its loader does that.
Types take turns, forwards and backwards, and each finds the caches full of the others, as weights that do not fit into
them are found when decoding; a model that does fit is measured as it would be then, the second time over.

Shapes: L layers, E experts, K selected of them by a token, N rows, D columns.
"""

from __future__ import annotations

import json
import sys
import time
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as QuantType

from moe2gguf import ggml
from moe2gguf.runtime.smoke import InitParams, cpu_buffer_types, declare, open_ggml

# kernels take as long whatever the weights are: of rows so many are drawn, and repeated
N_DRAWN = 256
# of one turn where all fits into the caches
TURN_SECONDS = 0.01
_TYPE_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


class _Experts:
    """The matrices of all layers at one type, and the graph that multiplies every one of them with a vector."""

    def __init__(self, library: _Library, quant_type: QuantType, shape: tuple[int, int, int, int], n_selected: int):
        n_layers, n_experts, n_rows, n_columns = shape
        self.n_matrices = n_layers * (n_experts // n_selected) * n_selected
        self._library, base = library, library.base
        context, compute = library.context(n_layers), library.context((n_layers + 1) * n_experts)
        x = base.ggml_new_tensor_3d(compute, QuantType.F32, n_columns, 1, 1)
        deck = np.random.default_rng(0).permutation(n_experts).astype(np.int32)
        hands = [deck[first : first + n_selected] for first in range(0, n_experts - n_selected + 1, n_selected)]
        ids = [base.ggml_new_tensor_2d(compute, QuantType.I32, n_selected, 1) for _ in hands]
        weights = [base.ggml_new_tensor_3d(context, quant_type, n_columns, n_rows, n_experts) for _ in range(n_layers)]
        library.allocate(context, library.buffer_type(quant_type, n_rows, n_columns, x, ids[0]))
        rng = np.random.default_rng(0)
        rows_RB = rng.integers(0, 256, (N_DRAWN, ggml.row_bytes(quant_type, n_columns)), np.uint8)
        blocks_RB = np.resize(rows_RB, (n_experts * n_rows, rows_RB.shape[1]))
        for tensor in weights:
            base.ggml_backend_tensor_set(tensor, blocks_RB.ctypes.data, 0, blocks_RB.nbytes)
        self._graph = base.ggml_new_graph(compute)
        for hand in ids:
            for tensor in weights:
                base.ggml_build_forward_expand(self._graph, base.ggml_mul_mat_id(compute, tensor, x, hand))
        library.allocate(compute, library.plain)
        x_D = rng.standard_normal(n_columns, np.float32)
        base.ggml_backend_tensor_set(x, x_D.ctypes.data, 0, x_D.nbytes)
        for tensor, experts in zip(ids, hands, strict=True):
            base.ggml_backend_tensor_set(tensor, experts.ctypes.data, 0, experts.nbytes)

    def seconds(self, *, in_cache: bool) -> float:
        """Of one matrix, the least that was seen: what else runs on the machine only ever adds to it."""
        found: list[float] = []
        while not found or (in_cache and sum(found) < TURN_SECONDS):
            start = time.perf_counter()
            self._library.base.ggml_backend_graph_compute(self._library.backend, self._graph)
            found.append(time.perf_counter() - start)
        return min(found) / self.n_matrices


class _Library:
    """The CPU backend."""

    def __init__(self, folder: Path, n_threads: int):
        self.base, cpu, registry = open_ggml(folder)
        for name, result, *arguments in (
            ("ggml_new_tensor_3d", c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64),
            ("ggml_mul_mat_id", c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        ):
            declare(self.base, name, result, *arguments)
        declare(cpu, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)
        device = registry.ggml_backend_dev_by_type(_TYPE_CPU)
        self.backend = self.base.ggml_backend_dev_init(device, None)
        self.plain, *self._rearranging = cpu_buffer_types(self.base, device)
        cpu.ggml_backend_cpu_set_n_threads(self.backend, n_threads)

    def context(self, n_tensors: int) -> int:
        overhead = (n_tensors + 8) * self.base.ggml_tensor_overhead() + self.base.ggml_graph_overhead()
        return self.base.ggml_init(InitParams(overhead, None, True))

    def allocate(self, context: int, buffer_type: int) -> int:
        return self.base.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)

    def buffer_type(self, quant_type: QuantType, n_rows: int, n_columns: int, x: int, ids: int) -> int:
        """The first that has a kernel, as llama.cpp's loader chooses."""
        for kind in self._rearranging:
            context = self.context(2)
            two_experts = self.base.ggml_new_tensor_3d(context, quant_type, n_columns, n_rows, 2)
            buffer = self.allocate(context, kind)
            product = self.base.ggml_mul_mat_id(context, two_experts, x, ids)
            supported = self.base.ggml_backend_supports_op(self.backend, product)
            self.base.ggml_backend_buffer_free(buffer)
            self.base.ggml_free(context)
            if supported:
                return kind
        return self.plain


def main() -> None:
    question = json.loads(sys.stdin.read())
    library = _Library(Path(question["libraries"]), question["n_threads"])
    shape = tuple(question[name] for name in ("n_layers", "n_experts", "n_rows", "n_columns"))
    experts = {
        name: _Experts(library, QuantType[name], shape, question["n_selected"])  # type: ignore[arg-type]
        for name in question["types"]
    }
    for number in range(question["n_rounds"]):
        turns = list(experts.items())[:: -1 if number % 2 else 1]
        print(json.dumps({name: e.seconds(in_cache=question["in_cache"]) for name, e in turns}), flush=True)


if __name__ == "__main__":
    main()
