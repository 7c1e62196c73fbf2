"""How long the stages of a conversion will take: arithmetic on the model's shapes, and a few short measurements of this
machine.

Shapes: K columns, N rows, D hidden, I intermediate, L tokens of a sequence.
"""

import functools
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from moe2gguf import ggml
from moe2gguf.calibrate import GRADED_TOKENS
from moe2gguf.costs import CANDIDATES, CostTable
from moe2gguf.ebss import BEAMS
from moe2gguf.encode_experts import FIT_SAMPLE_TOKENS, MAX_SLOPE_TOKENS, chunk_scale
from moe2gguf.encode_matrices import DAMPINGS, EMBEDDING_SAMPLE_ROWS, SAMPLE_ROWS
from moe2gguf.experts import CPU
from moe2gguf.feedback import curvature, quantize
from moe2gguf.ggml import QuantType
from moe2gguf.llama import memory_bytes
from moe2gguf.measure import MAX_ERROR_ROWS, MAX_MATRIX_ROWS
from moe2gguf.probes import EXPERT_PROBE_TYPES
from moe2gguf.router import DAMPINGS as ROUTER_DAMPINGS
from moe2gguf.router import HELD_OUT, MAX_HELD_OUT_TOKENS, MAX_TOKENS, held_out, taken
from moe2gguf.sample import ONE_THREAD_FILE_BYTES, draw, kv_bytes_per_token, n_at_once, writer_type
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import Source, SourceTensor, expert_axis, layer_of
from moe2gguf.tuning import MAX_STEP_TOKENS, N_STEPS, PASSES

# what is measured
TEXT_TOKENS, EXPERT_TOKENS, MATMUL_FLOPS = 4096, 512, 4e9
ENCODED_ROWS, ENCODED_COLUMNS = 512, 256
FED_BACK_ROWS, FACTORED_COLUMNS = 256, 1024
DRAWN_SEQUENCES, DRAWN_TOKENS = 32, 4096
# of types in between in bits and in time
ENCODED, FED_BACK = QuantType.IQ2_XXS, QuantType.IQ2_S
# from memory, and from a disk where the file has no room there
MEMORY_BYTES_PER_SECOND, DISK_BYTES_PER_SECOND = 10e9, 1e9
# where rows make up for each other, those at a time of the experts at hand are no more jobs
BUSY_WITH_ROWS = 8


@dataclass(frozen=True)
class Rates:
    """Of this machine, on all cores; of products, on the device that the model is run on."""

    matmul_flops: float  # per second, in experts of the model's own size: small ones are slower
    layer_flops: float  # the same in what the model is run in
    writer_flops: float  # the same on the CPU, where the model writes its text
    encoded_weights: float  # per second, by ggml
    probed_weights: float  # per second, by ggml in each of the probes' types
    decoded_weights: float  # per second, by ggml, into a layer
    fed_back_weights: float  # per second and thread, with error feedback, second moments factored
    factor_seconds: float  # of second moments, damped, of FACTORED_COLUMNS
    draw_seconds: float  # of one logit


