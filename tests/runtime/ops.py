"""MUL_MAT_ID and MUL_MAT_ID_GRP of the installed library, called through ctypes."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass

import gguf
import numpy as np

from moe2gguf.runtime import find_runtime
from moe2gguf.runtime.smoke import InitParams, cpu_buffer_types, declare, open_ggml

# E experts, N out features, K in features, T tokens, U experts used per token
Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Group:
    """Experts of one type: quantised bytes, rows along K."""

    type: Type
    blocks: np.ndarray  # uint8, (E, N, bytes per row)


class Ops:
    def __init__(self) -> None:
        folder = find_runtime().libraries
        self.base, self.cpu, ggml = open_ggml(folder)
        p, i64 = c_void_p, c_int64
        for name, result, *arguments in (
            ("ggml_new_tensor_3d", p, p, c_int, i64, i64, i64),
            ("ggml_mul_mat_id", p, p, p, p, p),
            ("ggml_op_desc", c_char_p, p),
            ("ggml_prec_set_src", c_bool, p, c_int, c_int),
            ("ggml_prec_set_acc", c_bool, p, c_int),
            ("ggml_quantize_requires_imatrix", c_bool, c_int),
        ):
            declare(self.base, name, result, *arguments)
        declare(self.cpu, "ggml_backend_cpu_set_n_threads", None, p, c_int)
        self.device = ggml.ggml_backend_dev_by_type(0)
        self.backend = self.base.ggml_backend_dev_init(self.device, None)
        self.buffer_types = {
            self.base.ggml_backend_buft_name(kind).decode(): kind for kind in cpu_buffer_types(self.base, self.device)
        }

    def quantize(self, type: Type, weight_ENK: np.ndarray) -> Group:
        e, n, k = weight_ENK.shape
        weight_ENK = np.ascontiguousarray(weight_ENK, dtype=np.float32)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[type]
        blocks = np.full((e, n, k // block_size * block_bytes), 0x5A, dtype=np.uint8)
        ones_K = np.ones(k, dtype=np.float32)  # importance: some IQ types want one
        written = self.base.ggml_quantize_chunk(
            type, weight_ENK.ctypes.data, blocks.ctypes.data, 0, e * n, k, ones_K.ctypes.data
        )
        assert written == blocks.nbytes
        return Group(type, blocks)

    def mul_mat_id(
        self,
        groups: Sequence[Group],
        x_TUK: np.ndarray,
        ids_TU: np.ndarray,
        weights_TU: np.ndarray | None = None,
        *,
        repack: bool = False,
        n_threads: int = 2,
        upstream: bool = False,
    ) -> np.ndarray:
        """f32 (T, U, N): one expert per slot. x_TUK may have one row per token, shared by its slots.

        With REPACK, each group goes to a repacked buffer if the backend has a kernel for it there, as the model
        loader decides. With UPSTREAM, ggml_mul_mat_id makes the node, which takes one group and no weights. The
        output starts as NaN.
        """
        base = self.base
        overhead = 32 * base.ggml_tensor_overhead() + base.ggml_graph_overhead()
        contexts, buffers = [], []

        def new_context() -> int:
            contexts.append(base.ggml_init(InitParams(overhead, None, True)))
            return contexts[-1]

        def allocate(context: int, buffer_type: int) -> None:
            buffers.append(base.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type))

        plain = base.ggml_backend_dev_buffer_type(self.device)
        try:
            compute = new_context()
            t, u_x, k = x_TUK.shape
            x = base.ggml_new_tensor_3d(compute, Type.F32, k, u_x, t)
            ids = base.ggml_new_tensor_2d(compute, Type.I32, ids_TU.shape[1], t)
            weights = None
            if weights_TU is not None:
                weights = base.ggml_new_tensor_3d(compute, Type.F32, 1, ids_TU.shape[1], t)
            tensors = []
            for group in groups:
                e, n, _ = group.blocks.shape
                for kind in [self.buffer_types["CPU_REPACK"]] * repack + [plain]:
                    context = new_context()
                    tensor = base.ggml_new_tensor_3d(context, group.type, k, n, e)
                    allocate(context, kind)
                    if base.ggml_backend_supports_op(self.backend, base.ggml_mul_mat_id(new_context(), tensor, x, ids)):
                        break
                base.ggml_backend_tensor_set(tensor, group.blocks.ctypes.data, 0, group.blocks.nbytes)
                tensors.append(tensor)
            if upstream:
                assert len(tensors) == 1 and weights is None
                y = base.ggml_mul_mat_id(compute, tensors[0], x, ids)
            else:
                tensors_c = (c_void_p * len(tensors))(*tensors)
                y = base.ggml_mul_mat_id_ext(compute, tensors_c, len(tensors), x, ids, weights)
            self.op_name = base.ggml_op_desc(y).decode()
            assert base.ggml_backend_supports_op(self.backend, y)
            graph = base.ggml_new_graph(compute)
            base.ggml_build_forward_expand(graph, y)
            allocate(compute, plain)
            y_TUN = np.full((t, ids_TU.shape[1], n), np.nan, dtype=np.float32)
            for tensor, array in ((x, x_TUK), (ids, ids_TU), (weights, weights_TU), (y, y_TUN)):
                if array is not None:
                    array = np.ascontiguousarray(array)
                    base.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
            self.cpu.ggml_backend_cpu_set_n_threads(self.backend, n_threads)
            assert base.ggml_backend_graph_compute(self.backend, graph) == 0
            base.ggml_backend_tensor_get(y, y_TUN.ctypes.data, 0, y_TUN.nbytes)
            return y_TUN
        finally:
            for buffer in buffers:
                base.ggml_backend_buffer_free(buffer)
            for context in contexts:
                base.ggml_free(context)
