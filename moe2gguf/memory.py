"""How much memory and disk stages take: arithmetic on the shapes of model and text, held against what was measured."""

import dataclasses
import re
from collections import Counter
from functools import cached_property
from math import prod

import gguf
import torch

from moe2gguf.backward import INPUTS_BYTES, LOGITS_CHUNK_TOKENS
from moe2gguf.calibrate import BATCH_TOKENS, GRADED_TOKENS
from moe2gguf.durations import is_of_experts
from moe2gguf.ebss import BEAMS, n_groups_at_once
from moe2gguf.encode_experts import (
    CHUNK_BYTES,
    CHUNK_INPUT_BYTES,
    FIT_SAMPLE_TOKENS,
    MAX_EXPERT_TOKENS,
    chunk_scale,
)
from moe2gguf.encode_matrices import MAX_COLUMNS
from moe2gguf.probes import BRANCHES_BYTES
from moe2gguf.router import TRIALS_BYTES, held_out
from moe2gguf.sample import kv_bytes_per_token, n_at_once
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import Source, layer_of
from moe2gguf.streams import AWAY_BYTES
from moe2gguf.tuning import BATCH_TOKENS as TUNING_BATCH_TOKENS
from moe2gguf.tuning import per_step

F32_BYTES = 4
# interpreter, torch and the libraries, before any tensor
BASE_BYTES = (1 << 30) // 2
# numba, what it compiles, and what the solver leaves behind
COMPILER_BYTES = (1 << 30) // 3
# the runtime, and what it and the tokenizer leave behind
WRITER_BYTES = (1 << 30) // 6
# of a logit that is drawn from: in f32 twice, its probability in f64, and the sum of those before it
LOGIT_BYTES = 24
# logits, their softmax for drawing labels and for the loss, and gradients
LOSS_COPIES = 6
# what threads' allocators keep of what is freed, measured
RETAINED = 1.12
# a layer while its experts are fused, as a multiple of it as it is held: they lie there twice in 16 bits, or nearly so
LOADING = {torch.float32: 1.65, torch.bfloat16: 2.0}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of what stages hold."""

    source: Source
    calibration: Calibration
    length: int  # tokens of a sequence
    dtype: torch.dtype  # that the model is run in
    n_threads: int
    device: torch.device
    n_branches: int  # streams of the probes

    @cached_property
    def vocabulary(self) -> tuple[int, ...]:
        """(V, D)"""
        return self.source.tensor("token_embd.weight").shape

    @property
    def n_tokens(self) -> int:
        return self.calibration.n_sequences * self.length

    @cached_property
    def hidden(self) -> int:
        """Hidden states of all text; with hyper-connections in several streams."""
        n_streams = self.source.hparams.get("hc_mult", self.source.hparams.get("hc_count", 1))
        return self.n_tokens * n_streams * self.vocabulary[1] * F32_BYTES

    @property
    def scored(self) -> int:
        """What routers are given, where that is not what experts are."""
        apart = r"ffn_gate_inp\.scale|ffn_latent_down"
        return self.hidden if any(re.search(apart, t.name) for t in self.source.tensors) else 0

    @property
    def branches(self) -> int:
        """The probes' streams."""
        return int(self.n_branches * self.calibration.n_probe_tokens / self.n_tokens * self.hidden)

    @cached_property
    def layer(self) -> int:
        return _layer_bytes(self.source, self.dtype)

    @property
    def loading(self) -> float:
        return LOADING[self.dtype] * self.layer

    @cached_property
    def outer(self) -> int:
        """Embedding, last norm and head."""
        return F32_BYTES * _outer_params(self.source)

    @property
    def logits(self) -> int:
        return LOSS_COPIES * LOGITS_CHUNK_TOKENS * self.vocabulary[0] * F32_BYTES

    @property
    def moments(self) -> int:
        """Of gradients at every layer, in 16 bits."""
        if self.calibration.sensitivity != "gradient":
            return 0
        return 2 * self.source.n_layer * self.vocabulary[1] ** 2

    @property
    def largest_tensor(self) -> int:
        return max(prod(t.shape) for t in self.source.tensors) * F32_BYTES


def calibration_bytes(sizes: Sizes) -> int:
    """Of memory, at most."""
    hidden, layer, outer, logits = sizes.hidden, sizes.layer, sizes.outer, sizes.logits
    needed = min(sizes.branches, BRANCHES_BYTES) + max(
        sizes.loading + hidden,
        # the stream, what the experts are given of it, and that once more while it is put together or squared; experts
        # in 16 bits while they are probed
        (1 + 4 / 3 / sizes.dtype.itemsize) * layer + 3 * hidden + sizes.scored,
        # the head, and in 16 bits while it is probed
        outer + prod(sizes.vocabulary) * F32_BYTES / 2 + hidden + logits,
    )
    if sizes.calibration.sensitivity == "gradient":
        graded = min(GRADED_TOKENS, sizes.n_tokens) / sizes.n_tokens * hidden
        # what layers are given; gradients on their way, and of the layer at hand, whose experts' inputs they go with
        graded_bytes = min(sizes.source.n_layer * graded, INPUTS_BYTES) + 4 * graded
        needed = max(
            needed,
            layer + _graph_bytes(sizes.source, max(BATCH_TOKENS, sizes.length)) + graded_bytes,
            outer + logits + graded_bytes,
        )
    needed = RETAINED * (needed + sizes.moments)
    if sizes.calibration.text_paths:
        return int(BASE_BYTES + needed)
    return int(BASE_BYTES + WRITER_BYTES + max(needed, sampling_bytes(sizes)))


