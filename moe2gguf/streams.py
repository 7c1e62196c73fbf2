"""The calibration text through the layers in two streams: by the model as it is, and with what is quantised so far.

Shapes: S sequences, L tokens of each, B sequences at a time, D hidden, V vocabulary, N rows, K columns.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from moe2gguf import ggml
from moe2gguf.experts import CPU, ExpertBlock, find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.run import Progress
from moe2gguf.spool import Spool
from moe2gguf.states import States
from moe2gguf.stream import LayerStream

Types = Mapping[tuple[int, str, int], QuantType]  # layer, matrix, the checkpoint's expert

BATCH_TOKENS = 4096
# of both streams, while a layer's experts are quantised; beyond it they lie on disk
AWAY_BYTES = 1 << 28
ROWS_PER_JOB = 1024
# of experts that are decoded at a time, one at least: a thread each is gigabytes where they are large
DECODED_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How a matrix beside the experts will be stored."""

    quant_type: QuantType
    importance_K: np.ndarray | None
    # not where the file has its columns in another order, by which blocks are cut
    has_feedback: bool = True


# beside the experts, by the name of the module: "layers.0.self_attn.q_proj", "embed_tokens"
Matrices = Mapping[str, Matrix]
NO_MATRICES: Matrices = MappingProxyType({})


class _Reached(Exception):
    """The experts, or the head, have been given their tokens."""


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[None]:
    """_Reached is raised in place of its forward pass, after others' hooks have seen what it is given."""

    def stop(_module: nn.Module, _args: tuple) -> None:
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


class Streams:
    """All of the text through the layer at hand: by the model as it is, and with what is quantised so far."""

    def __init__(
        self,
        stream: LayerStream,
        tokens_SL: np.ndarray,
        matrices: Matrices,
        spool: Spool,
        pool: ThreadPoolExecutor,
        progress: Progress,
    ):
        self._stream, self._matrices, self._pool, self._progress = stream, matrices, pool, progress
        self._spool = spool
        self._batch = max(1, BATCH_TOKENS // tokens_SL.shape[1])
        tokens = torch.from_numpy(tokens_SL).long()
        self.exact_SLD = self._embed(tokens)
        weight_VD = stream.embedding_VD
        exact_VD = weight_VD.clone()
        self._quantise("embed_tokens", weight_VD)
        self.found_SLD = self._embed(tokens)
        weight_VD.copy_(exact_VD)

    @property
    def n_layers(self) -> int:
        return self._stream.n_layers

    def _embed(self, tokens_SL: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._stream.embed(batch) for batch in tokens_SL.split(self._batch)])

    @contextmanager
    def layer(self, index: int) -> Iterator[tuple[nn.Module, ExpertBlock | None]]:
        with self._stream.layer(index) as layer:
            self._index, self._layer = index, layer
            yield layer, find_experts(layer)

    def say(self, what: str, done: int, total: int) -> None:
        self._progress(f"layer {self._index + 1}/{self._stream.n_layers}: {what}", done, total)

    def _batches(self, hidden_SLD: torch.Tensor) -> Iterator[torch.Tensor]:
        for start in range(0, len(hidden_SLD), self._batch):
            self.say("activations", start, len(hidden_SLD))
            yield hidden_SLD[start : start + self._batch]

    def advance(self, hidden_SLD: torch.Tensor) -> None:
        """In place."""
        for hidden_BLD in self._batches(hidden_SLD):
            hidden_BLD.copy_(self._stream.run(self._index, self._layer, hidden_BLD))

    @contextmanager
    def put_away(self) -> Iterator[None]:
        """They make room."""
        states = States[str](AWAY_BYTES, self._spool.folder)
        states["exact"], states["found"] = self.exact_SLD, self.found_SLD
        del self.exact_SLD, self.found_SLD
        try:
            yield
        finally:
            self.exact_SLD, self.found_SLD = states["exact"], states["found"]
            states.close()

    def look(self, block: ExpertBlock) -> None:
        """What is quantised so far through the layer as far as its experts, for those who listen to what they get."""
        with _stopping_at(block.module):
            for hidden_BLD in self._batches(self.found_SLD):
                with suppress(_Reached):
                    self._stream.run(self._index, self._layer, hidden_BLD)

    def look_at_head(self) -> None:
        """The model's own stream, through all layers, as far as its head, for those who listen to what that gets."""
        with _stopping_at(self._stream.head):
            for start in range(0, len(self.exact_SLD), self._batch):
                self._progress("head", start, len(self.exact_SLD))
                with suppress(_Reached):
                    self._stream.logits(self.exact_SLD[start : start + self._batch])

    def run(self, hidden_SLD: torch.Tensor) -> torch.Tensor:
        hidden_SLD = hidden_SLD.clone()
        self.advance(hidden_SLD)
        return hidden_SLD

    def quantise_matrices(self) -> None:
        """The layer's matrices beside the experts become what the file will have."""
        for path, module in self._layer.named_modules():
            if isinstance(module, nn.Linear):
                self._quantise(f"layers.{self._index}.{path}", module.weight)

    def _quantise(self, name: str, weight_NK: torch.Tensor) -> None:
        if (matrix := self._matrices.get(name)) is None:
            return
        exact_NK = weight_NK.to(CPU)
        if (blocks_NB := self._spool.matrix(name, exact_NK.numpy())) is not None:
            weight_NK.copy_(torch.from_numpy(ggml.decode(blocks_NB, matrix.quant_type, weight_NK.shape[1])))
            return
        jobs = [
            self._pool.submit(ggml.round_trip, part.numpy(), matrix.quant_type, matrix.importance_K)
            for part in exact_NK.split(ROWS_PER_JOB)
        ]
        for part, job in zip(weight_NK.split(ROWS_PER_JOB), jobs, strict=True):
            part.copy_(torch.from_numpy(job.result()))


@torch.inference_mode()
def put_back(
    block: ExpertBlock,
    types: Mapping[tuple[str, int], QuantType],
    spool: Spool,
    layer: int,
    pool: ThreadPoolExecutor,
    scaled: Callable[[np.ndarray, str, int], np.ndarray] = lambda blocks_NB, _matrix, _expert: blocks_NB,
) -> None:
    """The layer's experts as the file will have them, or as `scaled` makes their blocks; some rows a job."""

    @torch.inference_mode()  # by thread
    def decoded(blocks_RB: np.ndarray, quant_type: QuantType) -> torch.Tensor:
        weights, n_bytes = ggml.block_shape(quant_type)
        return torch.from_numpy(ggml.decode(blocks_RB, quant_type, blocks_RB.shape[1] // n_bytes * weights))

    def rows(matrix: str, expert: int) -> list[Future[torch.Tensor]]:
        blocks_NB = scaled(get(matrix, expert), matrix, expert)
        parts = np.split(blocks_NB, range(ROWS_PER_JOB, len(blocks_NB), ROWS_PER_JOB))
        return [pool.submit(decoded, part, types[matrix, expert]) for part in parts]

    experts = sorted({expert for _, expert in types})
    n_weights = block.gate_up_proj[0].numel() + block.module.down_proj[0].numel()
    step = max(1, DECODED_BYTES // (4 * n_weights))
    with spool.open(layer) as get:
        for start in range(0, len(experts), step):
            own = experts[start : start + step]
            jobs = [([rows(matrix, e) for matrix in block.first], rows("down", e)) for e in own]
            for expert, (first, down) in zip(own, jobs, strict=True):
                block.set_gate_up(expert, torch.cat([job.result() for parts in first for job in parts]))
                block.set_down(expert, torch.cat([job.result() for job in down]))
