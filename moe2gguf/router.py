"""Router calibration: a quantised model's routers choose as the model's own do (QESC, EAC-MoE, arXiv:2508.01625).

What reaches a router has changed by what is quantised before it. Each row gets the weights that give, on what arrives,
the scores that it gave before, on the tokens where it counts: where its expert is among the highest scores (TopK-MSE).
That is least squares with a ridge towards the row as it was, so it has a closed form.

It is a pass of its own, after the experts are quantised. Which layers keep the new router is tried on held-out
sequences: beside the stream through all of the new ones run others, each with one layer's router as it was.

Shapes: T tokens, E experts, K selected per token, D hidden, H held-out sequences, L tokens of each, n tokens of one
expert.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from moe2gguf import backend, ggml
from moe2gguf.capture import ExpertCapture
from moe2gguf.experts import CPU
from moe2gguf.probes import mean_kl
from moe2gguf.run import Progress
from moe2gguf.spool import Routers, Spool
from moe2gguf.states import States
from moe2gguf.stream import LayerStream
from moe2gguf.streams import Matrices, Streams, Types, put_back

# in parts of the mean of the diagonal of a row's second moments; of equals the first is taken
DAMPINGS = (0.1, 1.0, 0.01)
# of each expert, evenly from all that it counts on; sequences are taken until they have so many on average
MAX_TOKENS = 8192
# f64 matrices of one chunk of rows
CHUNK_BYTES = 1 << 27
# one sequence in so many, but no more tokens, are for judging
HELD_OUT = 4
MAX_HELD_OUT_TOKENS = 4096
# of the trials in memory; the rest goes to disk
TRIALS_BYTES = 1 << 28

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fit:
    router_ED: torch.Tensor  # f32
    damping: float
    error: float  # TopK-MSE on held-out tokens, over that of the router as it was


def n_watched(n_experts: int, n_selected: int) -> int:
    """How many of the highest scores count: all of 8, 8 of 16, 20 of 64 (the paper's), and so on; more than are
    selected where there are more."""
    return min(n_experts, max(8 + (n_experts - 16) // 4, 8, n_selected + 1))


def fit(
    router_ED: torch.Tensor, exact_TD: torch.Tensor, found_TD: torch.Tensor, held_out_T: torch.Tensor,
    selected_TK: torch.Tensor, device: torch.device,
) -> Fit | None:  # fmt: skip
    """The rows that, on what the quantised model gives them, score as router_ED does on what the model gives them,
    where scores are high or the model selects them, i64 (T, K): by biases or groups it may select others.

    None where the router as it was does better on held-out tokens.
    """
    wanted_TE = exact_TD @ router_ED.T
    watched_TE = torch.zeros_like(wanted_TE, dtype=torch.bool)
    watched_TE.scatter_(1, wanted_TE.topk(n_watched(wanted_TE.shape[1], selected_TK.shape[1])).indices, True)
    watched_TE.scatter_(1, selected_TK, True)

    def error(candidate_ED: torch.Tensor) -> float:
        miss_TE = found_TD[held_out_T] @ candidate_ED.T - wanted_TE[held_out_T]
        return float(miss_TE.square()[watched_TE[held_out_T]].mean(dtype=torch.float64))

    before = error(router_ED)
    solved = _solved(router_ED, found_TD, wanted_TE, watched_TE & ~held_out_T[:, None], device)
    fits = [Fit(router, damping, error(router) / max(before, 1e-30)) for damping, router in solved.items()]
    best = min(fits, key=lambda fit: fit.error)
    return best if best.error < 1 else None


def _solved(
    router_ED: torch.Tensor, found_TD: torch.Tensor, wanted_TE: torch.Tensor, watched_TE: torch.Tensor,
    device: torch.device,
) -> dict[float, torch.Tensor]:  # fmt: skip
    """By damping: ŵ = (mean of score x̂ + λ w) (mean of x̂ x̂ᵀ + λ I)⁻¹, over the tokens where each expert is watched."""
    n_experts, n_columns = router_ED.shape
    found = {damping: torch.empty_like(router_ED) for damping in DAMPINGS}
    chunk = max(1, CHUNK_BYTES // (8 * n_columns**2))
    found_TD = found_TD.to(device)
    for first in range(0, n_experts, chunk):
        experts = range(first, min(first + chunk, n_experts))
        tokens = [watched_TE[:, e].nonzero()[:, 0] for e in experts]
        tokens = [t[:: -(-len(t) // MAX_TOKENS) or 1] for t in tokens]
        offset_E1 = torch.tensor([0, *map(len, tokens)]).cumsum(0)
        token_n = torch.cat(tokens)
        weight_n = torch.cat([torch.full((len(t),), 1 / max(len(t), 1)) for t in tokens])
        hessian_EDD = backend.moments(found_TD, *(x.to(device) for x in (token_n, offset_E1, weight_n))).cpu().double()
        target_ED = torch.stack(
            [
                (wanted_TE[t, e] @ found_TD[t.to(device)].cpu()) / max(len(t), 1)
                for e, t in zip(experts, tokens, strict=True)
            ]
        ).double()
        rows_ED = router_ED[experts.start : experts.stop].double()
        diagonal_ED = hessian_EDD.diagonal(dim1=1, dim2=2)
        # an expert that is nowhere watched keeps its row
        mean_E1 = diagonal_ED.mean(1, keepdim=True).clamp_min(1e-20)
        before = 0.0
        for damping in sorted(DAMPINGS):
            diagonal_ED += (damping - before) * mean_E1
            before = damping
            root_EDD = torch.linalg.cholesky(hessian_EDD)
            solved_ED1 = torch.cholesky_solve((target_ED + damping * mean_E1 * rows_ED)[..., None], root_EDD)
            found[damping][experts.start : experts.stop] = solved_ED1[..., 0].float()
    return found


def agreement(ids_TK: torch.Tensor, other_TK: torch.Tensor) -> float:
    """Share of the experts selected that the other selects too."""
    return float((ids_TK[:, :, None] == other_TK[:, None, :]).any(2).double().mean())


@torch.inference_mode()
def calibrate_routers(
    stream: LayerStream,
    tokens_SL: np.ndarray,
    types: Types,
    matrices: Matrices,
    spool: Spool,
    *,
    n_experts: int,
    n_selected: int,
    device: torch.device,
    n_threads: int,
    progress: Progress,
) -> None:
    """Leaves the routers that help in the spool, which has all of the experts."""
    if spool.routers() is not None:
        return
    length = tokens_SL.shape[1]
    held_out_S = held_out(*tokens_SL.shape)
    taken_S = taken(held_out_S, length, n_experts, n_selected)
    tokens_SL, held_out_S = tokens_SL[taken_S.numpy()], held_out_S[taken_S]
    held_out_T = held_out_S.repeat_interleave(length)
    layers = {layer for layer, _, _ in types}
    fits: dict[int, Fit] = {}
    # of held-out tokens, by the model, by the file's router as it was and as it is calibrated
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    with ggml.encoding_threads(n_threads) as pool:
        streams = Streams(stream, tokens_SL, matrices, spool, pool, progress)
        trials = Trials(streams.found_SLD[held_out_S].clone(), States(TRIALS_BYTES, spool.folder))
        for index in range(stream.n_layers):
            with streams.layer(index) as (_, block):
                exact, found = ExpertCapture(block), ExpertCapture(block)
                with exact.listening():
                    streams.advance(streams.exact_SLD)
                streams.quantise_matrices()
                if block is not None and index in layers:
                    put_back(block, {(m, e): t for (l, m, e), t in types.items() if l == index}, spool, index, pool)
                    with found.listening():
                        streams.look(block)
                    exact_ids_TK, found_ids_TK = exact.selected(), found.selected()
                    streams.say("router", 0, 1)
                    best = fit(
                        block.router_ED.to(CPU), exact.scored(), found.scored(), held_out_T, exact_ids_TK, device
                    )
                    del exact, found  # before those of another pass come
                    trials.as_it_was(index, streams.found_SLD[held_out_S], streams.run, best is not None)
                    if best is not None:
                        fits[index] = best
                        block.router_ED.copy_(best.router_ED)
                after = ExpertCapture(block)
                with after.listening():
                    streams.advance(streams.found_SLD)
                trials.advance(streams.run)
                if index in fits:
                    selected = exact_ids_TK, found_ids_TK, after.selected()
                    exact_HK, found_HK, now_HK = (ids_TK[held_out_T] for ids_TK in selected)
                    chosen[index] = exact_HK, found_HK, now_HK
                del after
        exact_HLD = streams.exact_SLD[held_out_S]
        helps, kl_before, kl_after = trials.judge(
            streams.found_SLD[held_out_S], lambda hidden_HLD: mean_kl(stream, exact_HLD, hidden_HLD)
        )
        del streams
        if 0 < len(helps) < len(fits):
            # together they may do otherwise than each
            judged = Streams(stream, tokens_SL[held_out_S.numpy()], matrices, spool, pool, progress)
            now = through(judged, {index: fits[index].router_ED for index in helps}, types, spool, pool)
            if (kl := mean_kl(stream, exact_HLD, judged.found_SLD)) <= kl_after:
                kl_after, chosen = kl, {index: (*chosen[index][:2], now[index]) for index in helps}
            else:
                helps = list(fits)
        if not helps or kl_after >= kl_before:
            helps, chosen, kl_after = [], {}, kl_before
    agreements = [(agreement(exact, before), agreement(exact, after)) for exact, before, after in chosen.values()]
    mean_agreement = np.mean(agreements, 0) if agreements else np.ones(2)
    spool.put_routers(
        Routers(
            {index: fits[index].router_ED.numpy() for index in helps}, kl_before, kl_after, *mean_agreement.tolist()
        )
    )


def through(
    streams: Streams, router_ED: Mapping[int, torch.Tensor], types: Types, spool: Spool, pool: ThreadPoolExecutor
) -> dict[int, torch.Tensor]:
    """Takes the quantised stream through all layers, with these routers, whose choices are given: i64 (T, K)."""
    selected: dict[int, torch.Tensor] = {}
    for index in range(streams.n_layers):
        with streams.layer(index) as (_, block):
            streams.quantise_matrices()
            if block is not None and (own := {(m, e): t for (l, m, e), t in types.items() if l == index}):
                put_back(block, own, spool, index, pool)
            capture = ExpertCapture(block)
            if block is not None and index in router_ED:
                block.router_ED.copy_(router_ED[index])
            with capture.listening():
                streams.advance(streams.found_SLD)
            if index in router_ED:
                selected[index] = capture.selected()
    return selected


def taken(held_out_S: torch.Tensor, length: int, n_experts: int, n_selected: int) -> torch.Tensor:
    """bool (S,): those held out, and of the others, from all of the text, as many as routers are fitted on."""
    n_wanted = -(-MAX_TOKENS * n_experts // (n_watched(n_experts, n_selected) * length))
    fit_s = (~held_out_S).nonzero()[:, 0]
    n = min(n_wanted, len(fit_s))
    taken_S = held_out_S.clone()
    taken_S[fit_s[((torch.arange(n) + 0.5) * len(fit_s) / n).long()]] = True
    return taken_S


def held_out(n_sequences: int, length: int) -> torch.Tensor:
    """bool (S,): from all of the text."""
    n = max(1, min(n_sequences // HELD_OUT, MAX_HELD_OUT_TOKENS // length))
    held_out_S = torch.zeros(n_sequences, dtype=torch.bool)
    held_out_S[((torch.arange(n) + 0.5) * n_sequences / n).long()] = True
    return held_out_S


@dataclass
class Trials:
    """Held-out sequences through the quantised model: with no router calibrated, and with all but one."""

    untouched_HLD: torch.Tensor
    without: States[int]
    _next: dict[int, torch.Tensor] = field(default_factory=dict)
    _is_through: bool = False

    def as_it_was(self, layer: int, all_HLD: torch.Tensor, run: Run, is_calibrated: bool) -> None:
        """Through a layer with its own router. all_HLD: what all calibrated routers before it have made."""
        self.untouched_HLD, self._is_through = run(self.untouched_HLD), True
        if is_calibrated:
            self._next = {layer: run(all_HLD)}

    def advance(self, run: Run) -> None:
        """The others through the layer, whose router is calibrated where it is to be."""
        if not self._is_through:
            self.untouched_HLD = run(self.untouched_HLD)
        for layer in self.without:
            self.without[layer] = run(self.without[layer])
        for layer, hidden_HLD in self._next.items():
            self.without[layer] = hidden_HLD
        self._next, self._is_through = {}, False

    def judge(self, all_HLD: torch.Tensor, kl: Callable[[torch.Tensor], float]) -> tuple[list[int], float, float]:
        """Layers whose calibrated router helps; KL divergence with none of them, and with all.

        kl: of hidden states after the last layer, nats per token.
        """
        before, after = kl(self.untouched_HLD), kl(all_HLD)
        helps = [layer for layer in self.without if kl(self.without[layer]) > after]
        self.without.close()
        return helps if after < before else [], before, after


def describe(routers: Routers) -> str:
    return (
        f"calibrated routers: {len(routers.router_ED)}; KL divergence on held-out text "
        f"{routers.kl_before:.5f} -> {routers.kl_after:.5f}, experts chosen as by the model "
        f"{routers.agreement_before:.1%} -> {routers.agreement:.1%}"
    )
