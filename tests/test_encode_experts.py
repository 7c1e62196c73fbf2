"""Experts with error feedback: what they are fitted to, who decides, and what is left after a crash."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from moe2gguf import encode_experts as stage
from moe2gguf import feedback, ggml, streams
from moe2gguf.capture import LayerCapture, tokens_of
from moe2gguf.encode_experts import Inputs, Tokens, encode_experts
from moe2gguf.experts import ExpertBlock, find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.settings import AFFINITIES
from moe2gguf.spool import Outcome, Spool
from moe2gguf.stream import LayerStream

N_EXPERTS, LENGTH = 6, 32
TOKENS_SL = np.random.default_rng(0).integers(0, 300, (16, LENGTH))


def every_expert(quant_type: QuantType, layers: tuple[int, ...] = (0, 1)) -> dict[tuple[int, str, int], QuantType]:
    return {(layer, m, e): quant_type for layer in layers for m in ("gate", "up", "down") for e in range(N_EXPERTS)}


def encode(
    folder: Path, types: dict, spool: Spool, affinity: str = "gate", output_moments: dict[int, np.ndarray] | None = None
) -> None:
    encode_experts(
        LayerStream(folder),
        TOKENS_SL,
        types,
        spool,
        affinity=affinity,
        device=torch.device("cpu"),
        n_threads=2,
        progress=lambda *_: None,
        output_moments=output_moments or {},
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    block: ExpertBlock
    capture: LayerCapture
    pool: ThreadPoolExecutor

    def work(self, affinity: str = "gate", output_moments_DD: np.ndarray | None = None) -> stage._LayerWork:
        return stage._LayerWork(
            self.block, self.capture, self.capture, LENGTH, affinity, torch.device("cpu"), self.pool, output_moments_DD
        )


@pytest.fixture(scope="module")
def layer(tiny: Callable[..., Path]) -> Iterator[Layer]:
    """The first layer of a small qwen3_moe, with what its experts were given."""
    stream = LayerStream(tiny("qwen3_moe"))
    with torch.inference_mode(), stream.layer(0) as module, ThreadPoolExecutor(2) as pool:
        block = find_experts(module)
        assert block is not None
        capture = LayerCapture(module, block)
        with capture.listening():
            stream.run(0, module, stream.embed(torch.from_numpy(TOKENS_SL)))
        yield Layer(block, capture, pool)


@pytest.fixture
def feedback_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random matrices and few tokens it might not."""
    ever_less = itertools.count(0, -1)
    monkeypatch.setattr(Inputs, "error", lambda *_: float(next(ever_less)))


def gate_up_inputs(work: stage._LayerWork, expert: int) -> Inputs:
    return Inputs(work._exact_TD, work._found_TD, {expert: work._tokens(expert)})


