"""What a conversion will take, before the hours of work: bytes by role, memory, disk, time.

Bytes are exact for the allocation shown. Memory is arithmetic on the shapes.
"""

import dataclasses
import re
from collections import Counter
from math import prod
from pathlib import Path

import gguf
import torch
from rich.console import Group, RenderableType
from rich.table import Table

from moe2gguf import ggml
from moe2gguf.allocate import Allocation, describe_speed, reachable_bytes
from moe2gguf.backward import INPUTS_BYTES, LOGITS_CHUNK_TOKENS
from moe2gguf.calibrate import BATCH_TOKENS, GRADED_TOKENS
from moe2gguf.costs import CostTable, cost_table
from moe2gguf.dtypes import DTYPES, settled
from moe2gguf.durations import (
    calibration_seconds,
    is_of_experts,
    measured_rates,
    n_branches,
    quantise_seconds,
    writing_seconds,
)
from moe2gguf.ebss import BEAMS, n_groups_at_once
from moe2gguf.encode_experts import (
    CHUNK_BYTES,
    CHUNK_INPUT_BYTES,
    LAYER_SAMPLE_TOKENS,
    MAX_EXPERT_TOKENS,
    chunk_scale,
)
from moe2gguf.encode_matrices import MAX_COLUMNS
from moe2gguf.ggml import QuantType
from moe2gguf.llama import available_cores, memory_bytes
from moe2gguf.pipeline import (
    Budget,
    Calibration,
    Choice,
    fit_budget,
    outfile_for,
    sequence_length,
    speeds_for,
    statistics_at_hand,
    work_folder_for,
)
from moe2gguf.probes import BRANCHES_BYTES
from moe2gguf.prune import n_kept, shrunk
from moe2gguf.router import TRIALS_BYTES, held_out
from moe2gguf.sample import kv_bytes_per_token, n_at_once, writer_type
from moe2gguf.settings import DEFAULT_QUANTIZER, Quantizer
from moe2gguf.source import Source, layer_of, open_source
from moe2gguf.stream import check_runs
from moe2gguf.streams import AWAY_BYTES
from moe2gguf.tuning import BATCH_TOKENS as TUNING_BATCH_TOKENS
from moe2gguf.tuning import per_step

