"""What a conversion will take, before the hours of work: bytes by role, memory, disk, time.

Bytes are exact for the allocation shown. Memory is arithmetic on the shapes.
"""

import dataclasses
from collections import Counter
from math import prod
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from moe2gguf import ggml
from moe2gguf.allocate import Allocation, describe_speed, reachable_bytes
from moe2gguf.calibration_text import sequence_length
from moe2gguf.costs import CostTable, cost_table
from moe2gguf.dtypes import DTYPES, settled
from moe2gguf.durations import calibration_seconds, measured_rates, n_branches, quantise_seconds, writing_seconds
from moe2gguf.experts import CPU
from moe2gguf.fitting import fit_budget, speeds_for
from moe2gguf.ggml import QuantType
from moe2gguf.llama import available_cores, memory_bytes
from moe2gguf.memory import Sizes, calibration_bytes, disk_bytes, quantise_bytes
from moe2gguf.pipeline import outfile_for
from moe2gguf.prune import n_kept, shrunk
from moe2gguf.run import Run
from moe2gguf.sample import writer_type
from moe2gguf.settings import DEFAULT_QUANTIZER, NO_SKIPPING, Budget, Calibration, Choice, Quantizer
from moe2gguf.skip import Skipping
from moe2gguf.source import Source, open_source
from moe2gguf.stats import SHRINKAGE_TOKENS
from moe2gguf.stream import check_runs
from moe2gguf.text import load_tokenizer
from moe2gguf.work_folder import statistics_at_hand, work_folder_for

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class RoleShare:
    role: str
    n_params: int
    n_bytes: int
    types: tuple[tuple[str, int], ...]  # type name, units of it

    @property
    def bits_per_weight(self) -> float:
        return self.n_bytes * 8 / self.n_params


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    source: Source
    outfile: Path
    allocation: Allocation
    measured: bool  # whether the allocation rests on statistics, these or a recipe's, or on a rule of thumb
    reachable_bytes: tuple[int, int]
    roles: tuple[RoleShare, ...]
    dtype: str  # what the model is run in, a key of DTYPES
    device: torch.device  # and on
    calibration_ram_bytes: int
    quantise_ram_bytes: int
    disk_bytes: int
    calibration_seconds: float
    writing_seconds: float  # of these, while the model writes its own text
    quantise_seconds: float
    cold_experts: int | None  # None without statistics


def make_plan(
    model: str,
    outfile: Path | None,
    budget: Budget,
    choice: Choice,
    calibration: Calibration,
    *,
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    skipping: Skipping = NO_SKIPPING,
    prune_share: float = 0.0,
    allocation: Allocation | None = None,
    device: torch.device = CPU,
    work_folder: Path | None,
    resume: bool = True,
    pre_tokenizer: str | None,
    model_name: str | None = None,
    metadata_file: Path | None = None,
    n_threads: int | None = None,
) -> ConversionPlan:
    """Uses the statistics at hand if they fit the request, unless nothing is to be resumed, and says whether it did.
    `allocation`: one that is decided, of a recipe. Raises what `convert` would before its first stage."""
    source = open_source(model, pre_tokenizer=pre_tokenizer, model_name=model_name, metadata_file=metadata_file)
    check_runs(source.path)
    load_tokenizer(source.path)
    skipping.check(source.n_expert_used)
    target = outfile_for(source, outfile, budget)
    work = work_folder or work_folder_for(source, target)
    written_bytes = int(source.n_params * ggml.bits_per_weight(writer_type(source)) / 8)
    if prune_share:
        source = shrunk(source, n_kept(source, prune_share))
        target = outfile_for(source, outfile, budget)
    calibration = settled(calibration, source, device)
    n_threads = n_threads or available_cores()
    # those of a pruned model are for another checkpoint, which need not be there yet
    stats = statistics_at_hand(source, calibration, work) if resume and not prune_share else None
    table = cost_table(source, stats, layout=choice.layout, types=choice.types, overrides=choice.overrides)
    is_decided = stats is not None or allocation is not None
    if allocation is None:
        run = Run(work, n_threads, device)
        speeds = None if stats is None else speeds_for(source, choice, run, save=False)
        allocation, _ = fit_budget(source, stats, table, budget, choice, speeds=speeds)
    length = sequence_length(source, calibration)
    rates = measured_rates(source, n_threads, DTYPES[calibration.dtype], device)
    sizes = Sizes(source, calibration, length, DTYPES[calibration.dtype], n_threads, device, n_branches(table))
    roles = _roles(source, table, allocation)
    expert_bytes = sum(role.n_bytes for role in roles if role.role == "expert")
    writes_text = stats is None and not calibration.text_paths
    return ConversionPlan(
        source=source,
        outfile=target,
        allocation=allocation,
        measured=is_decided,
        reachable_bytes=reachable_bytes(table),
        roles=roles,
        dtype=calibration.dtype,
        device=device,
        calibration_ram_bytes=calibration_bytes(sizes),
        quantise_ram_bytes=quantise_bytes(sizes, quantizer),
        disk_bytes=allocation.tensor_bytes
        + disk_bytes(sizes, expert_bytes, quantizer)
        + (written_bytes if writes_text else 0)
        # the pruned checkpoint, in 16 bits
        + (2 * source.n_params if prune_share else 0),
        calibration_seconds=0.0
        if stats is not None
        else calibration_seconds(source, table, calibration, length, rates, pruned=bool(prune_share)),
        writing_seconds=0.0 if stats is not None else writing_seconds(source, calibration, length, rates),
        quantise_seconds=quantise_seconds(source, calibration, length, quantizer, rates, n_threads, device),
        cold_experts=None if stats is None else sum(experts.n_cold for experts in stats.layers.values()),
    )


