"""Routers, norms and the scales of blocks by descent on the KL divergence from the model, when all is quantised (the
last pass of QESC, EAC-MoE, arXiv:2508.01625; scales after EfficientQAT's last phase, arXiv:2407.11062).

Adam over what a file may have otherwise without another byte: a step takes some sequences through the quantised model
and back, one layer in memory. Held-out sequences decide: beside the stream through all that is new run others, each
with one layer as it was.

Shapes: S sequences, L tokens of each, l tokens of one of them, B sequences at a time, H held-out sequences, D hidden,
K selected experts per token, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from torch import nn

from moe2gguf import ggml
from moe2gguf.backward import backward, chunks
from moe2gguf.capture import LayerCapture
from moe2gguf.costs import gguf_name
from moe2gguf.experts import CPU, find_experts
from moe2gguf.quantised_model import QuantisedModel, Weights, tunable
from moe2gguf.router import TRIALS_BYTES, agreement, held_out
from moe2gguf.run import Progress
from moe2gguf.source import Source
from moe2gguf.spool import Spool, Tuned
from moe2gguf.states import States, by_sequence
from moe2gguf.stream import LayerStream
from moe2gguf.streams import AWAY_BYTES, Matrices, Streams, Types

# that take all of the text twice, if it is not too long for that
N_STEPS = 16
PASSES = 2
MAX_STEP_TOKENS = 16384
# at a time through a layer with gradients, which keeps what each of its matrices is given
BATCH_TOKENS = 2048
# of the root mean square of what is changed, for each nat of the divergence at first: the less there is to mend, the
# smaller the steps; they rise over the first of them and fall to nothing
LEARNING_RATE = 0.15
MAX_LEARNING_RATE = 0.005
WARM_UP_STEPS = 3
BETAS = (0.9, 0.99)


def tune(
    source: Source,
    stream: LayerStream,
    tokens_SL: np.ndarray,
    types: Types,
    matrices: Matrices,
    spool: Spool,
    *,
    seed: int,
    n_threads: int,
    progress: Progress,
) -> None:
    """Leaves the routers, norms and scales that help in the spool, which has all of the experts.

    Not in inference mode.
    """
    if spool.tuned() is not None:
        return
    spool.remove_scaled()  # of a run that was killed
    held_out_S = held_out(*tokens_SL.shape)
    with ggml.encoding_threads(n_threads) as pool:
        model = QuantisedModel(stream, types, matrices, spool, pool)
        streams = Streams(stream, tokens_SL, matrices, spool, pool, progress)
        found = by_sequence(streams.found_SLD, AWAY_BYTES // 2, spool.folder)
        del streams.found_SLD
        names = _Names(source)
        before, selected = _as_it_was(model, streams, spool, names, held_out_S)
        exact = by_sequence(streams.exact_SLD, AWAY_BYTES // 2, spool.folder)
        del streams.exact_SLD
        fit, held_out_H = ((held_out_S == is_held_out).nonzero()[:, 0].tolist() for is_held_out in (False, True))
        offsets = {module: offset for module, (_, offset) in names.in_file.items()}
        after = descended(model, before, offsets, fit, found, exact, seed=seed, spool=spool, progress=progress)
        judge = Judge(model, found.parts(held_out_H), exact.parts(held_out_H), selected, spool, progress)
        for states in (found, exact):
            states.close()
        trial = judge.trial(before, after, range(stream.n_layers + 1))
        helps = {unit for unit, kl in trial.kl_without.items() if kl > trial.kl_after}
        kept = {name: weight for name, weight in after.items() if _unit(name, stream.n_layers) in helps}
        if len(kept) < len(after) and (some := judge.trial(before, before | kept, ())).kl_after <= trial.kl_after:
            trial = some
        else:
            kept = dict(after)
        if trial.kl_after >= trial.kl_before:
            kept.clear()
            trial = replace(trial, kl_after=trial.kl_before, agreement=trial.agreement_before)
        n_scaled = sum(model.put_scaled(unit, kept) for unit in range(stream.n_layers + 1))
    weights = {
        name: (kept[module].numpy() + np.float32(offset)).reshape(source.tensor(name).shape)
        for module, (name, offset) in names.in_file.items()
        if module in kept
    }
    spool.put_tuned(Tuned(weights, n_scaled, trial.kl_before, trial.kl_after, trial.agreement_before, trial.agreement))


def _as_it_was(
    model: QuantisedModel, streams: Streams, spool: Spool, names: "_Names", held_out_S: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Takes the model's own stream through all layers. -> what may be tuned, routers as they are calibrated, scales 1;
    and by layer the experts that the model selects for held-out tokens, i64 (H·L, K)."""
    routers = spool.routers()
    router_ED = {} if routers is None else routers.router_ED
    held_out_T = held_out_S.repeat_interleave(streams.exact_SLD.shape[1])
    before: dict[str, torch.Tensor] = {}
    selected: dict[int, torch.Tensor] = {}
    for index in range(model.stream.n_layers):
        with streams.layer(index) as (layer, block):
            capture = LayerCapture(layer, block)
            with capture.listening():
                streams.advance(streams.exact_SLD)
            for name, weight in tunable(index, layer, block).items():
                is_router = block is not None and weight is block.router_ED
                if names.add(name, weight, f"blk.{index}.ffn_gate_inp.weight" if is_router else None):
                    is_calibrated = is_router and index in router_ED
                    before[name] = (
                        torch.from_numpy(router_ED[index]) if is_calibrated else weight.detach().to(CPU, copy=True)
                    )
            if block is not None:
                selected[index] = capture.selected()[held_out_T]
            before |= model.scales(index, layer)
    before |= model.scales(model.stream.n_layers, None)
    with model.after_last({}) as norms:
        before |= {name: weight.to(CPU, copy=True) for name, weight in norms.items() if names.add(name, weight, None)}
    return before, selected


