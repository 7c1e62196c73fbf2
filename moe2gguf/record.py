"""What a benchmark run found, as JSON: all that tables and pictures are made of.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from moe2gguf.errors import Moe2ggufError
from moe2gguf.llama_tools import BaseRun, Divergence

FORMAT_VERSION = 1

# in the order of tables; the preset's file is what the others may have the bytes of
METHODS = {
    "preset": "llama-quantize",
    "search": "llama-quantize, searched types",
    "uniform": "one type for all experts",
    "pmq": "PMQ (MC-MoE)",
    "stock": "moe2gguf, stock",
    "grouped": "moe2gguf, grouped",
    "skipping": "moe2gguf, grouped, skipping",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What it took to make a file."""

    command: str
    seconds: float
    peak_rss_bytes: int | None  # None for many small commands


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens per second over alternating rounds."""

    median: float
    low: float  # quartiles
    high: float
    of_preset: float | None  # the median of each round's ratio to the preset's; None where there is none


@dataclasses.dataclass(frozen=True)
class Row:
    """One file as one method made it for one budget, measured."""

    method: str  # a key of METHODS
    budget: str  # the preset whose bytes it may have; "" for the base
    file: str
    sha256: str
    file_bytes: int
    bits_per_weight: float  # bytes of all tensors × 8 / parameters
    divergence: Divergence | None  # None for the base
    prompt: Rate
    decode: Rate
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Absent:
    """A row that cannot be."""

    method: str
    budget: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SkipSpeed:
    """Of one strength; in every round each of them has its turn."""

    prompt: Rate
    decode: Rate
    prompt_ratio: float  # the median of each round's ratio to that with nothing skipped
    decode_ratio: float


@dataclasses.dataclass(frozen=True)
class SkipPoint:
    """`Record.skip_file` with its thresholds scaled."""

    strength: float
    skipped: float  # share of expert activations
    kld_mean: float
    speed: SkipSpeed | None = None  # None in records that did not measure it


@dataclasses.dataclass(frozen=True)
class ExpertMap:
    """What a grouped file gives its experts, and how often calibration selected them, in the checkpoint's order."""

    file: str
    layers: tuple[int, ...]
    bits_LE: tuple[tuple[float, ...], ...]  # mean of its matrices, bits per weight
    share_LE: tuple[tuple[float, ...], ...]  # of the layer's selections, times E: 1 is an even share


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """lm-evaluation-harness on one file."""

    file: str
    task: str
    metric: str
    value: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where, when and with what it was measured."""

    command: str
    date: str  # UTC
    version: str
    runtime: str
    python: str
    system: str
    processor: str
    backends: str  # of ggml
    n_threads: int
    memory_bytes: int
    seconds: float  # the whole run; what was found done counts as nothing
    resumed: bool  # whether any of it was found done


@dataclasses.dataclass(frozen=True)
class Data:
    """Which tokens."""

    model: str
    n_params: int
    text: str
    text_sha256: str
    n_ctx: int
    calibration_text: str
    calibration_tokens: int
    calibration_digest: str  # sha256 of its token ids
    seed: int


@dataclasses.dataclass(frozen=True)
class Record:
    setting: Setting
    data: Data
    base_run: BaseRun
    rows: tuple[Row, ...]  # the base first, then by budget
    absent: tuple[Absent, ...]
    shared: dict[str, Cost]  # what several files needed: calibration, importance matrix, search
    n_rounds: int
    skip_file: str
    skip_points: tuple[SkipPoint, ...]
    experts: ExpertMap
    tasks: tuple[TaskScore, ...] = ()

    @property
    def base(self) -> Row:
        return self.rows[0]

    @property
    def budgets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.budget for row in self.rows[1:]))

    def of_budget(self, budget: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows[1:] if row.budget == budget)

    def preset(self, budget: str) -> Row:
        """The row that sets the bytes of its budget."""
        return next(row for row in self.of_budget(budget) if row.method == "preset")


def save_record(record: Record, path: Path) -> None:
    """Written aside and renamed."""
    aside = path.with_name(f".{path.name}.partial")
    fields = {"format": FORMAT_VERSION, **dataclasses.asdict(record)}
    aside.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def load_record(path: Path) -> Record:
    """Raises Moe2ggufError for anything but a record of this format."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT_VERSION:
            raise KeyError("format")
        return Record(
            setting=Setting(**fields["setting"]),
            data=Data(**fields["data"]),
            base_run=BaseRun(**fields["base_run"]),
            rows=tuple(_row(row) for row in fields["rows"]),
            absent=tuple(Absent(**absent) for absent in fields["absent"]),
            shared={name: Cost(**cost) for name, cost in fields["shared"].items()},
            n_rounds=fields["n_rounds"],
            skip_file=fields["skip_file"],
            skip_points=tuple(_skip_point(point) for point in fields["skip_points"]),
            experts=ExpertMap(**{key: _tuples(value) for key, value in fields["experts"].items()}),
            tasks=tuple(TaskScore(**score) for score in fields["tasks"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Moe2ggufError(
            f"{path} is no record of a benchmark in format {FORMAT_VERSION} ({type(error).__name__}: {error}); "
            "`moe2gguf bench` writes one"
        ) from error


def _row(fields: dict[str, Any]) -> Row:
    measured = fields["divergence"]
    return Row(
        **{
            **fields,
            "divergence": None if measured is None else Divergence(**measured),
            "prompt": Rate(**fields["prompt"]),
            "decode": Rate(**fields["decode"]),
            "cost": Cost(**fields["cost"]),
        }
    )


def _skip_point(fields: dict[str, Any]) -> SkipPoint:
    if (measured := fields.get("speed")) is None:
        return SkipPoint(**fields)
    rates = {name: Rate(**measured[name]) for name in ("prompt", "decode")}
    return SkipPoint(**{**fields, "speed": SkipSpeed(**{**measured, **rates})})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
