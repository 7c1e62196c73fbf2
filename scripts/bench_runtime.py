"""Speed of the patched runtime on expert shapes of real models with random weights: `make bench-runtime`.

Every measurement runs in a child process that has one model open; children of one comparison take turns, forwards and
backwards, so that a ratio is made of neighbours in time. A ratio is the median over the rounds. The router's inputs are
made so that each token's experts are drawn at random, each as likely as any other, and the ratio of a slot's weight to
its token's largest is spread evenly over (0, 1): a threshold t skips t * (k - 1) / k of k slots.

What is compared:

    groups    a layer's experts in three types. Expected time = sum over types of (share of the expert weights in that
              type) * (time of the file that has only that type); ratio = expected / measured. The line below gives the
              plain reading: tokens/s over the three files' tokens/s averaged with their bytes as weights.
    ordinary  a file of one type: this library over one without our patches, built here from the same sources with the
              same options (or --unpatched).
    skip      time with nothing skipped over the time with 0, 15, 30, 50 % of the activations skipped; "saved" is the
              share of the time that this saves, over the share of the expert bytes not read.
    load      time to load a file of three types per layer, one type per tensor, over that of the grouped file.

Bound: memory bandwidth, measured by threads that sum arrays, over the bytes of the weights a token needs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click
import gguf
import numpy as np

from moe2gguf import ggml
from moe2gguf.errors import RuntimeMissing
from moe2gguf.ggml import QuantType
from moe2gguf.runtime import find_runtime
from moe2gguf.runtime.build import cache_folder, load_build, with_build_tools
from moe2gguf.runtime.process import run_logged
from moe2gguf.runtime.toolchain import find_toolchain
from moe2gguf.runtime.upstream import fetch_sdist, read_upstream, unpack

N_PROMPT = 512  # tokens of a prompt, and of the vocabulary: token v has its own experts
HEAD_DIM, N_HEAD = 64, 2
SKIPPED = (0.0, 0.15, 0.30, 0.50)
SECTIONS = ("groups", "ordinary", "skip", "load")


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    n_embd: int
    n_ff: int
    n_expert: int
    n_used: int
    n_layer: int
    n_decode: int  # tokens decoded in one measurement


QWEN = Shape("Q", 2048, 768, 128, 8, n_layer=2, n_decode=64)  # Qwen3-30B-A3B
MIXTRAL = Shape("M", 4096, 14336, 8, 2, n_layer=1, n_decode=32)  # Mixtral-8x7B

K_TYPES = (QuantType.Q2_K, QuantType.Q3_K, QuantType.Q4_K)  # two of them have repacked kernels on x86
I_TYPES = (QuantType.IQ2_S, QuantType.IQ3_S, QuantType.IQ4_XS)  # none has

PROJECTIONS = ("gate", "up", "down")

# ---- model files


@dataclasses.dataclass(frozen=True)
class ModelFile:
    path: Path
    expert_bytes: int  # of all experts
    token_bytes: int  # of the weights that one token needs


def group_sizes(n_expert: int, n_groups: int) -> list[int]:
    bounds = [round(n_expert * i / n_groups) for i in range(n_groups + 1)]
    return [b - a for a, b in itertools.pairwise(bounds)]


def routed_embeddings(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """f32 (V, K): the first n_expert columns are the router's logits, the rest noise that makes the mean square 1."""
    embedding_VK = np.zeros((N_PROMPT, shape.n_embd), np.float32)
    embedding_VK[:, : shape.n_expert] = -2
    ratio = 0.5
    for token_K in embedding_VK:
        top, *others = rng.permutation(shape.n_expert)[: shape.n_used]
        token_K[top] = 3
        for expert in others:
            ratio = (ratio + 0.6180339887) % 1  # golden section: evenly spread over any stretch of tokens
            token_K[expert] = 3 + np.log(0.02 + 0.96 * ratio)
    noise = rng.standard_normal((N_PROMPT, shape.n_embd - shape.n_expert), np.float32)
    left = shape.n_embd - np.square(embedding_VK).sum(axis=1, keepdims=True)
    embedding_VK[:, shape.n_expert :] = noise * np.sqrt(left / np.square(noise).sum(axis=1, keepdims=True))
    return embedding_VK


def skip_threshold(shape: Shape, share: float) -> float:
    """The ratio to a token's largest weight below which lies the SHARE of all slots."""
    return 0.02 + 0.96 * share * shape.n_used / (shape.n_used - 1)


