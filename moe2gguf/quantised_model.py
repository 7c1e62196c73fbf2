"""The stream's layers, and what comes after the last, as the file will have them; and what of them may be tuned without
another byte: routers and RMS norms, F32 in any GGUF, and the scale of every block.

Shapes: N rows, K columns, B bytes of a row, S blocks of a row, V vocabulary, I intermediate, D hidden, l tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from moe2gguf import ggml
from moe2gguf.codec import CODECS, Codec
from moe2gguf.experts import CPU, ExpertBlock, find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.spool import Spool
from moe2gguf.stream import LayerStream
from moe2gguf.streams import ROWS_PER_JOB, Matrices, Types, put_back

# f32, by the name of the module: "layers.0.mlp.gate", "norm"; of blocks' scales by SCALES of that of the matrix
Weights = Mapping[str, torch.Tensor]

SCALES = "{}.scales".format
HEAD = "lm_head"


def expert_matrix(layer: int, matrix: str, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}.{matrix}"


class QuantisedModel:
    def __init__(self, stream: LayerStream, types: Types, matrices: Matrices, spool: Spool, pool: ThreadPoolExecutor):
        self.stream, self._types, self._matrices, self._spool, self._pool = stream, types, matrices, spool, pool
        # encoded once: every step needs them twice
        self._blocks: dict[str, np.ndarray] = {}
        self._of_spool: set[str] = set()
        # the model's own last norm and head, while the file's are in their place
        self._exact: tuple[nn.Parameter, ...] = ()
        # the final norm, or nothing where that is of another kind
        self._norms = {name: module for name, module in stream.text_model.named_children() if is_rms_norm(module)}
        # what it holds as embedding stays as it is
        self._head_name = "embed_tokens" if stream.head.weight is stream.embedding_VD else HEAD
        self._of_spool_or_encoded(self._head_name, stream.head.weight)
        # of these layers `prepare` needs no more than the rest
        self.has_experts = frozenset(layer for layer, _, _ in types)

    def scales(self, index: int, layer: nn.Module | None) -> dict[str, torch.Tensor]:
        """Ones for what the spool has of the layer, which is as it was; of none, after the last, for the head."""
        for name, weight_NK in _matrices_of(index, layer):
            self._of_spool_or_encoded(name, weight_NK)
        found = {
            name: _ones(self._blocks[name], self._matrices[name].quant_type) for name in self._beside_experts(index)
        }
        for (matrix, expert), quant_type in self._experts(index).items():
            found[expert_matrix(index, matrix, expert)] = _ones(self._spool.get(index, matrix, expert), quant_type)
        return {SCALES(name): scale_NS for name, scale_NS in sorted(found.items()) if scale_NS is not None}

    def prepare(self, index: int, layer: nn.Module, weights: Weights) -> dict[str, nn.Parameter]:
        """Makes the layer the file's, with these routers, norms and scales; returns routers and norms."""
        for name, weight_NK in _matrices_of(index, layer):
            self._quantise(name, weight_NK, weights)
        block = find_experts(layer)
        if block is not None and (of_layer := self._experts(index)):

            def scaled(blocks_NB: np.ndarray, matrix: str, expert: int) -> np.ndarray:
                scale_NS = weights.get(SCALES(expert_matrix(index, matrix, expert)))
                return rescaled(blocks_NB, of_layer[matrix, expert], scale_NS)

            put_back(block, of_layer, self._spool, index, self._pool, scaled)
        tuned = {name: weight for name, weight in tunable(index, layer, block).items() if name in weights}
        for name, weight in tuned.items():
            weight.data.copy_(weights[name])
        return tuned

    @contextmanager
    def after_last(self, weights: Weights) -> Iterator[dict[str, nn.Parameter]]:
        """The file's head, with this final norm, which is handed out. Not while a layer is in memory, too."""
        norms = {
            name: nn.Parameter(
                weights.get(name, module.weight).detach().to(module.weight.device, copy=True), requires_grad=False
            )
            for name, module in self._norms.items()
        }
        head = nn.Parameter(self.stream.head.weight.clone(), requires_grad=False)
        self._quantise(self._head_name, head, weights)
        self._exact = self._last()
        self._put((head, *norms.values()))
        try:
            yield norms
        finally:
            self._put(self._exact)
            self._exact = ()

    @contextmanager
    def gradients(self, index: int, layer: nn.Module, scales: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Passes back through the prepared layer also add to the gradients of those of the scales that it has."""
        with ExitStack() as stack:
            for matrix, weight_NK in _matrices_of(index, layer):
                if (name := SCALES(matrix)) in scales:
                    stack.enter_context(_watched(weight_NK, _adding((scales[name],), lambda moved: moved)))
            if (block := find_experts(layer)) is not None:
                stack.enter_context(_watched_experts(index, block, scales))
            yield

    @contextmanager
    def gradients_after_last(self, scales: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """As `gradients`, of the head, while it is the file's."""
        with ExitStack() as stack:
            if (name := SCALES(HEAD)) in scales:
                stack.enter_context(_watched(self.stream.head.weight, _adding((scales[name],), lambda moved: moved)))
            yield

    def put_scaled(self, index: int, weights: Weights) -> int:
        """Leaves the layer's blocks, the head's after the last, with these scales in the spool; returns of how many
        matrices."""
        experts = {
            (matrix, expert): rescaled(self._spool.get(index, matrix, expert), quant_type, weights[name])
            for (matrix, expert), quant_type in self._experts(index).items()
            if (name := SCALES(expert_matrix(index, matrix, expert))) in weights
        }
        matrices = {
            name: rescaled(self._blocks[name], self._matrices[name].quant_type, weights[SCALES(name)])
            for name in self._beside_experts(index)
            if SCALES(name) in weights
        }
        self._spool.put_scaled(HEAD if index == self.stream.n_layers else index, experts, matrices)
        return len(experts) + len(matrices)

    def kl(self, exact_1lD: torch.Tensor, logits_lV: torch.Tensor) -> torch.Tensor:
        """Σ over tokens of KL(model ‖ file), nats, in `after_last`."""
        found = self._last()
        self._put(self._exact)
        clean_lV = torch.log_softmax(self.stream.logits(exact_1lD)[0], -1)
        self._put(found)
        # inference mode's tensors cannot be kept for gradients
        clean_lV = clean_lV.clone()
        return (clean_lV.exp() * (clean_lV - torch.log_softmax(logits_lV, -1))).sum()

    def _last(self) -> tuple[nn.Parameter, ...]:
        return (self.stream.head.weight, *(module.weight for module in self._norms.values()))

    def _put(self, last: tuple[nn.Parameter, ...]) -> None:
        for module, weight in zip((self.stream.head, *self._norms.values()), last, strict=True):
            module.weight = weight

    def _experts(self, index: int) -> dict[tuple[str, int], QuantType]:
        return {(matrix, expert): t for (layer, matrix, expert), t in self._types.items() if layer == index}

    def _beside_experts(self, index: int) -> list[str]:
        """What the spool has of the layer beside its experts; after the last the head."""
        prefix = HEAD if index == self.stream.n_layers else f"layers.{index}."
        return sorted(name for name in self._of_spool if name.startswith(prefix))

    def _quantise(self, name: str, weight_NK: torch.Tensor, weights: Weights) -> None:
        if (blocks_NB := self._of_spool_or_encoded(name, weight_NK)) is None:
            return
        quant_type, parts = self._matrices[name].quant_type, weight_NK.data.split(ROWS_PER_JOB)
        blocks_NB = rescaled(blocks_NB, quant_type, weights.get(SCALES(name)))
        borders = range(ROWS_PER_JOB, len(blocks_NB), ROWS_PER_JOB)
        for part, rows_NB in zip(parts, np.split(blocks_NB, borders), strict=True):
            part.copy_(torch.from_numpy(ggml.decode(rows_NB, quant_type, part.shape[1])))

    def _of_spool_or_encoded(self, name: str, weight_NK: torch.Tensor) -> np.ndarray | None:
        """The matrix' blocks, None where it stays as it is."""
        if (matrix := self._matrices.get(name)) is None or name in self._blocks:
            return self._blocks.get(name)
        weight_NK = weight_NK.detach().to(CPU)
        if (blocks_NB := self._spool.matrix(name, weight_NK.numpy())) is not None:
            self._of_spool.add(name)
        else:
            jobs = [
                self._pool.submit(ggml.encode, part.numpy(), matrix.quant_type, matrix.importance_K)
                for part in weight_NK.split(ROWS_PER_JOB)
            ]
            blocks_NB = np.concatenate([job.result() for job in jobs])
        self._blocks[name] = blocks_NB
        return blocks_NB


def _matrices_of(index: int, layer: nn.Module | None) -> list[tuple[str, torch.Tensor]]:
    modules = () if layer is None else layer.named_modules()
    return [(f"layers.{index}.{path}", module.weight) for path, module in modules if isinstance(module, nn.Linear)]


def rescaled(blocks_NB: np.ndarray, quant_type: QuantType, scale_NS: torch.Tensor | None) -> np.ndarray:
    if scale_NS is None:
        return blocks_NB
    codec = CODECS[quant_type]
    blocks_RB = torch.from_numpy(np.ascontiguousarray(blocks_NB)).view(-1, codec.block_bytes)
    return codec.rescaled(blocks_RB, scale_NS.detach().flatten()).numpy().reshape(blocks_NB.shape)


def _ones(blocks_NB: np.ndarray, quant_type: QuantType) -> torch.Tensor | None:
    """None where blocks have no scale that could be any, as MXFP4's."""
    codec: Codec | None = CODECS.get(quant_type)
    if codec is None or codec.places.d is None:
        return None
    return torch.ones(len(blocks_NB), blocks_NB.shape[1] // codec.block_bytes)


def _adding(scales: tuple[nn.Parameter | None, ...], rows: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """A hook for a weight that has its gradient. `rows` makes of what is shaped as the weight is the matrices that the
    scales belong to, one below the other."""

    @torch.no_grad()
    def add(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        # by the logarithm of a scale
        moved = rows(weight.grad.mul_(weight))
        weight.grad = None
        for scale_NS, moved_NK in zip(scales, moved.chunk(len(scales)), strict=True):
            if scale_NS is not None:
                moved_NS = moved_NK.reshape(*scale_NS.shape, -1).sum(-1, dtype=torch.float32)
                by_scale_NS = moved_NS.to(CPU) / scale_NS
                scale_NS.grad = by_scale_NS if scale_NS.grad is None else scale_NS.grad + by_scale_NS

    return add


@contextmanager
def _watched(weight: torch.Tensor, hook: Callable) -> Iterator[None]:
    handle = weight.requires_grad_(True).register_post_accumulate_grad_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        weight.requires_grad_(False)


@contextmanager
def _watched_experts(index: int, block: ExpertBlock, scales: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Each expert's matrices by themselves: the gradient by one of a tensor of all is as large as that tensor."""
    of_name = {block.gate_up_name: (block.first, block.gate_up_rows), "down_proj": (("down",), block.down_rows)}
    with ExitStack() as stack:
        for name, (matrices, rows) in of_name.items():
            each = [weight.detach() for weight in getattr(block.module, name)]
            for expert, weight in enumerate(each):
                own = tuple(scales.get(SCALES(expert_matrix(index, matrix, expert))) for matrix in matrices)
                if any(scale is not None for scale in own):
                    stack.enter_context(_watched(weight, _adding(own, rows)))
            # found before the module's parameter of that name
            vars(block.module)[name] = each
            stack.callback(vars(block.module).pop, name)
        yield


def is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "RMSNorm" in type(module).__name__ and isinstance(weight, torch.Tensor) and weight.ndim == 1


def tunable(index: int, layer: nn.Module, block: ExpertBlock | None) -> dict[str, nn.Parameter]:
    """The layer's router and RMS norms, but for those of what chooses tokens to attend to: choices have no gradient."""
    return {
        f"layers.{index}.{path}": module.weight
        for path, module in layer.named_modules()
        if (is_rms_norm(module) and "indexer" not in path)
        or (block is not None and getattr(module, "weight", None) is block.router_ED)
    }
