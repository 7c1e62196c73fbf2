"""Measured errors against what the block really puts out, probes against whole models with one projection quantised."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pytest
import torch

from moe2gguf import ggml, probes
from moe2gguf.calibrate import calibrate, expert_statistics, graded
from moe2gguf.capture import LayerCapture, MatrixCapture, tokens_of
from moe2gguf.experts import ExpertBlock, find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.measure import ExpertErrors, Measure, likely_sample
from moe2gguf.run import no_progress
from moe2gguf.stats import SHRINKAGE_TOKENS, CalibrationStats, ExpertStats, MatrixErrors, load_stats, save_stats
from moe2gguf.stream import LayerStream
from moe2gguf.text import CalibrationText
from tests.tiny_moe import load_whole

pytestmark = pytest.mark.usefixtures("needs_runtime")

SMALL = {"hidden": 64, "intermediate": 96}
TYPES = (QuantType.IQ4_NL, QuantType.Q8_0)
# 96 tokens: below 128 every token is in the samples
TOKENS_SL = np.random.default_rng(0).integers(0, 300, (6, 16))
# Rows' errors are taken as independent. Where they are, cross terms cancel but for a share that falls with the number
# of rows and tokens: up to 14 % of one expert's error was seen here, with 96 rows and some 20 tokens, and 2 % of many
ONE_EXPERT, MANY_EXPERTS = 0.2, 0.05


class Captured:
    """Layer 1 of a tiny model with all that calibration sees of it."""

    def __init__(self, folder: Path):
        self.model = load_whole(folder).requires_grad_(False)
        self.layer = self.model.model.layers[1]
        block = find_experts(self.layer)
        assert block is not None
        self.block: ExpertBlock = block
        self.capture = LayerCapture(self.layer, block)
        self.moe_inputs: list[torch.Tensor] = []
        experts_parent = next(m for m in self.layer.modules() if block.module in m.children())
        experts_parent.register_forward_pre_hook(lambda _m, args: self.moe_inputs.append(args[0]))
        self.moe = experts_parent
        with torch.inference_mode(), self.capture.listening():
            self.model(torch.from_numpy(TOKENS_SL))
            self.stats: ExpertStats = expert_statistics(block, self.capture, len(TOKENS_SL))

    @torch.inference_mode()
    def output(self) -> torch.Tensor:
        """The whole MoE block on its own inputs, (T, D)."""
        out = self.moe(self.moe_inputs[0])
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(-1, out.shape[-1])

    def measured(self, gradient_TD: torch.Tensor | None = None) -> ExpertErrors:
        with ThreadPoolExecutor(2) as pool, torch.inference_mode():
            return Measure(TYPES, pool).experts(
                self.block, self.capture, self.stats, np.random.default_rng(0), lambda *_: None, gradient_TD
            )

    @torch.inference_mode()
    def output_error(self, expert: int, projection: str, quant_type: QuantType) -> float:
        """Mean squared change of the block's output per token with one matrix of one expert really quantised."""
        get, put, importance_EK = {
            "gate_up": (self.block.gate_up, self.block.set_gate_up, self.stats.importance_gate_up_ED),
            "gate": (self.block.gate_up, self.block.set_gate_up, self.stats.importance_gate_up_ED),
            "down": (self.block.down, self.block.set_down, self.stats.importance_down_EI),
        }[projection]
        exact, clean = get(expert).clone(), self.output()
        changed = torch.from_numpy(ggml.round_trip(exact.numpy(), quant_type, importance_EK[expert]))
        if projection == "gate":  # the up rows stay exact
            changed[len(changed) // 2 :] = exact[len(exact) // 2 :]
        put(expert, changed)
        changed = self.output()
        put(expert, exact)
        assert torch.equal(self.output(), clean)
        return float((changed - clean).double().square().sum(1).mean())


# plain, shared expert beside, transposed + interleaved + biased + clamped, sigmoid router with groups
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_expert_errors_are_the_blocks(
    model_type: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # without the layer's share, which tests below have; what is left is (n + 1) / n times the block's error
    monkeypatch.setattr("moe2gguf.measure.SHRINKAGE_TOKENS", 0)
    captured = Captured(tiny(model_type, **SMALL))
    found = captured.measured()
    gate_up_EJ, down_EJ, gate_share_EJ = found.gate_up_EJ, found.down_EJ, found.gate_share_EJ
    n_E, ratios = captured.stats.n_tokens_E, []
    for expert in np.flatnonzero(n_E):
        for j, quant_type in enumerate(TYPES):
            seen = n_E[expert] / (n_E[expert] + 1)
            down = captured.output_error(expert, "down", quant_type)
            assert down_EJ[expert, j] * seen == pytest.approx(down, rel=1e-4)
            gate_up = captured.output_error(expert, "gate_up", quant_type)
            assert gate_up_EJ[expert, j] * seen == pytest.approx(gate_up, rel=ONE_EXPERT)
            ratios.append(gate_up_EJ[expert, j] * seen / gate_up)
            # gate's and up's errors hardly meet, so that the joint one is nearly their sum
            gate = captured.output_error(expert, "gate", quant_type)
            assert gate_share_EJ[expert, j] == pytest.approx(gate / gate_up, rel=2 * ONE_EXPERT)
    assert np.mean(ratios) == pytest.approx(1, rel=MANY_EXPERTS)


def test_errors_of_experts_that_saw_little(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Own tokens by g², the layer's by p² as 32 tokens of weight, where p of a token's top expert is its gate weight on
    average; experts no token reached are not free."""
    monkeypatch.setattr("moe2gguf.capture.LAYER_SAMPLE_TOKENS", TOKENS_SL.size)
    captured = Captured(tiny("qwen3_moe", **SMALL, n_experts=64, top_k=1))
    n_E = captured.stats.n_tokens_E
    assert (n_E == 0).any() and (n_E > 3).any()
    down_EJ = captured.measured().down_EJ
    assert (down_EJ > 0).all() and np.isfinite(down_EJ).all()
    x_TD, ids_TK, gates_TK = captured.capture.routed()
    probability_TE = torch.softmax((x_TD @ captured.block.router_ED.T).double(), -1)
    probability_TE *= gates_TK.mean() / probability_TE.max(1).values.mean()
    for expert in (int(n_E.argmin()), int(n_E.argmax())):
        exact_DI = captured.block.down(expert).numpy()
        importance_I = captured.stats.importance_down_EI[expert]
        delta_DI = torch.from_numpy(ggml.round_trip(exact_DI, TYPES[0], importance_I) - exact_DI)
        with torch.inference_mode():
            sq_T = (captured.block.activation(expert, x_TD) @ delta_DI.T).double().square().sum(1)
        tokens_n, gates_n = tokens_of(expert, ids_TK, gates_TK)
        n = len(tokens_n)
        own = float((gates_n.double().square() * sq_T[tokens_n]).sum() / n) if n else 0.0
        layer = float((probability_TE[:, expert].square() * sq_T).mean())
        blended = (n * own + SHRINKAGE_TOKENS * layer) / (n + SHRINKAGE_TOKENS)
        assert down_EJ[expert, 0] == pytest.approx(blended * (n + 1) / len(x_TD), rel=1e-3)


def test_a_sample_of_rows_and_tokens_stands_for_all(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured(tiny("mixtral", **SMALL))
    whole = captured.measured()
    monkeypatch.setattr("moe2gguf.measure.MAX_ERROR_ROWS", 32)
    monkeypatch.setattr("moe2gguf.measure.MAX_ERROR_TOKENS", 16)
    # the share of gate is a ratio, which no sum makes better
    sampled = captured.measured()
    for all_EJ, sampled_EJ in ((whole.gate_up_EJ, sampled.gate_up_EJ), (whole.down_EJ, sampled.down_EJ)):
        assert not np.array_equal(all_EJ, sampled_EJ)
        # 32 of 64 or 96 rows, and 16 of some 30 tokens: each expert within a third, all together within a tenth
        np.testing.assert_allclose(sampled_EJ, all_EJ, rtol=0.35)
        np.testing.assert_allclose(sampled_EJ.sum(0), all_EJ.sum(0), rtol=0.1)


@pytest.mark.parametrize("matters", ["alike", "unlike", "one alone", "nothing"])
def test_a_likely_sample_adds_up(matters: str) -> None:
    """Over all starts each row counts once: sums are right on the average, whatever they are of."""
    n, n_max, n_starts = 50, 8, 4000
    matters_R = {
        "alike": torch.ones(n),
        "unlike": torch.arange(n).float() ** 4,
        "one alone": torch.eye(n)[7],  # which is certain then
        "nothing": torch.zeros(n),  # as of an expert whose hidden units are all off
    }[matters]
    mean_R = np.zeros(n)
    for start in np.arange(n_starts) / n_starts:
        rows, times_R = likely_sample(matters_R, n_max, start)
        assert len(set(rows)) == n_max and (np.diff(rows) > 0).all()
        assert matters != "one alone" or (7 in rows and times_R[list(rows).index(7)] == 1)
        mean_R[rows] += times_R.numpy() / n_starts
    np.testing.assert_allclose(mean_R, 1, atol=0.02)
    rows, times_R = likely_sample(matters_R, n, 0.5)
    assert np.array_equal(rows, np.arange(n)) and (times_R == 1).all()


def test_rows_that_matter_make_better_samples(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few hidden units and outputs carry the gradient, as they do in trained models."""
    captured = Captured(tiny("mixtral", **SMALL))
    carries_D = torch.logspace(0, -2, SMALL["hidden"])
    gradient_TD = torch.randn(TOKENS_SL.size, SMALL["hidden"], generator=torch.Generator().manual_seed(0)) * carries_D
    whole = captured.measured(gradient_TD).graded_down_EJ
    monkeypatch.setattr("moe2gguf.measure.MAX_ERROR_ROWS", 8)

    def off() -> float:
        return float(np.log(captured.measured(gradient_TD).graded_down_EJ / whole).std())

    likely = off()
    monkeypatch.setattr("moe2gguf.measure.likely_sample", lambda m_R, *rest: likely_sample(torch.ones_like(m_R), *rest))
    assert likely < off() / 2


def test_types_that_do_not_fit_cost_infinitely_much(tiny: Callable[..., Path]) -> None:
    """64 columns into gate and up, 256 into down: only one of them takes blocks of 256."""
    captured = Captured(tiny("mixtral", hidden=64, intermediate=256))
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        found = Measure((QuantType.Q6_K,), pool).experts(
            captured.block, captured.capture, captured.stats, np.random.default_rng(0), lambda *_: None
        )
    assert np.isinf(found.gate_up_EJ).all() and np.isfinite(found.down_EJ).all()


def test_matrix_errors(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured(tiny("mixtral", **SMALL))
    matrix: MatrixCapture = captured.capture.matrices["self_attn.v_proj"]
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        measured_J = Measure(TYPES, pool).matrix(matrix, np.random.default_rng(0))[0]
        monkeypatch.setattr("moe2gguf.measure.MAX_MATRIX_ROWS", 16)
        sampled_J = Measure(TYPES, pool).matrix(matrix, np.random.default_rng(0))[0]
    weight_NK, x_nK = matrix.module.weight.numpy(), matrix.sample_nK().numpy()
    assert len(x_nK) == TOKENS_SL.size
    for j, quant_type in enumerate(TYPES):
        delta_NK = ggml.round_trip(weight_NK, quant_type, matrix.importance_K()) - weight_NK
        assert measured_J[j] == pytest.approx(np.square(x_nK @ delta_NK.T).sum(1).mean(), rel=1e-4)
    np.testing.assert_allclose(sampled_J, measured_J, rtol=0.3)  # half of 32 rows


def test_embedding_errors_count_as_often_as_tokens_occur() -> None:
    rng = np.random.default_rng(0)
    weight_VD = rng.standard_normal((50, 64), np.float32)
    weight_VD[:5] *= 10
    share_V = np.zeros(50)
    share_V[[2, 30]] = 0.1, 0.9  # all other tokens never occur
    with ThreadPoolExecutor(2) as pool:
        measured_J = Measure(TYPES, pool).embedding(weight_VD, share_V, rng)[0]
    for j, quant_type in enumerate(TYPES):
        sq_V = np.square(ggml.round_trip(weight_VD, quant_type) - weight_VD).sum(1)
        # 1024 draws of a token that has a tenth, and nearly all of the error: 9 % standard deviation, times three
        assert measured_J[j] == pytest.approx(share_V @ sq_V, rel=0.28)


# --- the gradient ---

N_DRAWS = 16


def _draws(folder: Path, captured: Captured, scratch_folder: Path) -> Iterator[CalibrationStats]:
    """Of labels."""
    unknown = MatrixErrors(np.empty((0, 1)), (), np.empty(0))
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for seed in range(N_DRAWS):
            stats = CalibrationStats(
                types=(QuantType.Q8_0,), source_sha256="", n_tokens=TOKENS_SL.size, n_probe_tokens=0, seed=seed,
                    dtype="f32",
                tokens_SL=TOKENS_SL, text="", digest="", request="", layers=dict.fromkeys((0, 1), captured.stats),
                importance={}, errors={f"layers.{i}.{p}": unknown for i in (0, 1) for p in ("gate_up", "down")},
            )  # fmt: skip
            measure = Measure(stats.types, pool)
            yield graded(LayerStream(folder), stats, measure, np.random.default_rng(0), scratch_folder, no_progress)


def test_small_errors_cost_what_the_gradient_says(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL divergence of the whole model, in f64, with one matrix of one expert quantised finely. In the last layer:
    no router after it can choose otherwise."""
    monkeypatch.setattr("moe2gguf.measure.SHRINKAGE_TOKENS", 0)
    folder = tiny("qwen3_moe", **SMALL)
    captured, tokens_SL = Captured(folder), torch.from_numpy(TOKENS_SL)
    found, output_DD = np.zeros((2, captured.block.n_experts)), 0.0
    for draw in _draws(folder, captured, tmp_path):
        output_DD = output_DD + draw.output_moments[1].astype(np.float64) / N_DRAWS
        for p, projection in enumerate(("gate_up", "down")):
            graded_EJ = draw.errors[f"layers.1.{projection}"].graded_EJ
            assert graded_EJ is not None
            found[p] += graded_EJ[:, 0] / N_DRAWS
    model = load_whole(folder).requires_grad_(False).double()
    block = find_experts(model.model.layers[1])
    assert block is not None
    clean_SLV = model(tokens_SL).logits.log_softmax(-1)
    # of the loss's gradient by what the last layer's experts give together, for every label as often as it is drawn
    expected_DD = _output_moments(model, block, tokens_SL)
    assert np.linalg.norm(output_DD - expected_DD) < 0.2 * np.linalg.norm(expected_DD)
    ratios = []
    for p, (get, put, importance_EK) in enumerate(
        (
            (block.gate_up, block.set_gate_up, captured.stats.importance_gate_up_ED),
            (block.down, block.set_down, captured.stats.importance_down_EI),
        )
    ):
        for expert, n in enumerate(captured.stats.n_tokens_E):
            exact = get(expert).clone()
            put(expert, torch.from_numpy(ggml.round_trip(exact.numpy(), QuantType.Q8_0, importance_EK[expert])))
            other_SLV = model(tokens_SL).logits.log_softmax(-1)
            put(expert, exact)
            kl = float((clean_SLV.exp() * (clean_SLV - other_SLV)).sum(-1).mean())
            ratios.append(found[p, expert] * n / (n + 1) / kl)
    assert len(ratios) == 12
    # drawn labels and the independence of rows: each expert within a half, all together within a tenth
    assert np.mean(ratios) == pytest.approx(1, rel=0.1)
    np.testing.assert_allclose(ratios, 1, rtol=0.5)


def _output_moments(model: torch.nn.Module, block: ExpertBlock, tokens_SL: torch.Tensor) -> np.ndarray:
    """Σ over positions and labels, f64 (D, D), over the mean of the diagonal. A label's loss also reaches positions
    before its own; from the last layer's experts it does not."""
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = block.module.register_forward_hook(keep)
    log_TV = model(tokens_SL).logits.log_softmax(-1).flatten(0, 1)
    handle.remove()
    total_DD = 0.0
    for label in range(log_TV.shape[1]):
        (gradient,) = torch.autograd.grad(log_TV[:, label].sum(), outputs, retain_graph=True)
        gradient_TD = gradient.flatten(0, -2)
        total_DD = total_DD + (gradient_TD.T @ (log_TV[:, label].detach().exp()[:, None] * gradient_TD)).numpy()
    return total_DD / total_DD.diagonal().mean()


def test_errors_of_embeddings_cost_what_the_gradient_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """All experts selected: no router can choose otherwise."""
    folder = tiny("qwen3_moe", **SMALL, num_experts_per_tok=6)
    captured, tokens_SL = Captured(folder), torch.from_numpy(TOKENS_SL)
    draws = _draws(folder, captured, tmp_path)
    moments_DD = sum(draw.embedding_moments_2DD.sum(0) for draw in draws) / tokens_SL.numel() / N_DRAWS
    model = load_whole(folder).requires_grad_(False).double()
    clean_SLV = model(tokens_SL).logits.log_softmax(-1)
    weight_VD = model.get_input_embeddings().weight
    error_VD = torch.from_numpy(ggml.round_trip(weight_VD.float().numpy(), QuantType.Q8_0)) - weight_VD
    weight_VD += error_VD
    other_SLV = model(tokens_SL).logits.log_softmax(-1)
    error_nD = error_VD[tokens_SL.flatten()].numpy()
    expected = 0.5 * ((error_nD @ moments_DD) * error_nD).sum(1).mean()
    kl = float((clean_SLV.exp() * (clean_SLV - other_SLV)).sum(-1).mean())
    assert expected == pytest.approx(kl, rel=0.2)


def test_graded_by_calibration_and_read_back(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("deepseek_v2", **SMALL)  # its first layer is dense
    stats = calibrate(
        LayerStream(folder), CalibrationText(TOKENS_SL, "random"), (QuantType.IQ4_NL, QuantType.Q5_0),
        source_sha256="", request="", n_probe_tokens=32, sensitivity="gradient", n_threads=2, seed=0,
        scratch_folder=tmp_path, progress=no_progress,
    )  # fmt: skip
    save_stats(stats, tmp_path / "stats.safetensors")
    back = load_stats(tmp_path / "stats.safetensors")
    experts = {f"layers.{index}.{projection}" for index in (1, 2) for projection in ("gate_up", "down")}
    assert {name for name, errors in stats.errors.items() if errors.graded_EJ is not None} == experts
    for name, errors in stats.errors.items():
        assert np.isfinite(errors.error_EJ).all() and (errors.probe_kl > 0).all()
        if name not in experts:
            continue
        graded_EJ = back.errors[name].graded_EJ
        assert graded_EJ is not None and errors.graded_EJ is not None
        assert (graded_EJ > 0).all() and np.array_equal(graded_EJ, errors.graded_EJ)
        # another probe of the same thing, but for what a router of a later layer chooses
        found = graded_EJ.sum(0)[[stats.types.index(t) for t in errors.probe_types]] / errors.probe_kl
        assert ((found > 0.2) & (found < 3)).all(), (name, found)
    assert stats.embedding_moments_2DD is not None and back.embedding_moments_2DD is not None
    assert np.array_equal(back.embedding_moments_2DD, stats.embedding_moments_2DD)
    assert set(back.output_moments) == {1, 2}
    for index, moments_DD in back.output_moments.items():
        assert np.array_equal(moments_DD, stats.output_moments[index]) and np.array_equal(moments_DD, moments_DD.T)
        assert moments_DD.diagonal().astype(np.float32).mean() == pytest.approx(1, rel=1e-3)
    assert not np.array_equal(back.output_moments[1], back.output_moments[2])


# --- probes ---


@pytest.fixture(scope="module")
def calibrated_small(tiny: Callable[..., Path]) -> tuple[Path, CalibrationStats]:
    # blocks of 32 for the shared expert too
    folder = tiny("qwen2_moe", **SMALL, shared_expert_intermediate_size=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "HARD_QUANTILE", 1.0)  # plain means over tokens
        stats = calibrate(
            LayerStream(folder),
            CalibrationText(TOKENS_SL, "random"),
            (QuantType.IQ4_NL, QuantType.Q5_0),
            source_sha256="",
            request="",
            n_probe_tokens=3 * TOKENS_SL.shape[1],
            n_threads=2,
            seed=0,
            scratch_folder=Path(gettempdir()),
            progress=no_progress,
        )
    return folder, stats


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens",
        "layers.0.self_attn.q_proj",
        "layers.0.gate_up",
        "layers.1.down",
        "layers.1.mlp.shared_expert.down_proj",
        "lm_head",
    ],
)
def test_a_probe_is_the_kl_divergence_of_the_whole_model(
    name: str, calibrated_small: tuple[Path, CalibrationStats]
) -> None:
    folder, stats = calibrated_small
    errors, model = stats.errors[name], load_whole(folder).requires_grad_(False)
    tokens_SL = torch.from_numpy(TOKENS_SL[[0, 2, 5]])  # three of six, spread over the text
    assert stats.n_probe_tokens == tokens_SL.numel()

    def log_probabilities() -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(tokens_SL).logits.double(), -1)

    clean = log_probabilities()
    parts = name.split(".")
    if parts[-1] in ("gate_up", "down"):
        index = int(parts[1])
        weight = getattr(model.model.layers[index].mlp.experts, f"{parts[-1]}_proj")
        layer = stats.layers[index]
        importances = layer.importance_down_EI if parts[-1] == "down" else layer.importance_gate_up_ED
    else:
        module = model.lm_head if name == "lm_head" else model.model.get_submodule(name)
        weight, importances = module.weight[None], [stats.importance.get(name)]
    exact = weight.clone()
    expected_types = (QuantType.IQ4_NL, QuantType.Q5_0) if parts[-1] in ("gate_up", "down") else (QuantType.IQ4_NL,)
    assert errors.probe_types == expected_types
    for quant_type, kl in zip(errors.probe_types, errors.probe_kl, strict=True):
        for expert, importance_K in enumerate(importances):
            coarse = ggml.round_trip(exact[expert].numpy(), quant_type, importance_K)
            weight[expert] = torch.from_numpy(coarse)
        other = log_probabilities()
        weight.copy_(exact)
        wanted = float((clean.exp() * (clean - other)).sum(-1).mean())
        # differences of f32 logarithms near 1e-6, against divergences of 1e-3
        assert kl == pytest.approx(wanted, rel=1e-2, abs=1e-6)
        assert wanted > 1e-5
    assert torch.equal(log_probabilities(), clean)


def test_the_mean_is_over_all_tokens(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences that do not divide into chunks too."""
    monkeypatch.setattr("moe2gguf.backward.LOGITS_CHUNK_TOKENS", 5)
    stream = LayerStream(tiny("qwen2_moe", **SMALL))
    generator = torch.Generator().manual_seed(0)
    clean_SLD, other_SLD = torch.randn(2, 3, 13, stream.embedding_VD.shape[1], generator=generator)
    with torch.inference_mode():
        clean, other = (torch.log_softmax(stream.logits(x_SLD).double(), -1) for x_SLD in (clean_SLD, other_SLD))
        wanted = float((clean.exp() * (clean - other)).sum(-1).mean())
        assert probes.mean_kl(stream, clean_SLD, other_SLD) == pytest.approx(wanted, rel=1e-4)


def test_the_hardest_tokens_count_no_more_than_others() -> None:
    """One token in a hundred minds everything a hundred times as much, one branch most: with it the branches differ
    ten-fold, without it hardly. The mean of all branches is still that over all tokens."""
    rng = torch.Generator().manual_seed(0)
    kl_BT = torch.rand(5, 400, generator=rng, dtype=torch.float64) + 0.5
    kl_BT[:, ::100] *= 100
    kl_BT[2, ::100] *= 10
    weight_T = probes.token_weights(kl_BT)
    assert weight_T[::100].max() < 0.1 * weight_T.max()
    calm_T = torch.arange(400) % 100 != 0
    assert weight_T[calm_T].min() > 0.8 * weight_T.max()
    kl_B, calm_B = kl_BT @ weight_T, kl_BT[:, calm_T].mean(1)
    assert float(kl_BT.mean(1).max() / kl_BT.mean(1).min()) > 5
    torch.testing.assert_close(kl_B / kl_B.mean(), calm_B / calm_B.mean(), rtol=0.1, atol=0)
    torch.testing.assert_close(kl_B.mean(), kl_BT.mean())
    # where none is harder than others it is the mean
    even_BT = torch.arange(1.0, 4)[:, None].expand(3, 50).double()
    torch.testing.assert_close(even_BT @ probes.token_weights(even_BT), torch.arange(1.0, 4).double())


def test_experts_are_probed_alike_on_many_threads(
    tiny: Callable[..., Path], calibrated_small: tuple[Path, CalibrationStats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows in parts, where there are more threads than experts in flight."""
    monkeypatch.setattr(probes, "IN_FLIGHT", 1)
    monkeypatch.setattr(probes, "HARD_QUANTILE", 1.0)
    folder, whole = calibrated_small
    parted = calibrate(
        LayerStream(folder), CalibrationText(TOKENS_SL, "random"), whole.types, source_sha256="", request="",
        n_probe_tokens=3 * TOKENS_SL.shape[1], n_threads=3, seed=0, scratch_folder=Path(gettempdir()),
        progress=no_progress,
    )  # fmt: skip
    for name, errors in whole.errors.items():
        np.testing.assert_allclose(parted.errors[name].probe_kl, errors.probe_kl, rtol=1e-6)


def test_every_matrix_is_probed_and_measured(calibrated_small: tuple[Path, CalibrationStats]) -> None:
    folder, stats = calibrated_small
    linear = {name for name, module in load_whole(folder).model.named_modules() if isinstance(module, torch.nn.Linear)}
    experts = {f"layers.{index}.{projection}" for index in (0, 1) for projection in ("gate_up", "down")}
    assert stats.errors.keys() == linear | experts | {"embed_tokens", "lm_head"}
    for name, errors in stats.errors.items():
        assert errors.error_EJ.shape == (len(stats.layers[0].n_tokens_E) if name in experts else 1, len(stats.types))
        assert np.isfinite(errors.error_EJ).all() and (errors.probe_kl > 0).all(), name