def quantise_bytes(sizes: Sizes, quantizer: Quantizer) -> int:
    """Of memory, at most."""
    hidden = sizes.hidden
    needed = max(
        2 * sizes.largest_tensor,
        sizes.outer + 2 * hidden,
        sizes.loading + 2 * hidden,
        # second moments of what each of its matrices is given, and one of them with its factor
        sizes.layer + 3 * hidden + _beside_bytes(sizes.source),
        # what the experts are given by two streams, which lie on disk
        sizes.layer + 2 * (hidden + sizes.scored) + min(2 * hidden, AWAY_BYTES) + _chunk_bytes(sizes),
        _tuning_bytes(sizes) if quantizer.tuning else 0,
    )
    return int(BASE_BYTES + COMPILER_BYTES + RETAINED * (sizes.moments + needed))


def disk_bytes(sizes: Sizes, expert_bytes: int, quantizer: Quantizer) -> int:
    """Beside the file and what is in it of experts, the most of: what of the probes is too much for memory, and all
    streams in what a killed run goes on from, twice while it is renewed; experts until the file is written, tuned with
    other scales once more."""
    kept = (2 if quantizer.tuning else 1) * expert_bytes + 2 * sizes.hidden
    probed = max(0, sizes.branches - BRANCHES_BYTES) + 2 * (sizes.hidden + sizes.branches)
    return sizes.moments + max(kept, probed)


def sampling_bytes(sizes: Sizes) -> int:
    """Of memory while the model writes its own text: keys and values of all sequences side by side, in 16 bits, and the
    logits of a token of each. The model itself is mapped from disk, and written there one tensor at a time."""
    length, kv_bytes, calibration = sizes.length, kv_bytes_per_token(sizes.source), sizes.calibration
    if calibration.writer == "ebss":
        n_parallel = BEAMS * n_groups_at_once(calibration.n_sequences, length, kv_bytes)
    else:
        n_parallel = n_at_once(calibration.n_sequences, length, kv_bytes)
    cache_bytes = kv_bytes * length * n_parallel
    logits_bytes = LOGIT_BYTES * n_parallel * sizes.vocabulary[0]
    return max(cache_bytes + logits_bytes, 2 * sizes.largest_tensor)


def _chunk_bytes(sizes: Sizes) -> float:
    """Of the experts that are quantised at a time; of each, what down projections are given."""
    source = sizes.source
    down = next(t for t in source.tensors if "ffn_down_exps" in t.name)
    n_tokens = source.n_expert_used / source.n_expert * sizes.n_tokens
    inputs = 2 * F32_BYTES * (min(n_tokens, MAX_EXPERT_TOKENS) + FIT_SAMPLE_TOKENS) * down.shape[-1]
    scale, widest = chunk_scale(sizes.n_threads, sizes.device), _widest_expert(source)
    by_width, by_inputs = -(-scale * CHUNK_BYTES // (4 * widest**2)), int(scale * CHUNK_INPUT_BYTES / inputs)
    n_chunk = max(1, min(source.n_expert, by_width, by_inputs))
    return n_chunk * (1.5 * inputs + _fed_back_bytes(down.shape[1], down.shape[2], n_chunk))


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


def _tuning_bytes(sizes: Sizes) -> float:
    """Layer, or head, as the file has it, on the way back of a step; or as the model's own stream goes through it."""
    source, n_sequences, length = sizes.source, sizes.calibration.n_sequences, sizes.length
    head_bytes = F32_BYTES * prod(sizes.vocabulary)
    # what a layer is given, by all of the text, by what is held out, and in this step
    n_held_out = int(held_out(n_sequences, length).sum())
    hidden, held_out_bytes, step = (
        F32_BYTES * n * length * sizes.vocabulary[1] for n in (n_sequences, n_held_out, per_step(n_sequences, length))
    )
    # Adam's two moments, gradient, value, and value at first of each super-block's scale
    states = 5 * F32_BYTES * source.n_params / gguf.QK_K
    return states + max(
        # two streams, one of them on disk later; embedding and head lie there while text is embedded
        sizes.outer + head_bytes + 2 * hidden,
        sizes.loading + hidden + min(hidden, AWAY_BYTES / 2),
        min(2 * hidden, AWAY_BYTES)
        + min(source.n_layer * step, INPUTS_BYTES)
        + 4 * step
        + max(
            sizes.layer + _graph_bytes(source, max(TUNING_BATCH_TOKENS, length)),
            # the model's head, the file's, and its gradient
            sizes.outer + 2 * head_bytes + sizes.logits,
        ),
        # through the file as it was, as it is, and with one layer as it was
        sizes.layer + 4 * held_out_bytes + min(source.n_layer * held_out_bytes, TRIALS_BYTES),
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