def measured_rates(
    source: Source, n_threads: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Rates:
    """`dtype` and `device`: what the model is run in and on."""
    expert = next(t for t in source.tensors if "ffn_down" in t.name and is_of_experts(t))
    _, n_hidden, n_intermediate = expert.shape
    flops = 2 * EXPERT_TOKENS * 3 * n_hidden * n_intermediate
    n_times = max(2, int(MATMUL_FLOPS / flops))

    @functools.cache
    def expert_flops(dtype: torch.dtype, device: torch.device) -> float:
        hidden_TD = torch.ones(TEXT_TOKENS, n_hidden, device=device)
        token_n = torch.arange(0, TEXT_TOKENS, TEXT_TOKENS // EXPERT_TOKENS, device=device)
        first_DI = torch.ones(n_hidden, 2 * n_intermediate, dtype=dtype, device=device)
        last_ID = torch.ones(n_intermediate, n_hidden, dtype=dtype, device=device)

        def run() -> None:
            for _ in range(n_times):
                gate_nI, up_nI = (hidden_TD[token_n].to(dtype) @ first_DI).chunk(2, 1)
                hidden_TD.index_add_(0, token_n, (torch.nn.functional.silu(gate_nI) * up_nI @ last_ID).float())
            hidden_TD[0].cpu()  # a GPU is asked, and waited for

        run()  # the first products start threads, and compile
        return n_times * flops / _seconds(run)

    random = np.random.default_rng(0)
    weight_NK = random.standard_normal((ENCODED_ROWS, ENCODED_COLUMNS), np.float32)
    logits_PV = random.standard_normal((DRAWN_SEQUENCES, DRAWN_TOKENS), np.float32)
    n_columns = min(FACTORED_COLUMNS, n_intermediate // 256 * 256 or 256)
    fed_back_ENK = torch.from_numpy(random.standard_normal((1, FED_BACK_ROWS, n_columns), np.float32))
    ones_EKK = torch.eye(FACTORED_COLUMNS)[None]
    few = curvature(ones_EKK[:, :n_columns, :n_columns], 0.1)

    def probe() -> None:
        for quant_type in EXPERT_PROBE_TYPES:
            ggml.encode(weight_NK, quant_type)

    blocks_NB = ggml.encode(weight_NK, FED_BACK)
    in_layer_NK = torch.empty(weight_NK.shape, dtype=dtype, device=device)

    def decode() -> None:
        in_layer_NK.copy_(torch.from_numpy(ggml.decode(blocks_NB, FED_BACK, ENCODED_COLUMNS)))

    def feed_back(n_rows: int) -> None:
        quantize(fed_back_ENK[:, :n_rows], FED_BACK, few, pool)

    # the first calls build a codebook's tables, and compile
    ggml.encode(weight_NK[:1], ENCODED)
    with ThreadPoolExecutor(1) as pool:
        feed_back(1)
        one_thread = _seconds(lambda: feed_back(FED_BACK_ROWS))
    return Rates(
        matmul_flops=expert_flops(torch.float32, device),
        layer_flops=expert_flops(dtype, device),
        writer_flops=expert_flops(torch.float32, CPU),
        encoded_weights=n_threads * weight_NK.size / _seconds(lambda: ggml.encode(weight_NK, ENCODED)),
        probed_weights=n_threads * weight_NK.size / _seconds(probe),
        decoded_weights=n_threads * weight_NK.size / _seconds(decode),
        fed_back_weights=fed_back_ENK.numel() / one_thread,
        factor_seconds=_seconds(lambda: curvature(ones_EKK, 0.1)),
        draw_seconds=_seconds(lambda: draw(logits_PV, random)) / logits_PV.size,
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def calibration_seconds(
    source: Source, table: CostTable, calibration: Calibration, length: int, rates: Rates, *, pruned: bool
) -> float:
    """The text, if the model writes it; a pass for the statistics, one more for pruning; probes; errors of experts."""
    n_tokens = calibration.n_sequences * length
    # a branch runs through half of the layers on average
    n_branch_tokens = n_branches(table) * calibration.n_probe_tokens
    layers, head = _layers_seconds(source, length, rates), _head_flops(source) / rates.matmul_flops
    seconds = layers * (n_tokens * (2 if pruned else 1) + n_branch_tokens / 2) + head * n_branch_tokens
    n_encoded = 0
    for unit in table.units:
        most = MAX_MATRIX_ROWS if unit.expert is None else len(unit.tensors) * MAX_ERROR_ROWS
        n_encoded += len(CANDIDATES) * unit.n_columns * min(unit.n_rows, most)
    if calibration.sensitivity == "gradient":  # forward, forward again for what is kept, and back
        n_graded = min(n_tokens, GRADED_TOKENS)
        seconds += 4 * n_graded * (layers + head)
        moments = 2 * n_graded * source.n_layer * source.tensor("token_embd.weight").shape[1] ** 2
        seconds += moments / rates.matmul_flops
    encoded = n_encoded / rates.encoded_weights + source.n_params / rates.probed_weights
    return writing_seconds(source, calibration, length, rates) + seconds + encoded


def writing_seconds(source: Source, calibration: Calibration, length: int, rates: Rates) -> float:
    """Of the model's own text: tokens of many sequences at a time, for which nearly all experts are read."""
    if calibration.text_paths:
        return 0.0
    n_beams = BEAMS if calibration.writer == "ebss" else 1
    n_sequences = n_beams * calibration.n_sequences
    n_steps = length * -(-n_sequences // n_at_once(n_sequences, length, kv_bytes_per_token(source)))
    n_bytes = source.n_params * ggml.bits_per_weight(writer_type(source)) / 8
    read = n_bytes / (MEMORY_BYTES_PER_SECOND if n_bytes < memory_bytes() else DISK_BYTES_PER_SECOND)
    flops = n_sequences * length * (_layers_flops(source) + _attention_flops(source, length) + _head_flops(source))
    n_threads = 1 if n_bytes < ONE_THREAD_FILE_BYTES else torch.get_num_threads()
    computed = flops / (rates.writer_flops * n_threads / torch.get_num_threads())
    drawn = n_sequences * length * _vocabulary(source) * rates.draw_seconds
    return max(n_steps * read, computed) + drawn


def quantise_seconds(
    source: Source,
    calibration: Calibration,
    length: int,
    quantizer: Quantizer,
    rates: Rates,
    n_threads: int,
    device: torch.device = CPU,
) -> float:
    """The text in two streams, part of it again for router calibration; second moments and their factors for each
    damping; the codes, for a few rows with each damping too; the rest by ggml's encoder, for each stream and for the
    file; experts decoded for each pass through what is quantised. With gradients their second moments too, by the
    experts' outputs; blocks of rows then wait for each other, which keeps BUSY_WITH_ROWS threads busy for each expert
    that is quantised at a time."""
    if not quantizer.feedback:
        return source.n_params / rates.encoded_weights
    n_tokens = calibration.n_sequences * length
    n_routed = n_tokens * source.n_expert_used + source.n_expert * FIT_SAMPLE_TOKENS
    layers, head, flops = _layers_seconds(source, length, rates), _head_flops(source) / rates.matmul_flops, 0.0
    n_moe_layers, n_of_experts, n_fed_back, n_sampled, n_columns = 0, 0, 0, 0.0, []
    # all of the text through each matrix beside the experts; queries, keys and values are given the same
    n_columns_beside = []
    n_outputs: list[int] = []
    has_head = any(tensor.name == "output.weight" for tensor in source.tensors)
    for tensor in source.tensors:
        if is_of_experts(tensor):
            _, n_rows, n_own_columns = tensor.shape
            n_of_experts += prod(tensor.shape)
            n_sampled += prod(tensor.shape) * min(SAMPLE_ROWS, n_rows) / n_rows
            flops += 4 * prod(tensor.shape) * n_own_columns  # fitted to what they will be given
            if not tensor.name.endswith("ffn_gate_exps.weight"):  # it shares up's inputs
                n_columns.append(n_own_columns)
            if "ffn_down" in tensor.name:
                n_moe_layers += 1
                if calibration.sensitivity == "gradient":  # of gate, up, and all that down projections give
                    n_outputs += [n_own_columns] * 2 * source.n_expert + [n_rows]
                    flops += 2 * prod(tensor.shape) * (n_rows + n_own_columns + 2 * MAX_SLOPE_TOKENS)
                    flops += 4 * source.n_expert * MAX_SLOPE_TOKENS * n_own_columns**2
            if calibration.sensitivity == "gradient":  # errors of rows to those after them
                flops += prod(tensor.shape) * n_rows
        elif tensor.quantisable and len(tensor.shape) == 2 and tensor.name != "token_embd.weight":
            n_fed_back += prod(tensor.shape)
            n_sampled += min(SAMPLE_ROWS, tensor.shape[0]) * tensor.shape[1]
            n_columns_beside.append(tensor.shape[1])
            flops += 0 if re.search("attn_[kv].weight$", tensor.name) else 2 * n_tokens * tensor.shape[1] ** 2
        elif tensor.name == "token_embd.weight" and has_head and calibration.sensitivity == "gradient":
            n_fed_back += prod(tensor.shape)
            n_sampled += EMBEDDING_SAMPLE_ROWS * tensor.shape[1]
            n_columns_beside.append(tensor.shape[1])
    n_fed_back += n_of_experts
    # second moments of what experts are given, by both streams
    flops += sum(2 * 2 * n_routed * n**2 for n in n_columns)
    # the model's own pass; two of what is quantised, of which one stops at the experts; an expert's own, for down
    seconds = 3.5 * n_tokens * layers
    seconds += sum(
        n_matrices * (len(DAMPINGS) + 1) * rates.factor_seconds * (n / FACTORED_COLUMNS) ** 3
        for n_matrices, own in ((source.n_expert, n_columns), (1, n_columns_beside))
        for n in own
    ) + sum(rates.factor_seconds * (n / FACTORED_COLUMNS) ** 3 for n in n_outputs)
    if calibration.sensitivity == "gradient":
        n_threads = min(n_threads, BUSY_WITH_ROWS * chunk_scale(n_threads, device))
    n_held_out = min(n_tokens / HELD_OUT, MAX_HELD_OUT_TOKENS)
    if quantizer.router != "none":
        n_hidden = source.tensor("token_embd.weight").shape[1]
        held_out_S = held_out(calibration.n_sequences, length)
        n_taken = length * int(taken(held_out_S, length, source.n_expert, source.n_expert_used).sum())
        flops += n_moe_layers * (
            2 * source.n_expert * min(n_taken, MAX_TOKENS) * n_hidden**2
            + 2 * len(ROUTER_DAMPINGS) * source.n_expert * n_hidden**3 / 3
        )
        # held-out tokens, a branch for each layer
        seconds += 2.5 * n_taken * layers + n_moe_layers * n_held_out * (layers / 2 + head)
    n_decoded = n_of_experts * (1 if quantizer.router == "none" else 2)
    if quantizer.tuning:  # forward, forward again for what is kept, and back, by activations and weights; then trials
        n_decoded += n_of_experts * (2 * N_STEPS + 4)
        seconds += 4 * min(PASSES * n_tokens, N_STEPS * MAX_STEP_TOKENS) * (layers + head) + n_tokens * layers
        seconds += source.n_layer * n_held_out * (layers / 2 + head)
    n_others = source.n_params - n_fed_back
    return (
        seconds
        + flops / rates.matmul_flops
        + n_decoded / rates.decoded_weights
        + (n_fed_back + len(DAMPINGS) * n_sampled) / (rates.fed_back_weights * n_threads)
        + (n_sampled + (2 if quantizer.router == "none" else 3) * n_others) / rates.encoded_weights
    )


def n_branches(table: CostTable) -> int:
    """Streams of the probes: the model's own, one for each matrix beside the experts, four for a layer of experts."""
    return (
        1
        + sum(1 for u in table.units if u.expert is None)
        + 4 * len({u.layer for u in table.units if u.expert is not None})
    )


def is_of_experts(tensor: SourceTensor) -> bool:
    """A matrix of each expert; routers have an axis of experts too."""
    return expert_axis(tensor.name) is not None and tensor.quantisable


def _layers_seconds(source: Source, length: int, rates: Rates) -> float:
    """Of one token through all layers. Attention is as fast in 16 bits as in 32."""
    return _layers_flops(source) / rates.layer_flops + _attention_flops(source, length) / rates.matmul_flops


def _layers_flops(source: Source) -> float:
    """Of one token with all layers' matrices."""
    share = source.n_expert_used / source.n_expert
    return sum(
        2 * prod(tensor.shape) * (share if is_of_experts(tensor) else 1)
        for tensor in source.tensors
        if layer_of(tensor.name) is not None
    )


def _attention_flops(source: Source, length: int) -> float:
    """Of one token; the output's columns are all heads' values."""
    return sum(4 * length * t.shape[1] for t in source.tensors if t.name.endswith("attn_output.weight"))


def _head_flops(source: Source) -> float:
    return 2 * prod(source.tensor("token_embd.weight").shape)


def _vocabulary(source: Source) -> int:
    return source.tensor("token_embd.weight").shape[0]
