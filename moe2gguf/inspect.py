"""What is in a GGUF file: the type of every expert, bytes by role, expert order, thresholds, provenance.

Works on any GGUF; the expert table is simply empty for a dense model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe2gguf.errors import FileFormatError
from moe2gguf.gguf_reader import GgufFile, GgufTensor, read_gguf

EXPERT_TENSOR = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<projection>gate_up|gate|up|down)_exps(?:\.g(?P<group>\d+))?\.weight"
)

# the first pattern that matches names the role; the order of this list is the order of the report
_ROLES = (
    ("experts, gate", r"_gate_(ch)?exps\."),
    ("experts, gate and up", r"_gate_up_exps\."),
    ("experts, up", r"_up_(ch)?exps\."),
    ("experts, down", r"_down_(ch)?exps\."),
    ("shared experts", r"ffn_(gate|up|down|gate_up)_shexp"),
    ("router", r"ffn_gate_inp|exp_probs_b"),
    ("norms", r"norm"),
    ("attention", r"\.(attn|ssm|shortconv|time_mix|wkv|indexer)"),
    ("dense FFN", r"\.ffn_"),
    ("embeddings, output", r"^(token_embd|output|per_layer|position_embd|token_types|cls)"),
    ("other", r""),
)


@dataclass(frozen=True)
class ExpertGroup:
    """Consecutive experts of one layer and projection that share a type: one tensor of the file."""

    type: gguf.GGMLQuantizationType
    n_experts: int
    n_params: int
    n_bytes: int


@dataclass(frozen=True)
class Projection:
    name: str  # gate, up, down, or gate_up where the model fuses them
    groups: tuple[ExpertGroup, ...]  # in file order

    @property
    def n_experts(self) -> int:
        return sum(g.n_experts for g in self.groups)

    @property
    def types(self) -> tuple[gguf.GGMLQuantizationType, ...]:
        """The type of the expert at each position of the file, E of them."""
        return tuple(g.type for g in self.groups for _ in range(g.n_experts))


@dataclass(frozen=True)
class Layer:
    index: int
    projections: tuple[Projection, ...]
    expert_order: tuple[int, ...] | None  # position in the file -> checkpoint expert; None: as in the checkpoint

    @property
    def bits_per_weight(self) -> float:
        groups = [g for p in self.projections for g in p.groups]
        return sum(g.n_bytes for g in groups) * 8 / sum(g.n_params for g in groups)

    def checkpoint_types(self, projection: Projection) -> tuple[gguf.GGMLQuantizationType, ...]:
        """The type of each checkpoint expert. Raises FileFormatError if the order is no permutation."""
        order = self.expert_order or tuple(range(projection.n_experts))
        if sorted(order) != list(range(projection.n_experts)):
            raise FileFormatError(
                f"moe2gguf.expert_order.{self.index} is no permutation of the {projection.n_experts} "
                f"experts of layer {self.index}; the file is damaged, convert it again"
            )
        by_expert = dict(zip(order, projection.types, strict=True))
        return tuple(by_expert[e] for e in range(projection.n_experts))


@dataclass(frozen=True)
class Role:
    name: str
    n_tensors: int
    n_params: int
    n_bytes: int
    types: tuple[gguf.GGMLQuantizationType, ...]  # most parameters first


@dataclass(frozen=True)
class FileReport:
    paths: tuple[Path, ...]
    name: str
    licence: str | None
    architecture: str  # without the "+grouped" that a grouped file carries
    grouped: bool  # needs the patched runtime
    n_layers: int
    n_experts: int
    n_experts_used: int
    n_params: int
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float  # bytes of all tensors × 8 / parameters
    roles: tuple[Role, ...]
    layers: tuple[Layer, ...]  # those that have experts
    thresholds: Mapping[str, np.ndarray]  # the {arch}.expert_skip_* arrays, by the rest of their name
    provenance: Mapping[str, Any]  # moe2gguf.* and quantize.imatrix.*, but for the expert orders


def inspect_file(path: str | Path) -> FileReport:
    """Reads the header of `path` (all shards of a split file), no tensor data.

    Raises FileFormatError, in one sentence, for what is no GGUF file or a truncated one.
    """
    file = read_gguf(path)
    arch = file.architecture
    layers = _layers(file)
    skip_prefix = f"{arch}.expert_skip_"
    return FileReport(
        paths=file.paths,
        name=str(file.kv.get("general.name", file.paths[0].stem)),
        licence=file.kv.get("general.license"),
        architecture=arch,
        grouped=any(len(p.groups) > 1 for layer in layers for p in layer.projections),
        n_layers=int(file.kv.get(f"{arch}.block_count", len(layers))),
        n_experts=int(file.kv.get(f"{arch}.expert_count", 0)),
        n_experts_used=int(file.kv.get(f"{arch}.expert_used_count", 0)),
        n_params=file.n_params,
        tensor_bytes=file.tensor_bytes,
        file_bytes=file.file_bytes,
        bits_per_weight=file.bits_per_weight,
        roles=_roles(file.tensors),
        layers=layers,
        thresholds={
            key.removeprefix(skip_prefix): np.atleast_1d(value)
            for key, value in file.kv.items()
            if key.startswith(skip_prefix)
        },
        provenance={
            key: value
            for key, value in file.kv.items()
            if key.startswith(("moe2gguf.", "quantize.imatrix.")) and not key.startswith("moe2gguf.expert_order.")
        },
    )


def _layers(file: GgufFile) -> tuple[Layer, ...]:
    tensors: dict[int, dict[str, list[tuple[int, GgufTensor]]]] = {}
    for tensor in file.tensors:
        if (match := EXPERT_TENSOR.fullmatch(tensor.name)) and len(tensor.shape) == 3:
            by_projection = tensors.setdefault(int(match["layer"]), {})
            by_projection.setdefault(match["projection"], []).append((int(match["group"] or 0), tensor))
    layers = []
    for index, by_projection in sorted(tensors.items()):
        projections = tuple(
            Projection(
                name,
                tuple(
                    ExpertGroup(t.type, t.shape[0], t.n_params, t.n_bytes)
                    for _, t in sorted(by_projection[name], key=lambda numbered: numbered[0])
                ),
            )
            for name in ("gate", "up", "gate_up", "down")
            if name in by_projection
        )
        order = file.expert_order(index)
        layers.append(Layer(index, projections, None if order is None else tuple(int(e) for e in order)))
    return tuple(layers)


def _roles(tensors: tuple[GgufTensor, ...]) -> tuple[Role, ...]:
    by_role: dict[str, list[GgufTensor]] = {name: [] for name, _ in _ROLES}
    for tensor in tensors:
        by_role[next(name for name, pattern in _ROLES if re.search(pattern, tensor.name))].append(tensor)
    roles = []
    for name, members in by_role.items():
        if not members:
            continue
        params_by_type: dict[gguf.GGMLQuantizationType, int] = {}
        for tensor in members:
            params_by_type[tensor.type] = params_by_type.get(tensor.type, 0) + tensor.n_params
        types = sorted(params_by_type, key=lambda t: (-params_by_type[t], t.name))
        n_params, n_bytes = sum(params_by_type.values()), sum(t.n_bytes for t in members)
        roles.append(Role(name, len(members), n_params, n_bytes, tuple(types)))
    return tuple(roles)


def format_bytes(n_bytes: int) -> str:
    """Three significant digits and a binary unit: 5.39 MiB."""
    power = min(3, max(0, n_bytes.bit_length() - 1) // 10)
    value = n_bytes / 1024**power
    unit = ("B", "KiB", "MiB", "GiB")[power]
    return f"{value:.0f} {unit}" if power == 0 or value >= 100 else f"{value:.3g} {unit}"


def format_runs(projection: Projection) -> str:
    """`IQ2_XXS×9 · Q3_K×7`, in file order."""
    return " · ".join(f"{g.type.name}×{g.n_experts}" for g in projection.groups)


def render_report(report: FileReport) -> RenderableType:
    parts: list[RenderableType] = [_render_head(report), Text(), _render_roles(report)]
    if report.layers:
        parts += [Text(), _render_layers(report)]
    if report.provenance:
        parts += [Text(), _render_provenance(report)]
    return Group(*parts)


def _render_head(report: FileReport) -> Table:
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    head.add_row("model", Text(report.name))
    layout = "grouped experts: needs moe2gguf's runtime" if report.grouped else "stock: one type per tensor"
    head.add_row("architecture", Text(f"{report.architecture or 'not stated'} ({layout})"))
    if report.n_experts:
        head.add_row(
            "experts",
            f"{report.n_experts} in each of {len(report.layers)} layers (of {report.n_layers}), "
            f"{report.n_experts_used} used per token",
        )
    shards = f" in {len(report.paths)} shards" if len(report.paths) > 1 else ""
    head.add_row("parameters", f"{report.n_params:,}")
    head.add_row("file", f"{report.file_bytes:,} bytes{shards} ({format_bytes(report.file_bytes)})")
    head.add_row("tensors", f"{report.tensor_bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight")
    return head


def _render_roles(report: FileReport) -> Table:
    table = Table(title="Bytes by role", title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("role")
    for header in ("tensors", "parameters", "bytes", "share", "bits/weight"):
        table.add_column(header, justify="right")
    table.add_column("types")
    for role in report.roles:
        table.add_row(
            role.name,
            f"{role.n_tensors}",
            f"{role.n_params:,}",
            format_bytes(role.n_bytes),
            f"{role.n_bytes / report.tensor_bytes:.1%}",
            f"{role.n_bytes * 8 / role.n_params:.2f}",
            " ".join(t.name for t in role.types),
        )
    return table


def merged_projections(report: FileReport) -> list[tuple[str, str]]:
    """(label, projection name) of the columns worth showing: gate and up are one where they agree."""
    names = [n for n in ("gate", "up", "gate_up", "down") if any(_projection(layer, n) for layer in report.layers)]
    pairs = [(_projection(layer, "gate"), _projection(layer, "up")) for layer in report.layers]
    if all(gate and up and gate.types == up.types for gate, up in pairs):
        names.remove("up")
        return [("gate and up" if name == "gate" else name, name) for name in names]
    return [("gate and up" if name == "gate_up" else name, name) for name in names]


def _projection(layer: Layer, name: str) -> Projection | None:
    return next((p for p in layer.projections if p.name == name), None)


def _render_layers(report: FileReport) -> Table:
    columns = merged_projections(report)
    thresholds = {k: v for k, v in report.thresholds.items() if len(v) == report.n_layers}
    table = Table(
        title="Experts by layer, in file order",
        title_justify="left",
        box=None,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    table.add_column("layer", justify="right")
    for label, _ in columns:
        table.add_column(label)
    table.add_column("bits/weight", justify="right")
    table.add_column("order")
    for key in thresholds:
        table.add_column(f"skip {key}", justify="right")
    for layer in report.layers:
        cells = [format_runs(p) if (p := _projection(layer, name)) else "–" for _, name in columns]
        table.add_row(
            f"{layer.index}",
            *cells,
            f"{layer.bits_per_weight:.2f}",
            "checkpoint's" if layer.expert_order is None else "sorted",
            *(f"{values[layer.index]:.4g}" for values in thresholds.values()),
        )
    return table


def _render_provenance(report: FileReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in sorted(report.provenance.items()):
        text = str(value)
        table.add_row(key, Text(text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"))
    return table
