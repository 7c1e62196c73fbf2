"""Reopen a written file and compare every tensor, decoded by gguf-py, with the checkpoint it came from.

Nothing here shares code with the encoder, the writer or the runtime: the decoder is gguf-py's, the names and
values are the source's. One tensor is in memory at a time, and its experts are decoded one by one.

Shapes: E experts, N out features, K in features, S sampled positions of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe2gguf.gguf_reader import GgufFile, GgufTensor, read_gguf
from moe2gguf.llama import available_cores
from moe2gguf.source import KeyValue, Source, SourceTensor, expert_axis, layer_of

Progress = Callable[[int, int, str], None]  # tensors done, tensors in all, name of the next
QuantType = gguf.GGMLQuantizationType

MAX_GROUPS = 7

# Relative RMS error of ggml's encoder on Gaussian weights, columns weighed alike; a test measures it again.
GAUSSIAN_ERROR = {
    QuantType.F16: 0.0002,
    QuantType.BF16: 0.0017,
    QuantType.Q8_0: 0.0054,
    QuantType.Q6_K: 0.0173,
    QuantType.Q5_1: 0.0338,
    QuantType.Q5_K: 0.0354,
    QuantType.Q5_0: 0.0405,
    QuantType.Q4_1: 0.0700,
    QuantType.Q4_K: 0.0709,
    QuantType.IQ4_NL: 0.0750,
    QuantType.IQ4_XS: 0.0757,
    QuantType.Q4_0: 0.0818,
    QuantType.NVFP4: 0.0951,
    QuantType.MXFP4: 0.1150,
    QuantType.IQ3_S: 0.1374,
    QuantType.Q3_K: 0.1446,
    QuantType.IQ3_XXS: 0.1820,
    QuantType.IQ2_S: 0.2490,
    QuantType.Q2_K: 0.2684,
    QuantType.IQ2_XS: 0.2997,
    QuantType.IQ2_XXS: 0.3441,
    QuantType.IQ1_M: 0.4518,
    QuantType.IQ1_S: 0.4860,
    QuantType.TQ1_0: 0.8084,
    QuantType.TQ2_0: 0.8084,
}
# Heavy tails (Student's t, 3 degrees) cost up to 1.6 times the Gaussian error, importance 1.2 times, and
# rounding with error feedback trades weight error for output error; garbage is far beyond all of them.
TOLERATED_FACTOR = 3.0
# A matrix of zeros has error 1, another expert's weights about 1.4: no type may come near.
LARGEST_ERROR = 0.95
# Error feedback fits an expert's down projection to what its gate and up became, at any type of its own, and a
# calibrated router or norm is fitted to what reaches it; a router with rows of other experts is off by 1.4.
FITTED_ERROR = 0.5

_N_SAMPLED = 4096
# An expert that fits its own checkpoint weights worse than another's is misplaced. Nearly equal experts
# (upcycled from one dense model) may tie by chance of the sampling; their order does not matter then.
_TIE = 1.1

# keys that conversion is there to change
_CONVERTED_KEYS = {"general.architecture", "general.file_type", "general.quantization_version"}


@dataclass(frozen=True)
class TensorCheck:
    """One matrix of the file against the checkpoint's."""

    name: str  # of the tensor in the file
    expert: int | None  # the checkpoint's number
    type: QuantType
    relative_error: float  # RMS of the difference / RMS of the checkpoint's weights


@dataclass(frozen=True)
class VerifyReport:
    path: Path
    n_tensors: int  # of the source
    checks: tuple[TensorCheck, ...]
    problems: tuple[str, ...]  # a sentence each; empty when the file is sound

    @property
    def ok(self) -> bool:
        return not self.problems


def error_limit(quant_type: QuantType) -> float | None:
    """The largest relative error a sound matrix of this type has; None for a type that cannot be judged."""
    if quant_type == QuantType.F32:
        return 0.0
    gaussian = GAUSSIAN_ERROR.get(quant_type)
    return None if gaussian is None else min(gaussian * TOLERATED_FACTOR, LARGEST_ERROR)