def read_afresh(path: Path) -> None:
    """Have the file in the page cache as reading brings it there: mapping what was just written takes much longer."""
    with path.open("rb+", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 24):
            pass


def write_model(
    path: Path, shape: Shape, types: Sequence[QuantType], *, grouped: bool = False, skip: bool = False
) -> ModelFile:
    """A Qwen3-MoE of random weights. Several TYPES are groups of experts, or else the types of gate, up and down.

    Attention and experts add little to the residual stream, so that the embedding alone decides the routes.
    """
    rng = np.random.default_rng(0)
    encoded: dict[tuple[QuantType, int], np.ndarray] = {}  # few rows are enough to draw a matrix from

    def rows(quant_type: QuantType, n_columns: int) -> np.ndarray:
        if (quant_type, n_columns) not in encoded:
            weight_RK = rng.standard_normal((128, n_columns), np.float32) / np.float32(np.sqrt(n_columns))
            encoded[quant_type, n_columns] = ggml.encode(weight_RK, quant_type)
        return encoded[quant_type, n_columns]

    def matrix(n_rows: int, n_columns: int) -> np.ndarray:
        weight_RK = rng.standard_normal((n_rows, n_columns), np.float32) / np.float32(np.sqrt(n_columns))
        return ggml.encode(weight_RK, QuantType.Q8_0)

    def experts(quant_type: QuantType, n_expert: int, projection: str) -> Callable[[], np.ndarray]:
        k, n = (shape.n_ff, shape.n_embd) if projection == "down" else (shape.n_embd, shape.n_ff)
        blocks_RB = rows(quant_type, k)
        return lambda: blocks_RB[rng.integers(0, len(blocks_RB), (n_expert, n))]

    logits_scale = 20  # undoes ffn_norm
    constants: dict[str, np.ndarray] = {
        "token_embd.weight": routed_embeddings(shape, rng),
        "output_norm.weight": np.ones(shape.n_embd, np.float32),
        "output.weight": matrix(N_PROMPT, shape.n_embd),
    }
    drawn: dict[str, tuple[QuantType, tuple[int, ...], Callable[[], np.ndarray]]] = {}
    for i in range(shape.n_layer):
        router_EK = np.eye(shape.n_expert, shape.n_embd, dtype=np.float32) * logits_scale
        layer = {
            "attn_norm": np.full(shape.n_embd, 1e-3, np.float32),
            "attn_q": matrix(N_HEAD * HEAD_DIM, shape.n_embd),
            "attn_k": matrix(HEAD_DIM, shape.n_embd),
            "attn_v": matrix(HEAD_DIM, shape.n_embd),
            "attn_output": matrix(shape.n_embd, N_HEAD * HEAD_DIM),
            "attn_q_norm": np.ones(HEAD_DIM, np.float32),
            "attn_k_norm": np.ones(HEAD_DIM, np.float32),
            "ffn_norm": np.full(shape.n_embd, 1 / logits_scale, np.float32),
            "ffn_gate_inp": router_EK[rng.permutation(shape.n_expert)],
        }
        constants |= {f"blk.{i}.{name}.weight": array for name, array in layer.items()}
        for j, projection in enumerate(PROJECTIONS):
            sizes = group_sizes(shape.n_expert, len(types)) if grouped else [shape.n_expert]
            for g, n_expert in enumerate(sizes):
                quant_type = types[g] if grouped else types[j % len(types)]
                make = experts(quant_type, n_expert, projection)
                row_shape = (shape.n_embd, shape.n_ff) if projection == "down" else (shape.n_ff, shape.n_embd)
                infix = f".g{g}" if grouped else ""
                drawn[f"blk.{i}.ffn_{projection}_exps{infix}.weight"] = quant_type, (n_expert, *row_shape), make

    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.kv_data[0][gguf.Keys.General.ARCHITECTURE].value = "qwen3moe+grouped" if grouped else "qwen3moe"
    writer.add_vocab_size(N_PROMPT)
    writer.add_tokenizer_model("none")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_used)
    if skip:  # the environment variable LLAMA_EXPERT_SKIP is then the threshold
        writer.add_array("qwen3moe.expert_skip_ratio", [1.0] * shape.n_layer)
        writer.add_array("qwen3moe.expert_skip_frequency", [0.0] * shape.n_layer)
        writer.add_float32("qwen3moe.expert_skip_strength", 0.0)
    for name, array in constants.items():
        raw_type = QuantType.Q8_0 if array.dtype == np.uint8 else None
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=raw_type)
    expert_bytes = 0
    for name, (quant_type, shape_ENK, _) in drawn.items():
        n_bytes = int(np.prod(shape_ENK[:-1])) * ggml.row_bytes(quant_type, shape_ENK[-1])
        writer.add_tensor_info(name, shape_ENK, np.dtype(np.float32), n_bytes, raw_dtype=quant_type)
        expert_bytes += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in constants.values():
        writer.write_tensor_data(array)
    for _, _, make in drawn.values():
        writer.write_tensor_data(make())
    writer.close()
    read_afresh(path)
    dense_bytes = sum(array.nbytes for name, array in constants.items() if name != "token_embd.weight")
    return ModelFile(path, expert_bytes, dense_bytes + expert_bytes * shape.n_used // shape.n_expert)


@dataclasses.dataclass(frozen=True)
class Files:
    folder: Path

    def get(self, shape: Shape, *types: QuantType, grouped: bool = False, skip: bool = False) -> ModelFile:
        layout = "-grouped" * grouped + "-skip" * skip
        stem = f"{shape.name}{shape.n_layer}-{'+'.join(t.name for t in types)}{layout}"
        path, facts = self.folder / f"{stem}.gguf", self.folder / f"{stem}.json"
        if facts.is_file():
            return ModelFile(path, **json.loads(facts.read_text()))
        made = write_model(path, shape, types, grouped=grouped, skip=skip)
        facts.write_text(json.dumps({"expert_bytes": made.expert_bytes, "token_bytes": made.token_bytes}))
        return made

    def delete(self) -> None:
        for path in self.folder.glob("[QM][0-9]-*.*"):
            path.unlink()


# ---- the child that measures


def child(path: str, n_decode: int, n_threads: int) -> None:
    """Open a model, then obey lines that say "decode", "prompt", "load" or "skipped".

    Answers are lines of JSON: (seconds, CPU seconds) per token, or of loading once more; the share of expert
    activations skipped since the last such question, which needs LLAMA_EXPERT_SKIP_COUNT in the environment.
    """
    import llama_cpp

    # back to stderr: the module's callback in Python would take a part of the time of loading
    llama_cpp.llama_log_set(ctypes.cast(0, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        sys.exit(f"cannot load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2 * N_PROMPT, N_PROMPT, N_PROMPT
    params.n_threads = params.n_threads_batch = n_threads
    context = llama_cpp.llama_init_from_model(model, params)
    n_layer = llama_cpp.llama_model_n_layer(model)

    batch = llama_cpp.llama_batch_init(N_PROMPT, 0, 1)

    def decode(first: int, n: int) -> None:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = batch.pos[i] = first + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = 1  # the last layer computes only the tokens with logits
        if llama_cpp.llama_decode(context, batch) != 0:
            sys.exit(f"llama_decode failed on {path}")

    for line in sys.stdin:
        command = line.strip()
        if command == "skipped":
            n_computed, n_skipped = (ctypes.c_uint64 * n_layer)(), (ctypes.c_uint64 * n_layer)()
            count_slots = llama_cpp.llama_cpp._lib.llama_perf_expert_slots
            count_slots.restype = ctypes.c_bool
            for il in range(n_layer):
                slots = ctypes.byref(n_computed, 8 * il), ctypes.byref(n_skipped, 8 * il)
                if not count_slots(ctypes.c_void_p(context), il, *slots):
                    sys.exit("the library does not count skipped activations")
            llama_cpp.llama_perf_context_reset(context)
            print(json.dumps(sum(n_skipped) / (sum(n_computed) + sum(n_skipped))), flush=True)
            continue
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        n_tokens = {"decode": n_decode, "prompt": N_PROMPT, "load": 1}[command]
        again = None
        begin, begin_cpu = time.perf_counter(), time.process_time()
        if command == "load":
            again = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        elif command == "prompt":
            decode(0, N_PROMPT)
        else:
            for i in range(n_decode):
                decode(i, 1)
        llama_cpp.llama_synchronize(context)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        if again:
            llama_cpp.llama_model_free(again)
        print(json.dumps([seconds / n_tokens, cpu_seconds / n_tokens]), flush=True)


@dataclasses.dataclass
class Child:
    process: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:  # it ended, perhaps with a debugger's output
            self.errors.seek(0)
            text = "".join(self.errors.readlines()[-10:])
            raise click.ClickException(f"a measuring process died: {line}{text}") from None


@contextmanager
def open_child(library: Path, path: Path, n_decode: int, n_threads: int, env: Mapping[str, str]) -> Iterator[Child]:
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(path), str(n_decode), str(n_threads)],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Child(process, errors)
        finally:
            process.kill()
            process.wait()


# ---- comparing


@dataclasses.dataclass(frozen=True)
class Subject:
    """One side of a comparison."""

    name: str
    library: Path
    file: ModelFile
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


Times = dict[str, np.ndarray]  # by subject: (R, 2), R rounds; seconds and CPU seconds per token


@dataclasses.dataclass(frozen=True)
class Row:
    section: str
    what: str
    measure: str  # decode, prompt, load
    tokens_per_second: float | None
    bound: float | None  # tokens per second by memory bandwidth
    ratio: float
    quartiles: tuple[float, float]
    cpu_ratio: float | None
    target: float | None

    def cells(self) -> list[str]:
        def number(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        met = "" if self.target is None else "yes" if self.ratio >= self.target else "NO"
        spread = f"{self.quartiles[0]:.3f}–{self.quartiles[1]:.3f}"
        return [
            self.what,
            self.measure,
            number(self.tokens_per_second, ".1f"),
            number(self.bound, ".1f"),
            f"{self.ratio:.3f}",
            spread,
            number(self.cpu_ratio, ".3f"),
            number(self.target, ".2f"),
            met,
        ]


HEADINGS = ("what", "measure", "tokens/s", "bound", "ratio", "quartiles", "CPU time", "target", "met")


def compared(
    section: str,
    what: str,
    measure: str,
    ratios: np.ndarray,
    *,
    seconds: np.ndarray | None = None,
    bound: float | None = None,
    target: float | None = None,
) -> Row:
    """RATIOS is (R,) or (R, 2), wall and CPU."""
    wall = ratios if ratios.ndim == 1 else ratios[:, 0]
    low, high = np.quantile(wall, [0.25, 0.75])
    return Row(
        section,
        what,
        measure,
        tokens_per_second=None if seconds is None else 1 / statistics.median(seconds),
        bound=bound if measure == "decode" else None,  # a prompt reads each expert once for many tokens
        ratio=float(np.median(wall)),
        quartiles=(float(low), float(high)),
        cpu_ratio=None if ratios.ndim == 1 else float(np.median(ratios[:, 1])),
        target=target,
    )


@dataclasses.dataclass(frozen=True)
class Bench:
    files: Files
    patched: Path
    unpatched: Path | None
    bandwidth: float  # bytes per second
    n_rounds: int
    n_threads: int
    shapes: tuple[Shape, ...]

    def bound(self, token_bytes: float) -> float:
        return self.bandwidth / token_bytes

    def open(self, subject: Subject, n_decode: int) -> AbstractContextManager[Child]:
        return open_child(subject.library, subject.file.path, n_decode, self.n_threads, subject.env)

    def measure(
        self, subjects: Sequence[Subject], shape: Shape, commands: Sequence[str] = ("decode", "prompt")
    ) -> dict[str, Times]:
        """Times by command."""
        with ExitStack() as stack:
            children = [(s.name, stack.enter_context(self.open(s, shape.n_decode))) for s in subjects]
            result: dict[str, Times] = {}
            for command in commands:
                for _, opened in children:
                    opened.ask("decode")  # reads the file, wakes the threads
                taken: dict[str, list[list[float]]] = {s.name: [] for s in subjects}
                for i in range(self.n_rounds):
                    for name, opened in children if i % 2 == 0 else reversed(children):
                        taken[name].append(opened.ask(command))
                result[command] = {name: np.array(times) for name, times in taken.items()}
            return result

    def groups(self) -> Iterator[Row]:
        for shape, types in ((QWEN, K_TYPES), (QWEN, I_TYPES), (MIXTRAL, K_TYPES)):
            if shape not in self.shapes:
                continue
            subjects = [Subject(t.name, self.patched, self.files.get(shape, t)) for t in types]
            mixed = Subject("mixed", self.patched, self.files.get(shape, *types, grouped=True))
            weights = np.array(group_sizes(shape.n_expert, len(types))) / shape.n_expert
            file_bytes = np.array([s.file.expert_bytes for s in subjects], float)
            what = f"{shape.name} {'+'.join(t.name for t in types)} grouped"
            for command, times in self.measure([*subjects, mixed], shape).items():
                grouped = times["mixed"]
                for s in subjects:
                    own, bound = times[s.name], self.bound(s.file.token_bytes)
                    yield compared(
                        "groups", f"{shape.name} {s.name}", command, grouped / own, seconds=own[:, 0], bound=bound
                    )
                uniform_FR2 = np.stack([times[s.name] for s in subjects])
                ratio = np.tensordot(weights, uniform_FR2, 1) / grouped
                bound = self.bound(mixed.file.token_bytes)
                yield compared("groups", what, command, ratio, seconds=grouped[:, 0], bound=bound, target=0.98)
                mean_speed = np.tensordot(file_bytes / file_bytes.sum(), 1 / uniform_FR2, 1)
                yield compared("groups", f"{what}, plain reading", command, 1 / grouped / mean_speed, target=0.98)

    def ordinary(self) -> Iterator[Row]:
        assert self.unpatched is not None
        for quant_type in (QuantType.Q4_K, QuantType.IQ3_S):
            file = self.files.get(QWEN, quant_type)
            subjects = [Subject("patched", self.patched, file), Subject("unpatched", self.unpatched, file)]
            for command, times in self.measure(subjects, QWEN).items():
                own, bound = times["patched"], self.bound(file.token_bytes)
                what = f"Q {quant_type.name}, patched over unpatched"
                ratio = times["unpatched"] / own
                yield compared("ordinary", what, command, ratio, seconds=own[:, 0], bound=bound, target=0.99)

    def skip(self) -> Iterator[Row]:
        speed_targets = {("decode", 0.15): 1.10, ("prompt", 0.15): 1.08, ("decode", 0.50): 1.6}
        for shape, quant_type in itertools.product((QWEN, MIXTRAL), (QuantType.Q4_K, QuantType.IQ2_S)):
            if shape not in self.shapes:
                continue
            file = self.files.get(shape, quant_type, skip=True)
            env = {
                share: {"LLAMA_EXPERT_SKIP": repr(skip_threshold(shape, share) if share else 1e-3)} for share in SKIPPED
            }
            counts = {}
            for share in SKIPPED:
                counting = Subject("", self.patched, file, {**env[share], "LLAMA_EXPERT_SKIP_COUNT": "1"})
                with self.open(counting, shape.n_decode) as opened:
                    for command in ("decode", "prompt"):
                        opened.ask(command)
                        counts[command, share] = opened.ask("skipped")
            subjects = [Subject("off", self.patched, file, {"LLAMA_EXPERT_SKIP": "0"})]
            subjects += [Subject(str(share), self.patched, file, env[share]) for share in SKIPPED]
            read_share = file.expert_bytes * shape.n_used / shape.n_expert / file.token_bytes
            for command, times in self.measure(subjects, shape).items():
                for share in SKIPPED:
                    own, off, counted = times[str(share)], times["off"], counts[command, share]
                    what = f"{shape.name} {quant_type.name}, {100 * counted:.1f} % skipped"
                    bound = self.bound(file.token_bytes * (1 - read_share * counted))
                    target = speed_targets.get((command, share))
                    yield compared("skip", what, command, off / own, seconds=own[:, 0], bound=bound, target=target)
                    if share and command == "decode":
                        saved = (1 - own / off) / counted
                        yield compared("skip", f"{what}: saved", command, saved, target=0.85)

    def load(self) -> Iterator[Row]:
        for types in (K_TYPES, I_TYPES):
            plain, grouped = self.files.get(QWEN, *types), self.files.get(QWEN, *types, grouped=True)
            for file in (plain, grouped):
                read_anew(file.path)
            subjects = [Subject("plain", self.patched, plain), Subject("grouped", self.patched, grouped)]
            times = self.measure(subjects, QWEN, ("load",))["load"]
            size = grouped.path.stat().st_size / plain.path.stat().st_size
            what = f"Q {'+'.join(t.name for t in types)} grouped, {size:.3f} times the size"
            yield compared("load", what, "load", times["plain"] / times["grouped"], target=1.0)


def read_anew(path: Path) -> None:
    """Into the page cache from the disk: mapping a file takes up to six times as long or as short by the sizes of the
    writes that brought it there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass


# ---- the machine and the other library

_STREAM_PROGRAM = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { N_TIMES = 8 };
static const size_t n = (size_t) 512 << 17; /* 512 MiB of uint64_t for each thread */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

static void * sum(void * data) {
    const uint64_t * x = data;
    uint64_t s = 0;
    for (size_t i = 0; i < n; i++) {
        s += x[i];
    }
    return (void *) (uintptr_t) s;
}

int main(void) {
    uint64_t * data[N_THREADS];
    double best = 0;
    uintptr_t total = 0;
    for (int t = 0; t < N_THREADS; t++) {
        data[t] = malloc(n*8);
        for (size_t i = 0; i < n; i++) {
            data[t][i] = i;
        }
    }
    for (int k = 0; k < N_TIMES; k++) {
        pthread_t threads[N_THREADS];
        void * result;
        const double begin = now();
        for (int t = 0; t < N_THREADS; t++) {
            pthread_create(&threads[t], NULL, sum, data[t]);
        }
        for (int t = 0; t < N_THREADS; t++) {
            pthread_join(threads[t], &result);
            total += (uintptr_t) result;
        }
        const double rate = N_THREADS*n*8/(now() - begin);
        best = rate > best ? rate : best;
    }
    fprintf(stderr, "%zu\n", (size_t) total); /* so that the sums are needed */
    printf("%.0f\n", best);
    return 0;
}
"""


def measured_bandwidth(n_threads: int) -> float:
    """Bytes per second that the threads read, the best of eight passes over 512 MiB each."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "stream.c"), Path(folder, "stream")
        source.write_text(_STREAM_PROGRAM)
        compiler = find_toolchain(os.environ).cc
        subprocess.run(
            [compiler, "-O3", "-march=native", "-pthread", f"-DN_THREADS={n_threads}", source, "-o", program],
            check=True,
        )
        return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def build_unpatched(tools: Path) -> Path:
    """Folder of the library that the pinned sources give without patches; built into the cache, once per options.

    TOOLS is the bin/ of the runtime's build, whose options and compilers' flags are taken.
    """
    info = load_build(tools.parent).info
    cache = cache_folder()
    folder = cache / f"unpatched-{info.native_sha256[:8]}-{info.sdist_sha256[:8]}"
    libraries = folder / "bin"
    if (folder / "done").is_file():
        return libraries
    click.echo("building the unpatched library (minutes) ...", err=True)
    log = cache / f"{folder.name}.log"
    log.write_text("")
    upstream = read_upstream()
    env = with_build_tools({**os.environ, **info.environment}, cache, log)
    sdist = fetch_sdist(upstream, cache, env=env, log=log)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    unpack(sdist, upstream, folder / "source")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD_PLATLIB_DIR=.", *info.cmake_args]
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
    what = "building the unpatched library"
    run_logged(
        ["cmake", "-S", folder / "source", "-B", folder / "cmake", *generator, *options], what=what, env=env, log=log
    )
    jobs = str(os.cpu_count() or 1)
    run_logged(
        ["cmake", "--build", folder / "cmake", "--parallel", jobs, "--target", "llama"], what=what, env=env, log=log
    )
    shutil.copytree(folder / "cmake" / "bin", libraries, symlinks=True)
    shutil.rmtree(folder / "source")
    shutil.rmtree(folder / "cmake")
    (folder / "done").touch()
    return libraries


def table(rows: Sequence[Row]) -> str:
    cells = [list(HEADINGS), *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Sections to run [default: all].")
@click.option("--quick", is_flag=True, help="The smaller shape only: a try of the script, not a measurement.")
@click.option("--rounds", "n_rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", "n_threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--patched", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another libllama.")
@click.option("--unpatched", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="For the models [default: temporary].")
@click.option("--keep", is_flag=True, help="Do not delete the models in --folder.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=Path("bench-runtime.json")
)
def main(
    only: tuple[str, ...],
    quick: bool,
    n_rounds: int,
    n_threads: int,
    patched: Path | None,
    unpatched: Path | None,
    folder: Path | None,
    keep: bool,
    json_path: Path,
) -> None:
    sections = only or SECTIONS
    try:
        tools = patched or find_runtime().tools
        if "ordinary" in sections and unpatched is None:
            unpatched = build_unpatched(find_runtime().tools)
        bandwidth = measured_bandwidth(n_threads)
    except RuntimeMissing as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s, {n_threads} threads")
    rows: list[Row] = []
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe2gguf-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        files = Files(folder)
        if not keep:
            stack.callback(files.delete)
        shapes = (QWEN,) if quick else (QWEN, MIXTRAL)
        bench = Bench(files, tools, unpatched, bandwidth, n_rounds, n_threads, shapes)
        for section in sections:
            begin = time.perf_counter()
            for row in getattr(bench, section)():
                rows.append(row)
            click.echo(f"{section}: {time.perf_counter() - begin:.0f} s", err=True)
    click.echo(table(rows))
    report = {
        "bandwidth": bandwidth,
        "threads": n_threads,
        "rounds": n_rounds,
        "rows": [dataclasses.asdict(r) for r in rows],
    }
    json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
