"""Does the library in a folder work on this machine? Run as `python -m moe2gguf.runtime.smoke FOLDER`.

In a child process, since the failure to detect is an illegal instruction. Multiplies quantised matrices large enough
for every kernel, with the weights in each kind of buffer the CPU backend offers (plain, repacked, AMX), one token and
many, and prints what llama.cpp says of the machine. Exits 1 with a sentence on a wrong result, UNTESTABLE where a
driver the library needs is not installed.

    smoke FOLDER --gpus       the graphics cards too
    smoke FOLDER --devices    only print what there is, as JSON
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

from moe2gguf.runtime.process import UNTESTABLE

# N out features, K in features, T tokens. AMX takes N % 32 == 0, K-quants K % 256 == 0.
N, K = 512, 512
TOKENS = (1, 64)
_TYPES = {"q4_0": 2, "q8_0": 8, "q4_K": 12}  # enum ggml_type
_TYPE_F32 = 0
_DEVICE_TYPE_CPU, _DEVICE_TYPE_GPU, _DEVICE_TYPE_IGPU = range(3)  # enum ggml_backend_dev_type
_TOLERANCE = 0.15  # of a product's norm; 4-bit weights and 8-bit activations of normal noise stay below 0.11


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def load(folder: Path, name: str) -> ctypes.CDLL:
    """The shared library NAME ("ggml-base", "llama", ...) in FOLDER. Raises OSError when it is not there."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return ctypes.CDLL(str(folder / f"lib{name}{suffix}"), mode=ctypes.RTLD_GLOBAL)