@pytest.mark.parametrize("affinity", AFFINITIES)
@torch.inference_mode()
def test_moments_are_weighted_means(layer: Layer, affinity: str) -> None:
    """Token by token: the expert's own with its gate weights, the layer's with the belief of 32 tokens."""
    expert, power = 2, AFFINITIES.index(affinity)
    hessian_KK = gate_up_inputs(layer.work(affinity), expert).moments(torch.device("cpu"))[1].hessian_EKK[0]

    x_TD, ids_TK, gates_TK = layer.capture.routed()
    own = [(x_TD[t].double(), float(gates_TK[t, k]) ** power) for t, k in (ids_TK == expert).nonzero().tolist()]
    probability_TE = torch.softmax(x_TD @ layer.block.router_ED.T, -1)
    others = [(x_D.double(), float(p_E[expert]) ** power) for x_D, p_E in zip(x_TD, probability_TE, strict=True)]

    def mean(tokens: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        return sum(c * torch.outer(x, x) for x, c in tokens) / sum(c for _, c in tokens)

    expected_KK = (len(own) * mean(own) + 32 * mean(others)) / (len(own) + 32)
    torch.testing.assert_close(hessian_KK.double(), expected_KK, rtol=1e-4, atol=1e-6)


def test_moments_of_what_is_not_held_out_and_of_all() -> None:
    """Experts with different numbers of tokens, one of them with none held out."""
    rng = torch.Generator().manual_seed(0)
    exact_TK, found_TK = torch.randn(2, 15, 5, generator=rng)
    of = {
        e: Tokens(torch.randperm(15, generator=rng)[:n], torch.rand(n, generator=rng), torch.arange(n) > kept)
        for e, n, kept in ((4, 7, 4), (0, 3, 3), (9, 12, 6))
    }
    fit, whole = Inputs(exact_TK, found_TK, of).moments(torch.device("cpu"))
    for i, tokens in enumerate(of.values()):
        for found, chosen_n in ((fit, ~tokens.held_out_n), (whole, torch.ones_like(tokens.held_out_n))):
            exact_nK, found_nK = (x_TK[tokens.token_n[chosen_n]].double() for x_TK in (exact_TK, found_TK))
            share_n1 = (tokens.weight_n[chosen_n] / tokens.weight_n[chosen_n].sum()).double()[:, None]
            for moments_EKK, left_nK in ((found.hessian_EKK, found_nK), (found.cross_EKK, exact_nK)):
                expected_KK = (share_n1 * left_nK).T @ found_nK
                torch.testing.assert_close(moments_EKK[i].double(), expected_KK, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_an_expert_without_tokens_leans_on_the_layer(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, ids_TK, gates_TK = layer.capture.routed()
    nobody = (x_TD, torch.where(ids_TK == 3, 4, ids_TK), gates_TK)
    monkeypatch.setattr(layer.capture, "routed", lambda: nobody)
    work = layer.work()
    assert not len(tokens_of(3, work._ids_TK, work._gates_TK)[0])
    types = {(m, e): QuantType.IQ2_XXS for m in ("gate", "up", "down") for e in range(N_EXPERTS)}
    blocks, _ = work.encode(types, lambda *_: None)
    exact_NK = layer.block.down(3).numpy()
    found_NK = ggml.decode(blocks["down", 3], QuantType.IQ2_XXS, exact_NK.shape[1])
    assert np.square(found_NK - exact_NK).mean() < 0.5 * np.square(exact_NK).mean()


@torch.inference_mode()
def test_down_is_fitted_to_what_it_will_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against least squares with a ridge, written out row by row in f64; the last panel of columns is not full."""
    rng = torch.Generator().manual_seed(0)
    monkeypatch.setattr(stage, "PANEL", 3)
    exact_nK = torch.randn(300, 8, generator=rng)
    found_nK = exact_nK + 0.5 * torch.randn(300, 8, generator=rng)
    weight_n = torch.rand(300, generator=rng)
    weight_NK = torch.randn(5, 8, generator=rng)
    tokens = Tokens(torch.arange(300), weight_n, torch.zeros(300, dtype=torch.bool))
    _, found = Inputs(exact_nK, found_nK, {0: tokens}).moments(torch.device("cpu"))
    hessian_KK = found.hessian_EKK[0]
    root_KK = feedback.curvature(found.hessian_EKK, 0.1).root_EKK[0]
    found_NK = weight_NK.clone()
    stage.fit(found_NK, hessian_KK, found.cross_EKK[0], root_KK)

    share_n = (weight_n / weight_n.sum()).double().sqrt()[:, None]
    ridge = (0.1 * hessian_KK.diagonal().mean().double()).sqrt()
    left = torch.cat([share_n * found_nK.double(), ridge * torch.eye(8, dtype=torch.float64)])
    for row_K, expected in zip(found_NK, weight_NK.double(), strict=True):
        right = torch.cat([share_n[:, 0] * (exact_nK.double() @ expected), ridge * expected])
        solved_K = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        torch.testing.assert_close(row_K.double(), solved_K, rtol=1e-4, atol=1e-5)


def test_held_out_tokens_are_of_all_of_the_text() -> None:
    """Errors that only its second half brings out are seen, however long it is."""
    n = 4 * stage.MAX_HELD_OUT_TOKENS
    x_nK = torch.zeros(n, 2)
    x_nK[n // 2 :, 0] = 1
    inputs = Inputs(x_nK, x_nK, {5: Tokens(torch.arange(n), torch.ones(n), torch.ones(n, dtype=torch.bool))})
    assert inputs.error(5, torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)) == stage.MAX_HELD_OUT_TOKENS / 2


def test_what_is_held_out_is_so_for_all_experts(layer: Layer) -> None:
    """A token that one expert is judged by no other is fitted to, be it its own or the layer's."""
    work = layer.work()
    of_token: dict[int, bool] = {}
    for e in range(N_EXPERTS):
        tokens = work._tokens(e)
        for token, held_out in zip(tokens.token_n.tolist(), tokens.held_out_n.tolist(), strict=True):
            assert of_token.setdefault(token, held_out) == held_out
    assert 0.2 < np.mean([*of_token.values()]) < 0.3


@torch.inference_mode()
def test_importance_is_of_what_is_not_held_out(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While encoders are compared; the file's bytes are made with that of all tokens."""
    seen: list[np.ndarray] = []
    honest = stage._LayerWork._ggml

    def ggml_encoder(self, weights, types, importance):
        seen.append(importance[0])
        return honest(self, weights, types, importance)

    monkeypatch.setattr(stage._LayerWork, "_ggml", ggml_encoder)
    types = {(matrix, 0): QuantType.IQ2_XXS for matrix in ("gate", "up", "down")}
    work = layer.work()
    inputs = gate_up_inputs(work, 0)
    most, whole = (m.hessian_EKK[0].diagonal().numpy() for m in inputs.moments(torch.device("cpu")))
    weights = dict(zip((("gate", 0), ("up", 0)), layer.block.gate_up(0).chunk(2), strict=True))
    work._matrices(weights, types, inputs, {}, [])
    for found, expected in zip(seen, (most, whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(most, whole, rtol=1e-3)


def test_less_error_than_ggml_on_what_was_not_seen(tiny: Callable[..., Path], tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    encode(tiny("qwen3_moe"), every_expert(QuantType.IQ2_XXS), spool)
    outcomes = spool.outcomes()
    assert len(outcomes) == 2 * 3 * N_EXPERTS
    assert all(outcome.error <= 1 for outcome in outcomes)
    # of random weights and 192 tokens for an expert, many of which are other experts'
    assert np.mean([outcome.error for outcome in outcomes]) < 0.95
    assert {outcome.damping for outcome in outcomes} <= {None, *stage.DAMPINGS}
    assert "error feedback kept for" in stage.describe(outcomes)


@torch.inference_mode()
def test_ggmls_bytes_stay_where_feedback_is_worse(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback that gets the wrong weights loses every comparison."""
    honest = feedback.quantize
    monkeypatch.setattr(feedback, "quantize", lambda w_ENK, *rest, **options: honest(-w_ENK, *rest, **options))
    work = layer.work()
    types = {(m, e): QuantType.Q3_K for m in ("gate", "up", "down") for e in range(N_EXPERTS)}
    blocks, outcomes = work.encode(types, lambda *_: None)
    assert all(outcome.damping is None and outcome.error == 1 for outcome in outcomes)
    hessian_KK = gate_up_inputs(work, 1).moments(torch.device("cpu"))[1].hessian_EKK[0]
    gate_ID, _ = layer.block.gate_up(1).chunk(2)
    expected = ggml.encode(gate_ID.numpy(), QuantType.Q3_K, hessian_KK.diagonal().numpy())
    np.testing.assert_array_equal(blocks["gate", 1], expected)


def test_types_without_feedback_are_ggmls(tiny: Callable[..., Path], tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    encode(tiny("qwen3_moe"), every_expert(QuantType.Q5_0, (0,)), spool)
    assert all(outcome.damping is None for outcome in spool.outcomes())


def test_a_crash_costs_one_layer(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = Spool(tmp_path / "whole"), Spool(tmp_path / "broken")
    types = every_expert(QuantType.IQ4_XS)
    encode(tiny("qwen3_moe"), types, whole)

    put = Spool.put
    monkeypatch.setattr(Spool, "put", lambda self, layer, *rest: put(self, layer, *rest) if layer == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(tiny("qwen3_moe"), types, broken)
    monkeypatch.undo()
    assert broken.has(0) and not broken.has(1)
    before = broken.path(0).stat().st_mtime_ns
    encode(tiny("qwen3_moe"), types, broken)
    assert broken.path(0).stat().st_mtime_ns == before
    for layer in (0, 1):
        assert broken.path(layer).read_bytes() == whole.path(layer).read_bytes()


def test_spool(tmp_path: Path) -> None:
    spool, outcome = Spool(tmp_path / "s"), Outcome("up", 3, "Q4_K", None, 1.0)
    assert not spool.has(5)
    block_NB = np.arange(6, dtype=np.uint8).reshape(2, 3)
    spool.put(5, {("up", 3): block_NB}, [outcome])
    assert spool.has(5) and not spool.has(0)
    np.testing.assert_array_equal(spool.get(5, "up", 3), block_NB)
    assert spool.outcomes() == [outcome]
    spool.path(6).write_bytes(b"cut short")
    assert not spool.has(6)
    spool.remove()
    assert not spool.folder.exists()


def test_later_layers_are_fitted_to_what_reaches_them(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream that a layer is fitted to is the one that the layers before it, as quantised, make."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    init = stage._LayerWork.__init__

    def spy(self: stage._LayerWork, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        seen.append((self._exact_TD, self._found_TD))

    monkeypatch.setattr(stage._LayerWork, "__init__", spy)
    spool = Spool(tmp_path / "spool")
    encode(tiny("qwen3_moe"), every_expert(QuantType.IQ2_XXS), spool)
    (first, first_found), (second, second_found) = seen
    assert torch.equal(first, first_found)

    stream = LayerStream(tiny("qwen3_moe"))
    with torch.inference_mode():
        with stream.layer(0) as layer:
            block = find_experts(layer)
            assert block is not None
            for e in range(N_EXPERTS):
                matrices = {
                    m: torch.from_numpy(ggml.decode(spool.get(0, m, e), QuantType.IQ2_XXS, 256))
                    for m in ("gate", "up", "down")
                }
                block.set_gate_up(e, torch.cat([matrices["gate"], matrices["up"]]))
                block.set_down(e, matrices["down"])
            hidden_SLD = stream.run(0, layer, stream.embed(torch.from_numpy(TOKENS_SL)))
        with stream.layer(1) as layer:
            capture = LayerCapture(layer, find_experts(layer))
            with capture.listening():
                stream.run(1, layer, hidden_SLD)
    torch.testing.assert_close(second_found, capture.routed()[0], rtol=1e-4, atol=1e-4)
    assert (second - second_found).norm() > 0.01 * second.norm()


@pytest.mark.parametrize("limit", ["CHUNK_BYTES", "CHUNK_INPUT_BYTES"])
def test_one_expert_at_a_time_gives_the_same(
    limit: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = every_expert(QuantType.IQ2_XXS, (0,))
    together, alone = Spool(tmp_path / "together"), Spool(tmp_path / "alone")
    encode(tiny("mixtral"), types, together)
    monkeypatch.setattr(stage, limit, 1)
    chunks = []
    of_work = stage._LayerWork._chunks
    monkeypatch.setattr(stage._LayerWork, "_chunks", lambda work: chunks.append([*of_work(work)]) or chunks[-1])
    encode(tiny("mixtral"), types, alone)
    assert chunks == [[range(e, e + 1) for e in range(N_EXPERTS)]]
    for layer, matrix, expert in types:
        # sums of a batch may round otherwise than those of one: a near tie may fall the other way
        same = together.get(layer, matrix, expert) == alone.get(layer, matrix, expert)
        assert same.mean() > 0.99


def test_streams_on_disk_give_the_same(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = every_expert(QuantType.IQ2_XXS)
    kept, away = Spool(tmp_path / "kept"), Spool(tmp_path / "away")
    encode(tiny("mixtral"), types, kept)
    monkeypatch.setattr(streams, "AWAY_BYTES", 0)
    encode(tiny("mixtral"), types, away)
    for layer in (0, 1):
        assert away.path(layer).read_bytes() == kept.path(layer).read_bytes()
    assert not [path for path in away.folder.iterdir() if path.is_dir()]


def test_tokens_beyond_the_most_are_from_all_of_the_text(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tokens] = []
    of_work = stage._LayerWork._tokens
    monkeypatch.setattr(stage._LayerWork, "_tokens", lambda work, e: given.append(of_work(work, e)) or given[-1])
    types = every_expert(QuantType.IQ2_XXS, (0,))
    encode(tiny("mixtral"), types, Spool(tmp_path / "all"))
    every = given.copy()
    given.clear()
    monkeypatch.setattr(stage, "MAX_EXPERT_TOKENS", 40)
    encode(tiny("mixtral"), types, Spool(tmp_path / "few"))
    n_sample = TOKENS_SL.size  # of the layer: so short a text is all of it
    for whole, few in zip(every, given, strict=True):
        n_own = len(whole.token_n) - n_sample
        assert n_own > 40 and len(few.token_n) == 40 + n_sample == len(few.weight_n)
        assert torch.equal(few.token_n[[0, 39]], whole.token_n[[0, n_own - 1]])


# --- rows that make up for each other ---


def gradients(n: int, n_outputs: int, seed: int) -> torch.Tensor:
    """With a spectrum that falls."""
    rng = torch.Generator().manual_seed(seed)
    basis_DD = torch.linalg.qr(torch.randn(n_outputs, n_outputs, generator=torch.Generator().manual_seed(9)))[0]
    return torch.randn(n, n_outputs, generator=rng) * torch.arange(1, n_outputs + 1) ** -0.5 @ basis_DD


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@torch.inference_mode()
def test_gradients_by_gate_and_up(tiny: Callable[..., Path], model_type: str) -> None:
    """Drawn and taken back through the expert by autograd, tokens weighed: within what the draws leave. gpt-oss has
    biases, rows of gate and up in turns, and an activation of both that is clamped."""
    stream, expert = LayerStream(tiny(model_type)), 3
    with stream.layer(0) as module:
        block = find_experts(module)
        assert block is not None
        n_hidden = block.down(expert).shape[0]
        x_nD = gradients(64, n_hidden, 1)
        weight_n = torch.linspace(0.1, 1, 64)
        output_nD = gradients(20_000, n_hidden, 0)
        found = stage.gate_up_moments(block, expert, x_nD, weight_n, output_nD.T @ output_nD / len(output_nD))
        given = block.pre_activation(expert, x_nD)
        down_DI = block.down(expert)
        with torch.inference_mode(False), torch.enable_grad():
            leaves, down_DI = [x.clone().requires_grad_() for x in given], down_DI.clone()
            expected = [torch.zeros_like(f).clone() for f in found]
            for draws_nD in output_nD.clone().split(64)[:300]:
                loss = (block.activated(*leaves) @ down_DI.T * draws_nD).sum()
                for total_II, slope_nI in zip(expected, torch.autograd.grad(loss, leaves), strict=True):
                    total_II += slope_nI.T @ (weight_n[:, None] * slope_nI) / weight_n.sum() / 300
    for found_II, expected_II in zip(found, expected, strict=True):
        assert (found_II - expected_II).norm() < 0.15 * expected_II.norm()


@torch.inference_mode()
def test_what_the_loss_minds_falls(layer: Layer, feedback_wins: None) -> None:
    """tr(G D H Dᵀ) of the experts' matrices, with the rows' feedback and without: gate's, up's and down's."""
    block = layer.block
    output_nD = gradients(4096, layer.capture.routed()[0].shape[1], 0)
    output_DD = output_nD.T @ output_nD / len(output_nD)
    types = {(matrix, e): QuantType.IQ2_XS for matrix in ("gate", "up", "down") for e in range(N_EXPERTS)}
    costs = {}
    for by_rows in (False, True):
        work = layer.work(output_moments_DD=output_DD.half().numpy() if by_rows else None)
        blocks, outcomes = work.encode(types, lambda *_: None)
        assert all(outcome.damping is not None for outcome in outcomes)
        for e in range(N_EXPERTS):
            tokens = work._tokens(e)
            x_nD = work._exact_TD[tokens.token_n]
            gate_II, up_II = stage.gate_up_moments(block, e, x_nD, tokens.weight_n, output_DD)
            x_nI = block.activation(e, x_nD)
            gate_ID, up_ID = block.gate_up(e).chunk(2)
            for matrix, exact, inputs_nK, moments in (
                ("gate", gate_ID, x_nD, gate_II),
                ("up", up_ID, x_nD, up_II),
                ("down", block.down(e), x_nI, output_DD),
            ):
                found = torch.from_numpy(ggml.decode(blocks[matrix, e], QuantType.IQ2_XS, exact.shape[1]))
                hessian = inputs_nK.T @ (tokens.weight_n[:, None] * inputs_nK)
                cost = float((moments @ (found - exact) @ hessian * (found - exact)).sum())
                costs[matrix, by_rows] = costs.get((matrix, by_rows), 0.0) + cost
    ratio = {matrix: costs[matrix, True] / costs[matrix, False] for matrix in ("gate", "up", "down")}
    # random matrices and slopes leave gate's and up's gradients little in common
    assert ratio["down"] < 0.85 and ratio["gate"] < 0.98 and ratio["up"] < 0.96, ratio


def test_gradients_change_the_experts_of_their_layer(
    tiny: Callable[..., Path], tmp_path: Path, feedback_wins: None
) -> None:
    folder, types = tiny("qwen3_moe"), every_expert(QuantType.IQ2_XXS)
    output_nD = gradients(512, 256, 0)
    plain, by_rows = Spool(tmp_path / "plain"), Spool(tmp_path / "rows")
    encode(folder, types, plain)
    encode(folder, types, by_rows, output_moments={1: (output_nD.T @ output_nD).half().numpy()})
    for layer, same in ((0, True), (1, False)):
        for matrix in ("gate", "up", "down"):
            assert np.array_equal(plain.get(layer, matrix, 2), by_rows.get(layer, matrix, 2)) == same


@pytest.mark.parametrize(
    ("n_threads", "memory_gb", "device", "scale"),
    [
        (2, 24, "cpu", 1),
        (16, 64, "cpu", 4),
        (64, 128, "cpu", 16),
        (64, 32, "cpu", 4),
        (64, 4, "cpu", 1),
        (64, 512, "cuda", 1),
    ],
)
def test_more_experts_at_a_time_for_more_threads(
    n_threads: int, memory_gb: int, device: str, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "memory_bytes", lambda: memory_gb * 2**30)
    assert stage.chunk_scale(n_threads, torch.device(device)) == scale


@torch.inference_mode()
def test_scaled_chunks_give_the_same(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "CHUNK_BYTES", 1)
    types = {(matrix, e): QuantType.IQ2_XXS for matrix in ("gate", "up", "down") for e in range(N_EXPERTS)}
    found = []
    for scale, n_chunks in ((1, N_EXPERTS), (2**19, 3)):
        work = dataclasses.replace(layer).work()
        work._scale = scale
        assert len([*work._chunks()]) == n_chunks
        found.append(work.encode(types, lambda *_: None)[0])
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
