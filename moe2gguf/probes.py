"""How much the model minds an error: streams with one projection really quantised, carried on to the logits.

A new stream branches off the clean one at each projection of each layer; all of them run on, layer by layer, beside
it. At the end their KL divergence from the clean stream is the cost of that projection at the probe's type.

Shapes: S sequences, L tokens of each, T = S·L, D hidden, E experts, K columns, N rows, V vocabulary, B branches.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moe2gguf import ggml
from moe2gguf.backward import chunks
from moe2gguf.capture import MatrixCapture
from moe2gguf.experts import CPU, ExpertBlock
from moe2gguf.ggml import QuantType
from moe2gguf.interim import Passed
from moe2gguf.states import States
from moe2gguf.stats import ExpertStats
from moe2gguf.stream import LayerStream

# two types for experts, since the KL does not grow in proportion to the error, of which ggml encodes one in a tenth of
# the other's time; one for the few other matrices
EXPERT_PROBE_TYPES = (QuantType.IQ2_XXS, QuantType.Q3_K)
MATRIX_PROBE_TYPES = (QuantType.IQ3_XXS,)
# of a matrix, for as many threads
N_PARTS = 16
# for columns that are no multiple of 256; candidates, since a probe is read beside the error measured at its type
SMALL_BLOCK_PROBE_TYPES = (QuantType.IQ4_NL, QuantType.Q5_0)
# the few tokens that errors matter most for, which differ from text to text, count no more than one at this quantile
HARD_QUANTILE = 0.98
# of hidden states kept in memory; the rest lies on disk
BRANCHES_BYTES = 1 << 29
# at a time with what 16 bits make of them, since a GPU waits at each
COMPARED_WEIGHTS = 1 << 22
# experts whose weights at a probe type wait for their turn
IN_FLIGHT = 8


@dataclasses.dataclass(frozen=True)
class Probe:
    """KL divergence, nats per token, with a whole projection at one type."""

    quant_type: QuantType
    kl: float


class Probes:
    def __init__(
        self,
        stream: LayerStream,
        pool: ThreadPoolExecutor,
        batch_sequences: int,
        tokens_SL: torch.Tensor,
        scratch_folder: Path,
        n_threads: int,
    ):
        # of an expert's rows, that those in flight keep all threads busy
        self._n_parts = -(-n_threads // IN_FLIGHT)
        self._stream, self._pool, self._batch = stream, pool, batch_sequences
        self._clean_SLD = self._embed(tokens_SL)
        self._branches = States[tuple[str, QuantType]](BRANCHES_BYTES, scratch_folder)
        weight_VD = stream.embedding_VD
        used = torch.unique(tokens_SL).to(weight_VD.device)
        for quant_type in _fitting(MATRIX_PROBE_TYPES, weight_VD.shape[1]):
            with _restored(weight_VD):
                probed = torch.from_numpy(ggml.round_trip(weight_VD[used].to(CPU).numpy(), quant_type))
                weight_VD[used] = probed.to(weight_VD.device)
                self._branches["embed_tokens", quant_type] = self._embed(tokens_SL)

    @property
    def n_branches(self) -> int:
        return len(self._branches)

    def streams(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "clean", self._clean_SLD
        for name, quant_type in self._branches:
            yield f"{name} {quant_type.name}", self._branches[name, quant_type]

    def go_on(self, passed: Passed) -> None:
        """From `streams` of an earlier run."""
        shape = self._clean_SLD.shape
        self._clean_SLD = passed.stream("clean", shape)
        for stream in passed.streams:
            name, _, quant_type = stream.rpartition(" ")
            if name:
                self._branches[name, QuantType[quant_type]] = passed.stream(stream, shape)

    def _embed(self, tokens_SL: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._stream.embed(batch) for batch in tokens_SL.split(self._batch)])

    def _run(self, index: int, layer: nn.Module, hidden_SLD: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._stream.run(index, layer, batch) for batch in hidden_SLD.split(self._batch)])

    def advance(self, index: int, layer: nn.Module, progress: Callable[[int, int], None]) -> None:
        """All branches through the layer. The clean stream waits: branch first, then pass."""
        for done, key in enumerate(self._branches):
            progress(done, len(self._branches))
            self._branches[key] = self._run(index, layer, self._branches[key])

    def branch_matrix(self, index: int, layer: nn.Module, name: str, matrix: MatrixCapture) -> None:
        weight = matrix.module.weight
        for quant_type in _fitting(MATRIX_PROBE_TYPES, weight.shape[1]):
            with _restored(weight):
                self._decode(self._encoded(weight, quant_type, matrix.importance_K()), quant_type, weight)
                self._branches[name, quant_type] = self._run(index, layer, self._clean_SLD)

    def branch_experts(self, index: int, layer: nn.Module, block: ExpertBlock, stats: ExpertStats) -> None:
        for projection, parameter, get, put, importance_EK in (
            ("gate_up", block.gate_up_proj, block.gate_up, block.set_gate_up, stats.importance_gate_up_ED),
            ("down", block.module.down_proj, block.down, block.set_down, stats.importance_down_EI),
        ):
            for quant_type in _fitting(EXPERT_PROBE_TYPES, importance_EK.shape[1]):
                with _restored(parameter):
                    jobs: deque[list[Future[np.ndarray]]] = deque()
                    for expert in range(len(importance_EK) + IN_FLIGHT):
                        if expert < len(importance_EK):
                            exact_NK = get(expert).numpy()
                            parts = np.array_split(exact_NK, self._n_parts)
                            own = quant_type, importance_EK[expert]
                            jobs.append([self._pool.submit(ggml.round_trip, part, *own) for part in parts])
                        if expert >= IN_FLIGHT:
                            rows = np.concatenate([job.result() for job in jobs.popleft()])
                            put(expert - IN_FLIGHT, torch.from_numpy(rows))
                    name = f"layers.{index}.{projection}"
                    self._branches[name, quant_type] = self._run(index, layer, self._clean_SLD)

    def pass_layer(self, index: int, layer: nn.Module) -> None:
        """The clean stream through the layer."""
        self._clean_SLD = self._run(index, layer, self._clean_SLD)

    def finish(self, head: MatrixCapture, progress: Callable[[int, int], None]) -> dict[str, tuple[Probe, ...]]:
        """Every probe's KL divergence, by name: the mean over tokens, of which the hardest count less."""
        weight = head.module.weight
        # encoded until they are needed: with a large vocabulary more than a layer
        heads = {
            ("lm_head", t): self._encoded(weight, t, head.importance_K())
            for t in _fitting(MATRIX_PROBE_TYPES, weight.shape[1])
        }
        kls: dict[tuple[str, QuantType], list[torch.Tensor]] = {key: [] for key in [*self._branches, *heads]}
        parts = chunks(self._clean_SLD)
        for done, (s, tokens) in enumerate(parts):
            progress(done, len(parts))
            clean_1LD = self._clean_SLD[s : s + 1, tokens]
            clean_LV = torch.log_softmax(self._stream.logits(clean_1LD)[0], -1)
            for branch in self._branches:
                part_1LD = self._branches.part(branch, s, tokens)
                kls[branch].append(_kl(clean_LV, self._stream.logits(part_1LD)[0]))
            for key, blocks in heads.items():
                with _restored(weight):
                    self._decode(blocks, key[1], weight)
                    kls[key].append(_kl(clean_LV, self._stream.logits(clean_1LD)[0]))
        self._branches.close()
        found: dict[str, tuple[Probe, ...]] = {}
        kl_BT = torch.stack([torch.cat(of_branch) for of_branch in kls.values()])
        for (name, quant_type), kl in zip(kls, (kl_BT @ token_weights(kl_BT)).tolist(), strict=True):
            found[name] = (*found.get(name, ()), Probe(quant_type, kl))
        return found

    def _encoded(self, weight_NK: torch.Tensor, quant_type: QuantType, importance_K: np.ndarray) -> list[np.ndarray]:
        parts = weight_NK.to(CPU).tensor_split(min(N_PARTS, len(weight_NK)))
        jobs = [self._pool.submit(ggml.encode, part.numpy(), quant_type, importance_K) for part in parts]
        return [job.result() for job in jobs]

    def _decode(self, blocks: list[np.ndarray], quant_type: QuantType, weight_NK: torch.Tensor) -> None:
        decoded = self._pool.map(lambda blocks_NB: ggml.decode(blocks_NB, quant_type, weight_NK.shape[1]), blocks)
        for part, values in zip(weight_NK.tensor_split(len(blocks)), decoded, strict=True):
            part.copy_(torch.from_numpy(values))