def declare(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> None:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments


def open_ggml(folder: Path) -> tuple[ctypes.CDLL, ctypes.CDLL, ctypes.CDLL]:
    """libggml-base, libggml-cpu and libggml of FOLDER, with the functions used here declared.

    In this order, each before those that need it: in a wheel libX.so is a copy of the libX.so.0 they ask for, and
    the loader recognises it only if it is there already.
    """
    base, cpu = load(folder, "ggml-base"), load(folder, "ggml-cpu")
    for name in gpu_libraries(folder):
        load(folder, name)
    ggml = load(folder, "ggml")
    p, i64 = c_void_p, c_int64
    for name, result, *arguments in (
        ("ggml_init", p, InitParams),
        ("ggml_free", None, p),
        ("ggml_tensor_overhead", c_size_t),
        ("ggml_graph_overhead", c_size_t),
        ("ggml_new_tensor_2d", p, p, c_int, i64, i64),
        ("ggml_mul_mat", p, p, p, p),
        ("ggml_nbytes", c_size_t, p),
        ("ggml_new_graph", p, p),
        ("ggml_build_forward_expand", None, p, p),
        ("ggml_quantize_chunk", c_size_t, c_int, p, p, i64, i64, i64, p),
        ("ggml_backend_alloc_ctx_tensors_from_buft", p, p, p),
        ("ggml_backend_buffer_free", None, p),
        ("ggml_backend_buffer_set_usage", None, p, c_int),
        ("ggml_backend_buft_name", c_char_p, p),
        ("ggml_backend_tensor_set", None, p, p, c_size_t, c_size_t),
        ("ggml_backend_tensor_get", None, p, p, c_size_t, c_size_t),
        ("ggml_backend_dev_init", p, p, c_char_p),
        ("ggml_backend_dev_name", c_char_p, p),
        ("ggml_backend_dev_description", c_char_p, p),
        ("ggml_backend_dev_type", c_int, p),
        ("ggml_backend_dev_memory", None, p, POINTER(c_size_t), POINTER(c_size_t)),
        ("ggml_backend_dev_buffer_type", p, p),
        ("ggml_backend_dev_backend_reg", p, p),
        ("ggml_backend_reg_get_proc_address", p, p, c_char_p),
        ("ggml_backend_supports_op", c_bool, p, p),
        ("ggml_backend_graph_compute", c_int, p, p),
        ("ggml_mul_mat_id_ext", p, p, POINTER(p), c_int, p, p, p),
    ):
        declare(base, name, result, *arguments)
    declare(ggml, "ggml_backend_dev_by_type", p, c_int)
    declare(ggml, "ggml_backend_dev_count", c_size_t)
    declare(ggml, "ggml_backend_dev_get", p, c_size_t)
    return base, cpu, ggml


def gpu_libraries(folder: Path) -> list[str]:
    """The backends in FOLDER beside the CPU's: "ggml-cuda", ..."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    names = sorted(path.name.removeprefix("lib").removesuffix(suffix) for path in folder.glob(f"libggml-*{suffix}"))
    return [name for name in names if name not in ("ggml-base", "ggml-cpu")]


def devices(ggml: ctypes.CDLL) -> list[int]:
    return [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]


def print_devices(base: ctypes.CDLL, ggml: ctypes.CDLL) -> None:
    found = []
    for device in devices(ggml):
        free, total = c_size_t(), c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = (
            function(device).decode() for function in (base.ggml_backend_dev_name, base.ggml_backend_dev_description)
        )
        found.append({"name": name, "description": description, "memory_bytes": total.value})
    print(json.dumps(found))


def cpu_buffer_types(base: ctypes.CDLL, device: int) -> list[int]:
    """The CPU device's plain buffer type, then the ones that rearrange weights for faster kernels."""
    registry = base.ggml_backend_dev_backend_reg(device)
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    types = [base.ggml_backend_dev_buffer_type(device)]
    if address:
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        for pointer in extra:
            if pointer is None:  # the list ends with a null pointer
                break
            types.append(pointer)
    return types


def main(folder: Path, *flags: str) -> None:
    try:
        base, _, ggml = open_ggml(folder)
    except OSError as error:
        if "libcuda.so.1" not in str(error):
            raise
        print("NVIDIA's driver is not installed: there is no libcuda.so.1", file=sys.stderr)
        sys.exit(UNTESTABLE)
    if "--devices" in flags:
        print_devices(base, ggml)
        return

    cpu = ggml.ggml_backend_dev_by_type(_DEVICE_TYPE_CPU)
    _test_device(base, cpu, cpu_buffer_types(base, cpu))
    if "--gpus" in flags:
        for device in devices(ggml):
            if base.ggml_backend_dev_type(device) in (_DEVICE_TYPE_GPU, _DEVICE_TYPE_IGPU):
                _test_device(base, device, [base.ggml_backend_dev_buffer_type(device)])

    llama = load(folder, "llama")
    declare(llama, "llama_print_system_info", c_char_p)
    print(llama.llama_print_system_info().decode())


def _test_device(base: ctypes.CDLL, device: int, buffer_types: list[int]) -> None:
    backend = base.ggml_backend_dev_init(device, None)
    if backend is None:
        sys.exit(f"the device {base.ggml_backend_dev_name(device).decode()} cannot be opened")
    rng = np.random.default_rng(0)
    weight_NK = rng.standard_normal((N, K), dtype=np.float32)
    for type_name, ggml_type in _TYPES.items():
        for buffer_type in buffer_types:
            for n_tokens in TOKENS:
                x_TK = rng.standard_normal((n_tokens, K), dtype=np.float32)
                y_TN = _multiply(base, backend, device, buffer_type, ggml_type, weight_NK, x_TK)
                if y_TN is None:
                    continue  # no kernel for this type in this kind of buffer
                exact_TN = x_TK @ weight_NK.T
                error = np.linalg.norm(y_TN - exact_TN) / np.linalg.norm(exact_TN)
                kind = base.ggml_backend_buft_name(buffer_type).decode()
                if not error < _TOLERANCE:  # also catches NaN
                    sys.exit(f"{type_name} with {n_tokens} tokens in a {kind} buffer is off by {error:.0%}")
                print(f"{type_name} x {n_tokens} tokens in a {kind} buffer: error {error:.4f}")


def _multiply(
    base: ctypes.CDLL,
    backend: int,
    device: int,
    buffer_type: int,
    ggml_type: int,
    weight_NK: np.ndarray,
    x_TK: np.ndarray,
) -> np.ndarray | None:
    """f32 (T, N): x_TK times the quantised weight_NK, held in BUFFER_TYPE; None where the backend has no kernel."""
    context_bytes = 8 * base.ggml_tensor_overhead() + base.ggml_graph_overhead()
    weights, compute = (base.ggml_init(InitParams(context_bytes, None, True)) for _ in range(2))
    buffers = []
    try:
        w = base.ggml_new_tensor_2d(weights, ggml_type, K, N)
        buffers.append(base.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer_type))
        base.ggml_backend_buffer_set_usage(buffers[0], 1)  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
        x = base.ggml_new_tensor_2d(compute, _TYPE_F32, K, len(x_TK))
        y = base.ggml_mul_mat(compute, w, x)
        if not base.ggml_backend_supports_op(backend, y):
            return None
        plain = base.ggml_backend_dev_buffer_type(device)
        buffers.append(base.ggml_backend_alloc_ctx_tensors_from_buft(compute, plain))

        n_bytes = weight_NK.size * 2  # more than any of the types needs
        blocks = ctypes.create_string_buffer(n_bytes)
        n_bytes = base.ggml_quantize_chunk(ggml_type, weight_NK.ctypes.data, blocks, 0, N, K, None)
        base.ggml_backend_tensor_set(w, blocks, 0, n_bytes)
        base.ggml_backend_tensor_set(x, x_TK.ctypes.data, 0, x_TK.nbytes)
        graph = base.ggml_new_graph(compute)
        base.ggml_build_forward_expand(graph, y)
        if base.ggml_backend_graph_compute(backend, graph) != 0:
            sys.exit(f"{base.ggml_backend_dev_name(device).decode()} failed to compute a graph")
        y_TN = np.full((len(x_TK), N), np.nan, dtype=np.float32)
        base.ggml_backend_tensor_get(y, y_TN.ctypes.data, 0, y_TN.nbytes)
        return y_TN
    finally:
        for buffer in filter(None, buffers):
            base.ggml_backend_buffer_free(buffer)
        for context in (weights, compute):
            base.ggml_free(context)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