def verify_file(
    path: str | Path, source: Source, *, n_threads: int | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Compares all shards of `path` with `source`.

    What is wrong is listed in the report. Raises FileFormatError where the file cannot be read at all.
    """
    file = read_gguf(path)
    stored = {tensor.name: tensor for tensor in file.tensors}
    problems = list(_key_value_problems(file, source))
    orders, order_problems = _expert_orders(file, source)
    problems += order_problems
    routers, norms = (_flagged(file, f"moe2gguf.{what}_calibrated") for what in ("router", "norms"))
    checks: list[TensorCheck] = []
    with ThreadPoolExecutor(n_threads or available_cores()) as pool:
        for number, wanted in enumerate(source.tensors):
            if progress:
                progress(number, len(source.tensors), wanted.name)
            parts, part_problems = _take_parts(stored, wanted)
            problems += part_problems
            if not parts or part_problems:
                continue
            order = orders.get(layer_of(wanted.name)) if expert_axis(wanted.name) == 0 else None
            fitted = "ffn_down_exps" in wanted.name and bool(file.kv.get("moe2gguf.feedback"))
            fitted |= wanted.name in {f"blk.{layer}.ffn_gate_inp.weight" for layer in routers}
            # the last flag is the final norm's
            fitted |= "norm" in wanted.name and layer_of(wanted.name) in {
                i if i < source.n_layer else None for i in norms
            }
            comparison = _Comparison(wanted, parts, order, pool, FITTED_ERROR if fitted else 0.0)
            checks += comparison.checks
            problems += comparison.problems
    problems += [f"{name} is in the file and not in the checkpoint" for name in stored]
    if progress:
        progress(len(source.tensors), len(source.tensors), "")
    return VerifyReport(Path(path), len(source.tensors), tuple(checks), tuple(problems))


def _flagged(file: GgufFile, key: str) -> list[int]:
    flags = file.kv.get(key)
    return [i for i, flag in enumerate([] if flags is None else flags) if flag]


def _key_value_problems(file: GgufFile, source: Source) -> Iterator[str]:
    if file.architecture != source.arch:
        yield f"general.architecture is {file.architecture!r}, the checkpoint's is {source.arch!r}"
    for pair in source.kv:
        if pair.key in _CONVERTED_KEYS:
            continue
        if pair.key not in file.kv:
            yield f"key {pair.key} is missing"
        elif not _same_value(file.kv[pair.key], pair):
            yield f"key {pair.key} has another value than the converter gives it"


def _same_value(stored: Any, pair: KeyValue) -> bool:
    def plain(value: Any) -> Any:
        return bytes(value).decode("utf-8", "replace") if isinstance(value, (bytes, bytearray)) else value

    if isinstance(stored, np.ndarray):
        wanted = np.asarray(pair.value)
        return wanted.shape == stored.shape and np.array_equal(wanted.astype(stored.dtype), stored)
    if isinstance(stored, list):
        return [plain(item) for item in pair.value] == stored
    if isinstance(stored, float):
        return np.float32(stored) == np.float32(pair.value)
    return plain(pair.value) == stored


def _expert_orders(file: GgufFile, source: Source) -> tuple[dict[int | None, np.ndarray], list[str]]:
    """Layer -> (E,) checkpoint expert at each position, for layers that state a sound order."""
    orders: dict[int | None, np.ndarray] = {}
    problems = []
    for layer in range(source.n_layer):
        order = file.expert_order(layer)
        if order is None:
            continue
        if sorted(np.asarray(order).tolist()) == list(range(source.n_expert)):
            orders[layer] = np.asarray(order, np.int64)
        else:
            problems.append(
                f"moe2gguf.expert_order.{layer} is no permutation of the {source.n_expert} experts: "
                f"{np.asarray(order).tolist()}"
            )
    return orders, problems


def _take_parts(stored: dict[str, GgufTensor], wanted: SourceTensor) -> tuple[list[GgufTensor], list[str]]:
    """Removes from `stored` the tensor, or the groups, that hold `wanted`, and checks names and shapes."""
    plain = stored.pop(wanted.name, None)
    groups: dict[int, GgufTensor] = {}
    if wanted.name.endswith("_exps.weight"):
        pattern = re.compile(re.escape(wanted.name.removesuffix("weight")) + r"g(\d+)\.weight")
        for name in [name for name in stored if pattern.fullmatch(name)]:
            groups[int(name.split(".")[-2][1:])] = stored.pop(name)
    if plain and groups:
        return [], [f"{wanted.name} is in the file both whole and in groups"]
    if not plain and not groups:
        return [], [f"{wanted.name} is missing"]
    if plain:
        if plain.shape != wanted.shape:
            return [], [f"{wanted.name} has shape {plain.shape}, the checkpoint's has {wanted.shape}"]
        return [plain], []
    if sorted(groups) != list(range(len(groups))) or len(groups) > MAX_GROUPS:
        numbers = ", ".join(f"g{i}" for i in sorted(groups))
        return [], [f"{wanted.name} has groups {numbers}; they must be g0 … at most g{MAX_GROUPS - 1}, without a gap"]
    parts = [groups[i] for i in range(len(groups))]
    for part in parts:
        if part.shape[1:] != wanted.shape[1:]:
            return [], [f"{part.name} has shape {part.shape}, its experts need (…, {wanted.shape[1:]})"]
    n_experts = sum(part.shape[0] for part in parts)
    if n_experts != wanted.shape[0]:
        return [], [f"the groups of {wanted.name} hold {n_experts} experts, the checkpoint has {wanted.shape[0]}"]
    return parts, []


class _Comparison:
    """One source tensor against the one or more tensors of the file that hold it."""

    def __init__(
        self,
        wanted: SourceTensor,
        parts: list[GgufTensor],
        order: np.ndarray | None,
        pool: ThreadPoolExecutor,
        least_limit: float,
    ):
        self._least_limit = least_limit
        self.checks: list[TensorCheck] = []
        self.problems: list[str] = []
        weights = wanted.load()
        if expert_axis(wanted.name) == 0 and weights.ndim == 3:
            self._compare_experts(weights, parts, order, pool)
        else:
            self._compare_whole(weights if order is None else weights[order], parts[0])

    def _compare_whole(self, weights: np.ndarray, part: GgufTensor) -> None:
        decoded = self._decode(part, part.blocks())
        if decoded is None:
            return
        decoded = decoded.reshape(weights.shape)
        self._judge(part, None, _relative_error(weights, decoded), bool(np.isfinite(decoded).all()))
        if self._least_limit and weights.ndim == 2:
            # a router that is fitted: two rows in each other's place are little of its error
            for row, other in _misplaced_rows(weights, decoded):
                self.problems.append(f"{part.name} has row {other} of the checkpoint's in the place of row {row}")

    def _compare_experts(
        self,
        weight_ENK: np.ndarray,
        parts: list[GgufTensor],
        order: np.ndarray | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        n_experts = len(weight_ENK)
        order = np.arange(n_experts) if order is None else order
        rows = [(part, position) for part in parts for position in range(part.shape[0])]
        sampled_S = np.random.default_rng(0).integers(0, weight_ENK[0].size, _N_SAMPLED)

        def compare(position: int) -> tuple[float, bool, np.ndarray] | None:
            part, row = rows[position]
            decoded_NK = self._decode(part, part.blocks()[row])
            if decoded_NK is None:
                return None
            weight_NK = weight_ENK[order[position]]
            error = _relative_error(weight_NK, decoded_NK.reshape(weight_NK.shape))
            return error, bool(np.isfinite(decoded_NK).all()), decoded_NK.reshape(-1)[sampled_S]

        results = list(pool.map(compare, range(n_experts)))
        samples_ES = weight_ENK.reshape(n_experts, -1)[:, sampled_S].astype(np.float64)
        for position, result in enumerate(results):
            if result is None:
                continue
            error, finite, decoded_S = result
            expert = int(order[position])
            with np.errstate(invalid="ignore", over="ignore"):  # a broken block decodes to anything
                distances_E = ((samples_ES - decoded_S) ** 2).sum(axis=1)
            nearest = int(distances_E.argmin())
            misplaced = finite and distances_E[expert] > _TIE * distances_E[nearest]
            part, _ = rows[position]
            self._judge(part, expert, error, finite, f"expert {nearest}'s" if misplaced else None)

    def _decode(self, part: GgufTensor, blocks: np.ndarray) -> np.ndarray | None:
        try:
            # what is not finite is reported, not warned of
            with np.errstate(all="ignore"):
                decoded = gguf.quants.dequantize(np.ascontiguousarray(blocks), part.type)
        except NotImplementedError:
            decoded = None
        if decoded is None or error_limit(part.type) is None:
            sentence = f"{part.name} has type {part.type.name}, which cannot be checked"
            if sentence not in self.problems:
                self.problems.append(sentence)
            return None
        return decoded

    def _judge(
        self, part: GgufTensor, expert: int | None, error: float, finite: bool, whose: str | None = None
    ) -> None:
        """Records the matrix and what is wrong with it. `whose`: it holds another expert's weights."""
        self.checks.append(TensorCheck(part.name, expert, part.type, error))
        which = part.name if expert is None else f"{part.name}, expert {expert} of the checkpoint,"
        limit = error_limit(part.type)
        assert limit is not None
        limit = max(limit, self._least_limit)
        if not finite:
            self.problems.append(f"{which} decodes to values that are not finite")
        elif whose is not None:
            self.problems.append(f"{which} holds {whose} weights instead; the expert order is wrong")
        elif error > limit:
            allowed = f"{part.type.name} has at most {limit:.2g}" if limit else "F32 must be exact"
            self.problems.append(f"{which} is off by {error:.3g} (relative RMS error), {allowed}")


def _misplaced_rows(weight_EK: np.ndarray, decoded_EK: np.ndarray) -> list[tuple[int, int]]:
    """Rows that are nearer to another one of the checkpoint's, in the file's order, and to which."""
    weight_EK, decoded_EK = weight_EK.astype(np.float64), decoded_EK.astype(np.float64)
    square_EE = np.square(weight_EK).sum(1) - 2 * decoded_EK @ weight_EK.T
    square_EE += np.square(decoded_EK).sum(1, keepdims=True)
    square_EE = square_EE.clip(min=0)  # of equal rows it may come out below
    nearest_E = square_EE.argmin(1)
    rows_E = np.arange(len(weight_EK))
    is_misplaced_E = square_EE[rows_E, rows_E] > _TIE * square_EE[rows_E, nearest_E]
    return [(int(row), int(nearest_E[row])) for row in rows_E[is_misplaced_E]]


def _relative_error(weights: np.ndarray, decoded: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):  # a broken block decodes to anything
        squares = float(np.square(decoded - weights).sum(dtype=np.float64))
    if squares == 0.0:
        return 0.0
    norm = float(np.square(weights).sum(dtype=np.float64))
    return float(np.sqrt(squares / norm)) if norm > 0 else float("inf")


def render_verification(report: VerifyReport) -> RenderableType:
    """A line per type with its errors, then the problems."""
    by_type: dict[QuantType, list[TensorCheck]] = {}
    for check in report.checks:
        by_type.setdefault(check.type, []).append(check)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("type")
    for header in ("matrices", "mean error", "largest", "limit"):
        table.add_column(header, justify="right")
    table.add_column("largest in")
    for quant_type, checks in sorted(by_type.items(), key=lambda item: GAUSSIAN_ERROR.get(item[0], 0)):
        worst = max(checks, key=lambda check: check.relative_error)
        table.add_row(
            quant_type.name,
            f"{len(checks)}",
            f"{np.mean([check.relative_error for check in checks]):.4f}",
            f"{worst.relative_error:.4f}",
            "exact" if quant_type == QuantType.F32 else f"{error_limit(quant_type):.4f}",
            worst.name if worst.expert is None else f"{worst.name}, expert {worst.expert}",
        )
    if report.ok:
        return Group(table, Text(f"{report.path.name}: all {report.n_tensors} tensors match the checkpoint"))
    shown = [Text(f"· {problem}") for problem in report.problems[:20]]
    if len(report.problems) > len(shown):
        shown.append(Text(f"… and {len(report.problems) - len(shown)} more"))
    return Group(table, Text(f"{report.path.name}: {len(report.problems)} problems", style="bold red"), *shown)