def _unit(name: str, n_layers: int) -> int:
    """What is kept or goes back together: all of a layer; the final norm and the head come after the last."""
    return int(name.split(".")[1]) if name.startswith("layers.") else n_layers


class _Names:
    """The file's names of routers and norms that the converter takes as they are or adds 1 to, as the model does;
    others are not tuned."""

    def __init__(self, source: Source):
        self.in_file: dict[str, tuple[str, int]] = {}  # by module; what the file has more
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == source.arch)
        self._map = gguf.get_tensor_name_map(arch, source.n_layer)
        self._tensors = {tensor.name: tensor for tensor in source.tensors}

    def add(self, module: str, weight: torch.Tensor, name: str | None) -> bool:
        name = name or f"{gguf_name(self._map, module)}.weight"
        tensor = self._tensors.get(name)
        if tensor is None:
            return False
        in_file = tensor.load()
        for offset in (0, 1):
            if np.array_equal(in_file.ravel(), weight.detach().to(CPU).numpy().ravel() + np.float32(offset)):
                self.in_file[module] = name, offset
                return True
        return False


def per_step(n_sequences: int, length: int) -> int:
    """Sequences of a step."""
    return min(-(-PASSES * n_sequences // N_STEPS), max(1, MAX_STEP_TOKENS // length))


def descended(
    model: QuantisedModel,
    start: Weights,
    offsets: Mapping[str, int],
    sequences: list[int],
    found: States[int],
    exact: States[int],
    *,
    seed: int,
    spool: Spool,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Adam's weights, whose steps are as large as they are with their offsets. By sequence, found is what the first
    layer is given, exact what the model's last gives."""
    length = next((found[s].shape[1] for s in sequences), 0)
    at_once = per_step(len(sequences), length)
    weights = {name: nn.Parameter(weight.clone()) for name, weight in start.items()}
    groups = [
        {"params": [weight], "size": float((weight.detach() + offsets.get(name, 0)).square().mean().sqrt())}
        for name, weight in weights.items()
    ]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    rng = np.random.default_rng(seed)
    order: list[int] = []
    now = {name: weight.detach() for name, weight in weights.items()}  # the same memory
    rate = 0.0
    for step in range(N_STEPS if sequences else 0):
        progress("tuning", step, N_STEPS)
        while len(order) < at_once:
            order += rng.permutation(sequences).tolist()
        step_S, order = order[:at_once], order[at_once:]

        def loss(logits_lV: torch.Tensor, s: int, tokens: slice, step_S: list[int] = step_S) -> torch.Tensor:
            return model.kl(exact.part(step_S[s], 0, tokens), logits_lV) / (len(step_S) * length)

        def prepare(index: int, layer: nn.Module) -> None:
            for weight in model.prepare(index, layer, now).values():
                weight.requires_grad_(True)

        def listen(index: int, layer: nn.Module) -> AbstractContextManager:
            return model.gradients(index, layer, weights)

        def finish(index: int, layer: nn.Module) -> None:
            for name, weight in tunable(index, layer, find_experts(layer)).items():
                if name in weights:
                    weights[name].grad = _on_cpu(weight.grad)

        @contextmanager
        def last() -> Iterator[None]:
            with model.after_last(now) as norms, model.gradients_after_last(weights):
                for norm in norms.values():
                    norm.requires_grad_(True)
                yield
                for name in norms.keys() & weights.keys():
                    weights[name].grad = _on_cpu(norms[name].grad)

        optimiser.zero_grad()
        kl, _ = backward(
            model.stream, found.parts(step_S), loss, prepare=prepare, finish=finish, listen=listen, last=last,
            batch_sequences=max(1, BATCH_TOKENS // length), scratch_folder=spool.folder,
            without_experts=model.has_experts,
        )  # fmt: skip
        rate = rate or min(MAX_LEARNING_RATE, LEARNING_RATE * kl)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["size"] * min(1, (step + 1) / WARM_UP_STEPS) * (1 - step / N_STEPS)
        optimiser.step()
    return now


def _on_cpu(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.to(CPU)


@dataclass(frozen=True)
class Trial:
    kl_before: float  # nats per token
    kl_after: float
    agreement_before: float
    agreement: float
    kl_without: dict[int, float]  # by unit, with all others


@dataclass(frozen=True)
class Judge:
    """Held-out sequences through the file."""

    model: QuantisedModel
    found_HLD: torch.Tensor  # what the first layer is given
    exact_HLD: torch.Tensor  # what the model's own last layer gives
    selected: Mapping[int, torch.Tensor]  # by layer, the experts that the model selects, i64 (H·L, K)
    spool: Spool
    progress: Progress

    @torch.inference_mode()
    def trial(self, before: Weights, after: Weights, units: Collection[int]) -> Trial:
        """With all of either, and with all of `after` but one of the units."""
        stream = self.model.stream
        before_HLD, after_HLD = self.found_HLD.clone(), self.found_HLD.clone()
        without = States[int](TRIALS_BYTES, self.spool.folder)
        agreements: list[tuple[float, float]] = []
        for index in range(stream.n_layers):
            self.progress("tuned on held-out text", index, stream.n_layers)
            with stream.layer(index, without_experts=index in self.model.has_experts) as layer:
                block = find_experts(layer)
                self.model.prepare(index, layer, before)
                selected_before, selected = LayerCapture(layer, block), LayerCapture(layer, block)
                with selected_before.listening():
                    before_HLD = self._run(index, layer, before_HLD)
                without_HLD = self._run(index, layer, after_HLD) if index in units else None
                self.model.prepare(index, layer, after)
                with selected.listening():
                    after_HLD = self._run(index, layer, after_HLD)
                for unit in without:
                    without[unit] = self._run(index, layer, without[unit])
                if without_HLD is not None:
                    without[index] = without_HLD
                if block is not None:
                    agreements.append(
                        (
                            agreement(self.selected[index], selected_before.selected()),
                            agreement(self.selected[index], selected.selected()),
                        )
                    )
        with self.model.after_last(before):
            kl_before = self._kl(before_HLD)
            kl_without = {stream.n_layers: self._kl(after_HLD)} if stream.n_layers in units else {}
        with self.model.after_last(after):
            kl_after = self._kl(after_HLD)
            kl_without |= {unit: self._kl(without[unit]) for unit in without}
        without.close()
        agreement_before, agreement_after = np.mean(agreements, 0).tolist()
        return Trial(kl_before, kl_after, agreement_before, agreement_after, kl_without)

    def _run(self, index: int, layer: nn.Module, hidden_HLD: torch.Tensor) -> torch.Tensor:
        batch = max(1, BATCH_TOKENS // hidden_HLD.shape[1])
        return torch.cat([self.model.stream.run(index, layer, part) for part in hidden_HLD.split(batch)])

    def _kl(self, hidden_HLD: torch.Tensor) -> float:
        """Nats per token."""
        total = 0.0
        for s, tokens in chunks(hidden_HLD):
            logits_lV = self.model.stream.logits(hidden_HLD[s : s + 1, tokens])[0]
            total += float(self.model.kl(self.exact_HLD[s : s + 1, tokens], logits_lV))
        n_sequences, length = hidden_HLD.shape[:2]
        return total / (n_sequences * length)


def describe(tuned: Tuned) -> str:
    n_routers = sum("ffn_gate_inp" in name for name in tuned.weights)
    return (
        f"tuned routers: {n_routers}, norms: {len(tuned.weights) - n_routers}, scales of matrices: {tuned.n_scaled}; "
        f"KL divergence on held-out text {tuned.kl_before:.5f} -> {tuned.kl_after:.5f}, experts chosen as by the model "
        f"{tuned.agreement_before:.1%} -> {tuned.agreement:.1%}"
    )
