"""llama.cpp's C interface through llama-cpp-python, as far as measuring and sampling need it."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe2gguf.errors import Moe2ggufError, RuntimeMissing

ALL_GPUS = -1


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """Handles of a memory-mapped model and one context on it; `lib` is the llama_cpp module."""

    lib: Any
    model: Any
    context: Any
    vocab: Any

    @property
    def n_vocab(self) -> int:
        return self.lib.llama_vocab_n_tokens(self.vocab)

    def forget(self) -> None:
        """Empties the key-value cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def skipped_share(self) -> float | None:
        """Of the expert activations so far, the mean of the layers with experts; None where llama.cpp was not told to
        count them: with LLAMA_EXPERT_SKIP_COUNT in the environment."""
        slots = getattr(self.lib.llama_cpp._lib, "llama_perf_expert_slots", None)
        if slots is None:
            return None
        slots.restype = ctypes.c_bool
        slots.argtypes = [ctypes.c_void_p, ctypes.c_int32, *[ctypes.POINTER(ctypes.c_uint64)] * 2]
        shares = []
        for layer in range(self.lib.llama_model_n_layer(self.model)):
            computed, skipped = ctypes.c_uint64(), ctypes.c_uint64()
            if slots(self.context, layer, computed, skipped) and computed.value + skipped.value:
                shares.append(skipped.value / (computed.value + skipped.value))
        return sum(shares) / len(shares) if shares else None


def available_cores() -> int:
    """Those this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Of this computer, or what this process may use of it: in a container, or a job of a cluster."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _limits(membership: Path, mount: Path) -> Iterator[int]:
    """Of memory, by the control groups that a process is in and those above them: lines "ID:CONTROLLERS:PATH", of
    version 2 with ID 0 and without controllers."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, name = (mount / "memory", "memory.limit_in_bytes") if controllers else (mount, "memory.max")
            group = root / path.lstrip("/")
            # in a container the path may be the host's, of which only the root is there
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):
                    yield int((folder / name).read_text())
                if folder == root:
                    break


@contextmanager
def open_model(
    path: Path,
    errors: list[str],
    *,
    sequence_tokens: int,
    n_batch: int,
    n_sequences: int,
    n_threads: int,
    gpu: int | None = ALL_GPUS,
    observe: Any = None,
) -> Iterator[OpenModel]:
    """errors is what captured_log yields, observe a ggml_backend_sched_eval_callback. gpu: the number of the one to
    use, where the library can; if its memory does not hold the file, or with None, the CPU.

    Raises Moe2ggufError with llama.cpp's reason if the file does not load.
    """
    llama_cpp = _import_llama_cpp()
    if not path.is_file():
        raise Moe2ggufError(f"{path} is not there; a GGUF file is needed")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = sequence_tokens * n_sequences
    params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = n_sequences
    if observe is not None:
        params.cb_eval = observe
    params.n_threads = params.n_threads_batch = n_threads
    params.no_perf = True
    model_params = llama_cpp.llama_model_default_params()
    if gpu is not None and gpu != ALL_GPUS:
        model_params.split_mode, model_params.main_gpu = llama_cpp.LLAMA_SPLIT_MODE_NONE, gpu
    on_gpu = gpu is not None and llama_cpp.llama_supports_gpu_offload()
    for model_params.n_gpu_layers in (-1, 0) if on_gpu else (0,):
        errors.clear()
        what = f"load {path}"
        if not (model := llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)):
            continue
        what = f"open a context of {params.n_ctx} tokens on {path}"
        if context := llama_cpp.llama_init_from_model(model, params):
            break
        llama_cpp.llama_model_free(model)
    else:
        raise Moe2ggufError(f"llama.cpp cannot {what}: {_reason(errors)}")
    try:
        yield OpenModel(llama_cpp, model, context, llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """llama.cpp's error lines, in a list instead of on the terminal; its other lines are dropped."""
    llama_cpp = _import_llama_cpp()
    from llama_cpp._logger import llama_log_callback

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def _reason(errors: list[str]) -> str:
    # the first line is the cause, the rest is callers repeating that they failed
    reason = errors[0].strip() if errors else "it gives no reason"
    if "+grouped'" in reason:
        reason += "; grouped files need the patched runtime, run `moe2gguf runtime install`"
    return reason


def _import_llama_cpp() -> Any:
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise RuntimeMissing("llama-cpp-python is not installed; run `moe2gguf runtime install`") from None
    return llama_cpp
