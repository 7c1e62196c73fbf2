"""Seconds that the installed runtime's CPU kernels take for a byte of each type when it decodes, measured once.

Shapes: U units, J types.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe2gguf import ggml
from moe2gguf.costs import CANDIDATES, NATIVE, CostTable, Unit
from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.runtime import find_runtime
from moe2gguf.source import Source, expert_axis
from moe2gguf.stats import CalibrationStats

FORMAT_VERSION = 1
FILE_NAME = "speeds.json"
N_ROUNDS = 15
# of one type at Q8_0: all types together are several times the largest caches
MAX_BYTES = 64 << 20
MAX_EXPERTS = 1024


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What the speeds depend on."""

    runtime: str
    processor: str
    n_threads: int
    n_layers: int  # as many as the model has, or as MAX_BYTES hold
    n_experts: int  # of a layer, likewise
    n_selected: int
    n_rows: int
    n_columns: int
    in_cache: bool  # whether these are all of the model's experts, small as they are
    types: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Speeds:
    conditions: Conditions
    seconds_per_byte: dict[QuantType, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "conditions": dataclasses.asdict(self.conditions) | {"types": list(self.conditions.types)},
            "seconds_per_byte": {t.name: seconds for t, seconds in self.seconds_per_byte.items()},
        }


def conditions(source: Source, n_threads: int) -> Conditions:
    expert = next(t for t in source.tensors if expert_axis(t.name) is not None and t.quantisable)
    n_total, n_rows, n_columns = expert.shape
    # a shape that every type fits
    n_columns = -(-n_columns // 256) * 256
    n_wanted = source.n_expert_used
    n_most = min(MAX_EXPERTS, MAX_BYTES // (n_rows * ggml.row_bytes(QuantType.Q8_0, n_columns)))
    n_experts = max(n_wanted, min(n_total, n_most))
    return Conditions(
        runtime=find_runtime().version,
        processor=_processor(),
        n_threads=n_threads,
        n_layers=max(1, min(source.n_layer, n_most // n_experts)),
        n_experts=n_experts,
        n_selected=n_wanted,
        n_rows=n_rows,
        n_columns=n_columns,
        in_cache=3 * n_total * source.n_layer <= n_most,
        types=tuple(t.name for t in (*CANDIDATES, NATIVE)),
    )


def measured_speeds(
    source: Source, n_threads: int, work: Path, *, save: bool, progress: Callable[[str, int, int], None]
) -> Speeds:
    """Those in the work folder if they were measured under the same conditions, else new ones, saved there."""
    path, wanted = work / FILE_NAME, conditions(source, n_threads)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT_VERSION:
            found = Speeds(wanted, {QuantType[name]: s for name, s in content["seconds_per_byte"].items()})
            if found.as_json()["conditions"] == content["conditions"]:
                return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    speeds = measure(wanted, progress)
    if save:
        content = {"format": FORMAT_VERSION, **speeds.as_json()}
        aside = path.with_name(path.name + ".partial")
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    return speeds


def measure(wanted: Conditions, progress: Callable[[str, int, int], None]) -> Speeds:
    """Takes some seconds. Raises Moe2ggufError where the runtime cannot be run."""
    question = dataclasses.asdict(wanted) | {"libraries": str(find_runtime().libraries), "n_rounds": N_ROUNDS}
    rounds: list[dict[str, float]] = []
    command = [sys.executable, "-m", "moe2gguf.runtime.speed"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        json.dump(question, child.stdin)
        child.stdin.close()
        progress("speed of the types", 0, N_ROUNDS)
        for line in child.stdout:
            rounds.append(json.loads(line))
            progress("speed of the types", len(rounds), N_ROUNDS)
        child.wait()
        errors.seek(0)
        said = errors.read()
    if child.returncode != 0 or len(rounds) != N_ROUNDS:
        reason = (said.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise Moe2ggufError(f"the speed of the types cannot be measured: {reason}; run `moe2gguf runtime check`")
    seconds = {QuantType[name]: min(found[name] for found in rounds) for name in wanted.types}
    return Speeds(
        wanted,
        {
            t: float(f"{s / (wanted.n_rows * ggml.row_bytes(t, wanted.n_columns)):.4g}")
            for t, s in seconds.items()
        },
    )  # fmt: skip


def with_seconds(table: CostTable, speeds: Speeds, stats: CalibrationStats) -> CostTable:
    """The table with what each unit adds to the time of a decoded token.

    An expert counts as often as calibration selected it, other matrices always; an embedding that is not the output
    matrix too is looked up, which takes no time.
    """

    def share(unit: Unit) -> float:
        if unit.expert is None:
            return float(unit.role != "embedding")
        assert unit.layer is not None
        return float(stats.layers[unit.layer].n_tokens_E[unit.expert] / stats.n_tokens)

    per_byte_J = np.array([speeds.seconds_per_byte[t] for t in table.types])
    share_U = np.array([share(unit) for unit in table.units])
    return dataclasses.replace(table, seconds_UJ=share_U[:, None] * table.bytes_UJ * per_byte_J)


def _processor() -> str:
    """Linux says it there; elsewhere Python knows what there is to know."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