GIB = 1 << 30
F32_BYTES = 4
# interpreter, torch and the libraries, before any tensor
BASE_BYTES = GIB // 2
# numba, what it compiles, and what the solver leaves behind
COMPILER_BYTES = GIB // 3
# the runtime, and what it and the tokenizer leave behind
WRITER_BYTES = GIB // 6
# of a logit that is drawn from: in f32 twice, its probability in f64, and the sum of those before it
LOGIT_BYTES = 24
# logits, their softmax for drawing labels and for the loss, and gradients
LOSS_COPIES = 6
# what threads' allocators keep of what is freed, measured
RETAINED = 1.12
# a layer while its experts are fused, as a multiple of it as it is held: they lie there twice in 16 bits, or nearly so
LOADING = {torch.float32: 1.65, torch.bfloat16: 2.0}


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
    measured: bool  # whether the allocation rests on statistics, or on a rule of thumb
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
    prune_share: float = 0.0,
    work_folder: Path | None,
    resume: bool = True,
    pre_tokenizer: str | None,
    model_name: str | None = None,
    metadata_file: Path | None = None,
    n_threads: int | None = None,
) -> ConversionPlan:
    """Uses the statistics at hand if they fit the request, unless nothing is to be resumed, and says whether it did."""
    source = open_source(model, pre_tokenizer=pre_tokenizer, model_name=model_name, metadata_file=metadata_file)
    check_runs(source.path)
    target = outfile_for(source, outfile, budget)
    work = work_folder or work_folder_for(source, target)
    written_bytes = int(source.n_params * ggml.bits_per_weight(writer_type(source)) / 8)
    if prune_share:
        source = shrunk(source, n_kept(source, prune_share))
    calibration = settled(calibration, source, quantizer.device)
    # those of a pruned model are for another checkpoint, which need not be there yet
    stats = statistics_at_hand(source, calibration, work) if resume and not prune_share else None
    table = cost_table(source, stats, layout=choice.layout, types=choice.types, overrides=choice.overrides)
    speeds = None
    if stats is not None:
        speeds = speeds_for(source, choice, work, n_threads or available_cores(), save=False)
    allocation, _ = fit_budget(source, stats, table, budget, choice, speeds=speeds)
    length = sequence_length(source, calibration)
    dtype = DTYPES[calibration.dtype]
    rates = measured_rates(source, n_threads or available_cores(), dtype, quantizer.device)
    # hyper-connections: several streams of hidden states
    n_streams = source.hparams.get("hc_mult", source.hparams.get("hc_count", 1))
    width = n_streams * source.tensor("token_embd.weight").shape[1]
    hidden = calibration.n_sequences * length * width * F32_BYTES
    # what routers are given, where that is not what experts are
    scored = hidden if any(re.search(r"ffn_gate_inp\.scale|ffn_latent_down", t.name) for t in source.tensors) else 0
    branches_bytes = int(n_branches(table) * calibration.n_probe_tokens / (calibration.n_sequences * length) * hidden)
    layer_bytes, outer_bytes = _layer_bytes(source, dtype), F32_BYTES * _outer_params(source)
    loading_bytes = LOADING[dtype] * layer_bytes
    # what down projections of an expert are given, and how many experts are quantised at a time
    widest, expert = _widest_expert(source), next(t for t in source.tensors if "ffn_down_exps" in t.name)
    n_expert_tokens = source.n_expert_used / source.n_expert * calibration.n_sequences * length + LAYER_SAMPLE_TOKENS
    n_expert_tokens = min(n_expert_tokens, MAX_EXPERT_TOKENS + LAYER_SAMPLE_TOKENS)
    inputs = 2 * F32_BYTES * n_expert_tokens * expert.shape[-1]
    scale = chunk_scale(n_threads or available_cores(), quantizer.device)
    by_width, by_inputs = -(-scale * CHUNK_BYTES // (4 * widest**2)), int(scale * CHUNK_INPUT_BYTES / inputs)
    n_chunk = max(1, min(source.n_expert, by_width, by_inputs))
    roles = _roles(source, table, allocation)
    # of gradients, in 16 bits
    moments_bytes = 0
    if calibration.sensitivity == "gradient":
        moments_bytes = 2 * source.n_layer * source.tensor("token_embd.weight").shape[1] ** 2
    vocabulary = source.tensor("token_embd.weight")
    logits_bytes = LOSS_COPIES * LOGITS_CHUNK_TOKENS * vocabulary.shape[0] * F32_BYTES
    calibration_bytes = min(branches_bytes, BRANCHES_BYTES) + max(
        loading_bytes + hidden,
        # the stream, what the experts are given of it, and that once more while it is put together or squared; experts
        # in 16 bits while they are probed
        (1 + 4 / 3 / dtype.itemsize) * layer_bytes + 3 * hidden + scored,
        # the head, and in 16 bits while it is probed
        outer_bytes + prod(vocabulary.shape) * F32_BYTES / 2 + hidden + logits_bytes,
    )
    if calibration.sensitivity == "gradient":
        graded = min(GRADED_TOKENS, calibration.n_sequences * length) / (calibration.n_sequences * length) * hidden
        # what layers are given; gradients on their way, and of the layer at hand, whose experts' inputs they go with
        graded_bytes = min(source.n_layer * graded, INPUTS_BYTES) + 4 * graded
        calibration_bytes = max(
            calibration_bytes,
            layer_bytes + _graph_bytes(source, max(BATCH_TOKENS, length)) + graded_bytes,
            outer_bytes + logits_bytes + graded_bytes,
        )
        calibration_bytes += moments_bytes
    sampled_bytes, writer_bytes = (
        (0, 0) if calibration.text_paths else (sampling_bytes(source, calibration), WRITER_BYTES)
    )
    largest_tensor = max(prod(t.shape) for t in source.tensors) * F32_BYTES
    return ConversionPlan(
        source=source,
        outfile=target,
        allocation=allocation,
        measured=stats is not None,
        reachable_bytes=reachable_bytes(table),
        roles=roles,
        dtype=calibration.dtype,
        device=quantizer.device,
        calibration_ram_bytes=int(BASE_BYTES + writer_bytes + max(RETAINED * calibration_bytes, sampled_bytes)),
        quantise_ram_bytes=int(
            BASE_BYTES
            + COMPILER_BYTES
            + RETAINED
            * (
                moments_bytes
                + max(
                    2 * largest_tensor,
                    outer_bytes + 2 * hidden,
                    loading_bytes + 2 * hidden,
                    # second moments of what each of its matrices is given, and one of them with its factor
                    layer_bytes + 3 * hidden + _beside_bytes(source),
                    # what the experts are given by two streams, which lie on disk; of a chunk what down projections are
                    # given
                    layer_bytes
                    + 2 * (hidden + scored)
                    + min(2 * hidden, AWAY_BYTES)
                    + n_chunk * (1.5 * inputs + _fed_back_bytes(expert.shape[1], expert.shape[2], n_chunk)),
                    _tuning_bytes(source, calibration.n_sequences, length, dtype) if quantizer.tuning else 0,
                )
            )
        ),
        # before: what of the probes is too much for memory, and all streams in what a killed run goes on from, twice
        # while it is renewed; after: experts until the file is written
        disk_bytes=allocation.tensor_bytes
        + moments_bytes
        + max(
            # with other scales once more
            (2 if quantizer.tuning else 1) * sum(role.n_bytes for role in roles if role.role == "expert") + 2 * hidden,
            max(0, branches_bytes - BRANCHES_BYTES) + 2 * (hidden + branches_bytes),
        )
        + (0 if stats is not None or calibration.text_paths else written_bytes)
        # the pruned checkpoint, in 16 bits
        + (2 * source.n_params if prune_share else 0),
        calibration_seconds=0.0
        if stats is not None
        else calibration_seconds(source, table, calibration, length, rates, pruned=bool(prune_share)),
        writing_seconds=0.0 if stats is not None else writing_seconds(source, calibration, length, rates),
        quantise_seconds=quantise_seconds(
            source, calibration, length, quantizer, rates, n_threads or available_cores()
        ),
        cold_experts=(
            None if stats is None else sum(int((layer.n_tokens_E < 32).sum()) for layer in stats.layers.values())
        ),
    )


def sampling_bytes(source: Source, calibration: Calibration) -> int:
    """Of memory while the model writes its own text: keys and values of all sequences side by side, in 16 bits, and the
    logits of a token of each. The model itself is mapped from disk, and written there one tensor at a time."""
    length, kv_bytes = sequence_length(source, calibration), kv_bytes_per_token(source)
    if calibration.writer == "ebss":
        n_parallel = BEAMS * n_groups_at_once(calibration.n_sequences, length, kv_bytes)
    else:
        n_parallel = n_at_once(calibration.n_sequences, length, kv_bytes)
    cache_bytes = kv_bytes * length * n_parallel
    logits_bytes = LOGIT_BYTES * n_parallel * source.tensor("token_embd.weight").shape[0]
    largest_tensor = max(prod(t.shape) for t in source.tensors) * F32_BYTES
    return max(cache_bytes + logits_bytes, 2 * largest_tensor)


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


def _layer_bytes(source: Source, dtype: torch.dtype) -> int:
    """Of the largest layer, as the stream holds it."""
    per_layer = Counter[int]()
    for tensor in source.tensors:
        if (layer := layer_of(tensor.name)) is not None:
            per_layer[layer] += prod(tensor.shape) * (dtype.itemsize if is_of_experts(tensor) else F32_BYTES)
    return max(per_layer.values())


def _widest_expert(source: Source) -> int:
    return max(t.shape[-1] for t in source.tensors if is_of_experts(t))


def _fed_back_bytes(n_hidden: int, n_intermediate: int, n_chunk: int) -> int:
    """Of an expert while its matrices are quantised: second moments of what they are given and what is given in the
    model, of most tokens and of all, damped, their factor, and what each matrix is fitted by; where several experts go
    side by side each matrix has its own; of gradients, for gate's and up's rows. And, measured, a dozen times each
    matrix."""
    sides, matrix = 4 if n_chunk > 1 else 0, 12 * n_hidden * n_intermediate
    gate_up = (7 + sides) * n_hidden**2 + 2 * matrix + 2 * n_intermediate**2
    return F32_BYTES * max(gate_up, (7 + sides // 2) * n_intermediate**2 + matrix)


def _tuning_bytes(source: Source, n_sequences: int, length: int, dtype: torch.dtype) -> float:
    """Layer, or head, as the file has it, on the way back of a step; or as the model's own stream goes through it."""
    vocabulary = source.tensor("token_embd.weight").shape
    head_bytes = F32_BYTES * prod(vocabulary)
    # what a layer is given, by all of the text, by what is held out, and in this step
    n_held_out = int(held_out(n_sequences, length).sum())
    hidden, held_out_bytes, step = (
        F32_BYTES * n * length * vocabulary[1] for n in (n_sequences, n_held_out, per_step(n_sequences, length))
    )
    # Adam's two moments, gradient, value, and value at first of each super-block's scale
    states = 5 * F32_BYTES * source.n_params / gguf.QK_K
    layer_bytes = _layer_bytes(source, dtype)
    return states + max(
        # two streams, one of them on disk later; embedding and head lie there while text is embedded
        F32_BYTES * _outer_params(source) + head_bytes + 2 * hidden,
        LOADING[dtype] * layer_bytes + hidden + min(hidden, AWAY_BYTES / 2),
        min(2 * hidden, AWAY_BYTES)
        + min(source.n_layer * step, INPUTS_BYTES)
        + 4 * step
        + max(
            layer_bytes + _graph_bytes(source, max(TUNING_BATCH_TOKENS, length)),
            # the model's head, the file's, and its gradient
            F32_BYTES * _outer_params(source)
            + 2 * head_bytes
            + LOSS_COPIES * LOGITS_CHUNK_TOKENS * vocabulary[0] * F32_BYTES,
        ),
        # through the file as it was, as it is, and with one layer as it was
        layer_bytes + 4 * held_out_bytes + min(source.n_layer * held_out_bytes, TRIALS_BYTES),
    )


def _beside_bytes(source: Source) -> int:
    """Queries, keys and values share theirs."""
    of_layer = Counter[int]()
    widest = 0
    for tensor in source.tensors:
        layer, n_columns = layer_of(tensor.name), tensor.shape[-1]
        if layer is not None and tensor.quantisable and len(tensor.shape) == 2 and n_columns <= MAX_COLUMNS:
            widest = max(widest, n_columns)
            of_layer[layer] += 0 if re.search("attn_[kv].weight$", tensor.name) else 2 * F32_BYTES * n_columns**2
    return max(of_layer.values(), default=0) + 20 * widest**2


def _graph_bytes(source: Source, n_tokens: int) -> int:
    """What one layer keeps of a batch for the way back: what each matrix is given and gives. Gate and up are given the
    same, which makes room for activations."""
    share = source.n_expert_used / source.n_expert
    of_layer = Counter[int]()
    for tensor in source.tensors:
        if (layer := layer_of(tensor.name)) is not None and tensor.quantisable:
            n_experts = share * tensor.shape[0] if is_of_experts(tensor) else 1
            of_layer[layer] += int(F32_BYTES * n_tokens * n_experts * sum(tensor.shape[-2:]))
    return max(of_layer.values())


def _outer_params(source: Source) -> int:
    return sum(prod(t.shape) for t in source.tensors if layer_of(t.name) is None)


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
        head.add_row("coverage", f"{plan.cold_experts} experts saw fewer than 32 calibration tokens")
    else:
        head.add_row("types", "provisional: without statistics all weights count alike; calibration decides")
    head.add_row("run in", f"{plan.dtype} on {plan.device}")
    needed, there = (plan.calibration_ram_bytes, plan.quantise_ram_bytes), memory_bytes()
    memory = f"calibration {needed[0] / GIB:.1f} GiB, quantisation {needed[1] / GIB:.1f} GiB"
    if max(needed) > there:
        memory += f"; this machine has {there / GIB:.1f}: fewer --sequences or --dtype bf16 take less"
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