def _fitting(wanted: tuple[QuantType, ...], n_columns: int) -> tuple[QuantType, ...]:
    if ggml.fits(wanted[0], n_columns):
        return wanted
    return tuple(t for t in SMALL_BLOCK_PROBE_TYPES[: len(wanted)] if ggml.fits(t, n_columns))


@contextmanager
def _restored(weight: torch.Tensor) -> Iterator[None]:
    """Whatever happens to the weight inside, its exact values come back: out of 16 bits where those hold them."""
    exact = weight.to(torch.bfloat16, copy=True)
    parts = (values.flatten().split(COMPARED_WEIGHTS) for values in (exact, weight))
    if not all(torch.equal(half.float(), whole) for half, whole in zip(*parts, strict=True)):
        exact = weight.clone()
    try:
        yield
    finally:
        weight.copy_(exact)


def mean_kl(stream: LayerStream, clean_SLD: torch.Tensor, other_SLD: torch.Tensor) -> float:
    """KL(clean ‖ other), nats per token, of two streams after the last layer."""
    total = 0.0
    for s, tokens in chunks(clean_SLD):
        clean_LV = torch.log_softmax(stream.logits(clean_SLD[s : s + 1, tokens])[0], -1)
        total += float(_kl(clean_LV, stream.logits(other_SLD[s : s + 1, tokens])[0]).sum())
    n_sequences, length = clean_SLD.shape[:2]
    return total / (n_sequences * length)


def token_weights(kl_BT: torch.Tensor) -> torch.Tensor:
    """What each token counts, f64 (T,), for branches' KL divergence by token: as a share of the mean, so that the mean
    of all branches stays what it is."""
    hard_T = kl_BT.mean(0).clamp_min(1e-12)
    share_T = (hard_T.quantile(HARD_QUANTILE) / hard_T).clamp_max(1)
    return share_T * (hard_T.mean() / (share_T @ hard_T))


def _kl(clean_LV: torch.Tensor, logits_LV: torch.Tensor) -> torch.Tensor:
    """KL(clean ‖ other) by position, nats, f64 (L,)."""
    other_LV = torch.log_softmax(logits_LV, -1)
    return (clean_LV.exp() * (clean_LV - other_LV)).sum(-1, dtype=torch.float64)