def _roles(source: Source, table: CostTable, allocation: Allocation) -> tuple[RoleShare, ...]:
    params, n_bytes, types = Counter[str](), Counter[str](), dict[str, Counter[str]]()
    for u, unit in enumerate(table.units):
        quant_type = allocation.types[unit.name]
        params[unit.role] += unit.n_rows * unit.n_columns
        n_bytes[unit.role] += int(table.bytes_UJ[u, table.types.index(quant_type)])
        types.setdefault(unit.role, Counter())[quant_type.name] += 1
    for name, quant_type in table.fixed.items():
        shape = source.tensor(name).shape
        role = "kept in F32" if quant_type == QuantType.F32 else "not measured"
        params[role] += prod(shape)
        n_bytes[role] += prod(shape[:-1]) * ggml.row_bytes(quant_type, shape[-1])
        types.setdefault(role, Counter())[quant_type.name] += 1
    return tuple(RoleShare(r, params[r], n_bytes[r], tuple(sorted(types[r].items()))) for r in sorted(params))


def render_plan(plan: ConversionPlan) -> RenderableType:
    allocation, source = plan.allocation, plan.source

    def bpw(n_bytes: int) -> str:
        return f"{n_bytes * 8 / source.n_params:.2f}"

    head = Table.grid(padding=(0, 2))
    head.add_row(
        "model",
        f"{source.name} ({source.arch}): {source.n_params / 1e9:.3f} B parameters, {source.n_layer} layers, "
        f"{source.n_expert_used} of {source.n_expert} experts",
    )
    head.add_row("file", f"{plan.outfile}, {allocation.layout} layout")
    low, high = plan.reachable_bytes
    head.add_row(
        "tensors",
        f"{allocation.tensor_bytes:,} bytes, {allocation.bits_per_weight:.3f} bits per weight "
        f"(reachable: {bpw(low)} to {bpw(high)})",
    )
    if plan.measured:
        head.add_row("predicted", f"mean KL divergence {allocation.predicted_kl:.4f} nats per token")
        if allocation.decode_seconds is not None:
            head.add_row("decoding", describe_speed(allocation))
    else:
        head.add_row("types", "provisional: without statistics all weights count alike; calibration decides")
    if plan.cold_experts is not None:
        head.add_row("coverage", f"{plan.cold_experts} experts saw fewer than {SHRINKAGE_TOKENS} calibration tokens")
    head.add_row("run in", f"{plan.dtype} on {plan.device}")
    needed, there = (plan.calibration_ram_bytes, plan.quantise_ram_bytes), memory_bytes()
    memory = f"calibration {needed[0] / GIB:.1f} GiB, quantisation {needed[1] / GIB:.1f} GiB"
    if max(needed) > there:
        less = "fewer --sequences take" if plan.dtype == "bf16" else "fewer --sequences or --dtype bf16 take"
        memory += f"; this machine has {there / GIB:.1f}: {less} less"
    head.add_row("memory", memory)
    head.add_row("disk", f"{plan.disk_bytes / GIB:.2f} GiB while running")
    writing = f"the model's own text {_duration(plan.writing_seconds)} of it, none with --text FILE"
    head.add_row(
        "time",
        f"about {_duration(plan.calibration_seconds)} calibration"
        + (f" ({writing})" if plan.writing_seconds else "")
        + f", {_duration(plan.quantise_seconds)} quantisation",
    )
    roles = Table("role", "parameters", "bytes", "bpw", "types", title="allocation by role")
    for role in plan.roles:
        roles.add_row(
            role.role,
            f"{role.n_params:,}",
            f"{role.n_bytes:,}",
            f"{role.bits_per_weight:.2f}",
            ", ".join(f"{name} x{n}" for name, n in role.types),
        )
    return Group(head, roles)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
