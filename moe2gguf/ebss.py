"""The model writes calibration text that uses its experts evenly (after EBSS, MoEQuant, arXiv:2505.03804).

The paper searches with beams, kept by -log P(S) / len(S) + σ(S) / τ, where

    σ(S) = mean over layers of sqrt(Σ_e (u_e - ū)² / (E - 1)),  u_e the share of selections that went to expert e,

and the likelihood draws all beams to what the model says most often, soon to repetitions. Here text is drawn where the
paper looks for the likeliest, with probability P(S) exp(-len(S) σ(S) / τ), S all sequences together. Beams draw their
tokens from the model's own distribution; after every 128 tokens all of a sequence's go on from one of them, drawn by
how evenly the whole text then uses the experts. What repeats itself is rejected.

Shapes: G sequences at a time, W beams of each, L layers, E experts, K selected, T tokens of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe2gguf import ggml
from moe2gguf.errors import Moe2ggufError
from moe2gguf.llama import OpenModel, captured_log, open_model
from moe2gguf.sample import decode, draw, first_token, n_at_once
from moe2gguf.text import CalibrationText

# of each sequence; the paper's 4 take twice the time for text that is as good
BEAMS = 2
# tokens that a beam goes by itself: choosing more often makes the text more even, and files calibrated on it worse
SEGMENT_TOKENS = 128
# τ. Below it text is more even, and files calibrated on it worse: it is less like what the model writes
TEMPERATURE = 2.5
# of drawing a beam of each sequence, given those of all others
ROUNDS = 4
# of a text's runs of so many tokens, at most that share may have been there before
REPEATED_RUN, REPEATED_SHARE = 8, 0.3
# so many texts may be rejected for each that is kept
MAX_REJECTED = 3


@dataclass(frozen=True)
class Balanced:
    text: CalibrationText
    balance: float  # σ of the whole
    n_rejected: int


def n_groups_at_once(n_sequences: int, sequence_tokens: int, kv_bytes_per_token: int) -> int:
    return max(1, n_at_once(n_sequences * BEAMS, sequence_tokens, kv_bytes_per_token) // BEAMS)


def balanced_text(
    gguf_path: Path,
    n_sequences: int,
    sequence_tokens: int,
    *,
    n_experts: int,
    n_selected: int,
    kv_bytes_per_token: int,
    n_threads: int,
    gpu: int | None = None,
    seed: int,
    progress: Callable[[int, int], None],
) -> Balanced:
    """Raises Moe2ggufError for a model that writes little but repetitions."""
    n_groups = n_groups_at_once(n_sequences, sequence_tokens, kv_bytes_per_token)
    selections = _Selections(n_selected)
    texts: list[np.ndarray] = []
    n_rejected = 0
    with (
        captured_log() as errors,
        open_model(
            gguf_path,
            errors,
            sequence_tokens=sequence_tokens,
            n_batch=n_groups * BEAMS,
            n_sequences=n_groups * BEAMS,
            n_threads=n_threads,
            gpu=gpu,
            observe=selections.callback,
        ) as model,
    ):
        counts_LE = np.zeros((1, n_experts))
        while len(texts) < n_sequences:
            rng = np.random.default_rng([seed, len(texts), n_rejected])
            beams = _Beams(model, selections, min(n_groups, n_sequences - len(texts)), n_experts, counts_LE, rng)
            for position in range(sequence_tokens):
                done = len(texts) * sequence_tokens + position * beams.n_groups
                progress(done, n_sequences * sequence_tokens)
                beams.step(position, sequence_tokens)
            for tokens, own_LE in beams.chosen():
                if is_repetitive(tokens):
                    n_rejected += 1
                else:
                    texts.append(tokens)
                    counts_LE = counts_LE + own_LE
            if n_rejected > MAX_REJECTED * n_sequences:
                raise Moe2ggufError(
                    f"of {n_rejected + len(texts)} texts that the model wrote {n_rejected} repeat themselves; "
                    "calibrate on --text FILE"
                )
    text = CalibrationText(np.stack(texts), "expert-balanced self-sampling")
    return Balanced(text, float(balance(counts_LE)), n_rejected)


def balance(counts_LE: np.ndarray) -> np.ndarray:
    """σ: 0 where all experts of each layer are selected alike; () for (L, E), of further leading axes for more."""
    share_LE = counts_LE / np.maximum(counts_LE.sum(-1, keepdims=True), 1)
    return np.asarray(share_LE.std(-1, ddof=1).mean(-1))


def is_repetitive(tokens: np.ndarray) -> bool:
    if len(tokens) < REPEATED_RUN:
        return False
    runs = {tuple(run) for run in np.lib.stride_tricks.sliding_window_view(tokens, REPEATED_RUN).tolist()}
    return len(runs) < (1 - REPEATED_SHARE) * (len(tokens) - REPEATED_RUN + 1)


class _Selections:
    """What the routers chose for the last batch, overheard while the graph runs."""

    def __init__(self, n_selected: int):
        import llama_cpp

        self.n_selected = n_selected
        self._ids_by_layer: dict[int, np.ndarray] = {}  # i32 (T, K)
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._hear)

    def _hear(self, tensor: int, is_question: bool, _: int) -> bool:
        name = ggml.tensor_name(tensor)
        if not name.startswith("ffn_moe_topk-"):
            return not is_question
        if not is_question:
            self._ids_by_layer[int(name.partition("-")[2])] = ggml.tensor_rows(tensor, self.n_selected)
        return True

    def counts(self, n_experts: int) -> np.ndarray:
        """i64 (T, L, E)"""
        ids_TLK = np.stack([ids for _, ids in sorted(self._ids_by_layer.items())], 1)
        return (ids_TLK[..., None] == np.arange(n_experts)).sum(2)


class _Beams:
    """G sequences side by side, W beams of each."""

    def __init__(
        self,
        model: OpenModel,
        selections: _Selections,
        n_groups: int,
        n_experts: int,
        before_LE: np.ndarray,
        rng: np.random.Generator,
    ):
        self._model, self._selections, self._rng = model, selections, rng
        self.n_groups, self._n_experts, self._before_LE = n_groups, n_experts, before_LE
        self._tokens_GWT = np.full((n_groups, BEAMS, 1), first_token(model))
        self._counts_GWLE = np.zeros((n_groups, BEAMS, 1, n_experts))
        model.forget()

    def step(self, position: int, n_positions: int) -> None:
        """The tokens at this position, and draws the next."""
        shape = self._tokens_GWT.shape[:2]
        logits = decode(self._model, self._tokens_GWT[..., -1].ravel(), np.arange(shape[0] * shape[1]), position)
        own_TLE = self._selections.counts(self._n_experts)
        self._counts_GWLE = self._counts_GWLE + own_TLE.reshape(*shape, *own_TLE.shape[1:])
        if position + 1 == n_positions:
            return
        tokens_GW = draw(logits, self._rng).reshape(shape)
        self._tokens_GWT = np.concatenate([self._tokens_GWT, tokens_GW[..., None]], 2)
        if position % SEGMENT_TOKENS == SEGMENT_TOKENS - 1:
            self._follow_the_chosen()

    def _chosen_G(self) -> np.ndarray:
        """A beam of each sequence, in turn, while all others are as they are (Gibbs sampling). Before its first turn a
        sequence counts as its beams do on average."""
        held_GLE, chosen_G = self._counts_GWLE.mean(1), np.full(self.n_groups, -1)
        total_LE = self._before_LE + held_GLE.sum(0)
        n_tokens = total_LE.sum(-1).max() / self._selections.n_selected
        for _ in range(ROUNDS):
            for g, own_WLE in enumerate(self._counts_GWLE):
                rest_LE = total_LE - held_GLE[g]
                energy_W = n_tokens * balance(rest_LE + own_WLE) / TEMPERATURE
                weight_W = np.exp(energy_W.min() - energy_W)
                chosen_G[g] = self._rng.choice(len(weight_W), p=weight_W / weight_W.sum())
                held_GLE[g] = own_WLE[chosen_G[g]]
                total_LE = rest_LE + held_GLE[g]
        return chosen_G

    def _follow_the_chosen(self) -> None:
        lib, memory = self._model.lib, self._model.lib.llama_get_memory(self._model.context)
        for g, chosen in enumerate(self._chosen_G().tolist()):
            for w in set(range(BEAMS)) - {chosen}:
                lib.llama_memory_seq_rm(memory, g * BEAMS + w, -1, -1)
                lib.llama_memory_seq_cp(memory, g * BEAMS + chosen, g * BEAMS + w, -1, -1)
            self._tokens_GWT[g], self._counts_GWLE[g] = self._tokens_GWT[g, chosen], self._counts_GWLE[g, chosen]

    def chosen(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens i64 (T,) and counts (L, E) of a beam of each sequence."""
        return [(self._tokens_GWT[g, w], self._counts_GWLE[g, w]) for g, w in enumerate(self._chosen_G().tolist())]
