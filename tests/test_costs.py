import dataclasses
from math import prod

import gguf
import numpy as np
import pytest

from moe2gguf import ggml
from moe2gguf.allocate import allocate
from moe2gguf.costs import (
    CANDIDATES,
    ROLE_FLOORS_BPW,
    _costs_EJ,
    _role,
    cost_table,
    reorderable,
    source_digest,
)
from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType as Q
from moe2gguf.pipeline import calibrated, convert
from moe2gguf.quantize import plan_file
from moe2gguf.run import Run
from moe2gguf.settings import Quantizer
from moe2gguf.source import Source, open_source
from moe2gguf.stats import MatrixErrors, load_stats
from tests.conftest import cheap_measurements
from tests.tiny_configs import MODEL_TYPES


def assert_covers(table, source: Source) -> None:
    """Every parameter in exactly one unit or fixed tensor: counted element by element for expert tensors."""
    seen = {tensor.name: np.zeros(tensor.shape[0], int) for tensor in source.tensors}
    for unit in table.units:
        shapes = [source.tensor(name).shape for name in unit.tensors]
        for name, shape in zip(unit.tensors, shapes, strict=True):
            assert shape[-1] == unit.n_columns
            seen[name][slice(None) if unit.expert is None else unit.expert] += 1
        rows = sum(prod(s[:-1]) if unit.expert is None else prod(s[1:-1]) for s in shapes)
        assert unit.n_rows == rows
    for name in table.fixed:
        seen[name] += 1
    assert all((count == 1).all() for count in seen.values())
    fixed = sum(prod(source.tensor(name).shape) for name in table.fixed)
    assert sum(u.n_rows * u.n_columns for u in table.units) + fixed == source.n_params == table.n_params
    assert len({unit.name for unit in table.units}) == len(table.units)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_units_cover_the_model_once(tiny, model_type):
    source = open_source(tiny(model_type))
    table = cost_table(source, None)
    assert_covers(table, source)
    # the same shapes of experts everywhere: 2 layers of them; gate and up are one unit where experts may change places
    n_projections = 2 if reorderable(source) else 3
    assert sum(unit.expert is not None for unit in table.units) == 2 * n_projections * source.n_expert
    assert {unit.role for unit in table.units} <= ROLE_FLOORS_BPW.keys()
    routers = [name for name in table.fixed if "ffn_gate_inp" in name]
    assert len(routers) >= 2 and {table.fixed[name] for name in routers} == {Q.F32}


def test_units_with_statistics_cover_the_model_once(source, stats):
    table = cost_table(source, stats)
    assert_covers(table, source)
    assert {*table.fixed.values()} == {Q.F32}  # norms and routers: all else was measured
    assert table.cost_UJ.shape == table.bytes_UJ.shape == (len(table.units), len(CANDIDATES))


def test_the_stock_layout_keeps_gate_and_up_apart(source, stats):
    """Their costs are the shares of the joint one, and no share is all of it."""
    joint, apart = cost_table(source, stats), cost_table(source, stats, layout="stock")
    assert_covers(apart, source)
    cost_of = {unit.name: cost_J for unit, cost_J in zip(apart.units, apart.cost_UJ, strict=True)}
    for unit, cost_J in zip(joint.units, joint.cost_UJ, strict=True):
        if unit.projection == "gate_up":
            parts_PJ = np.array([cost_of[unit.name.replace("gate_up", p)] for p in ("gate", "up")])
            fits = np.isfinite(cost_J)
            np.testing.assert_allclose(parts_PJ.sum(0)[fits], cost_J[fits], rtol=1e-12)
            assert (parts_PJ[:, fits] > 0.1 * cost_J[fits]).all()
        else:
            np.testing.assert_array_equal(cost_of[unit.name], cost_J)


def test_fused_gate_up_stays_one_unit(tiny):
    """One tensor in the file has one type, also in the stock layout."""
    fused = open_source(tiny("gpt_oss"))
    names = {tensor.name for tensor in fused.tensors if "_exps.weight" in tensor.name}
    projections = {unit.projection for unit in cost_table(fused, None, layout="stock").units} - {None}
    assert projections == {name.split("ffn_")[1].removesuffix("_exps.weight") for name in names}


def test_what_no_probe_reached_is_kept_nearly_exact(converted):
    """The halves of deepseek's split kv_b have no module of their own in transformers."""
    done = converted("deepseek_v2")
    source = open_source(done.folder)
    table = cost_table(source, load_stats(done.work / "stats.safetensors"))
    assert_covers(table, source)
    kept = {name: t for name, t in table.fixed.items() if t != Q.F32}
    assert {name.split(".")[2] for name in kept} == {"attn_k_b", "attn_v_b"}
    assert {*kept.values()} <= {Q.Q8_0, Q.BF16}


def test_bytes_are_those_in_the_file(converted, source, stats):
    for layout, result in converted("qwen3_moe").results.items():
        table, allocation = cost_table(source, stats, layout=layout), result.allocation
        of_units = sum(
            table.bytes_UJ[u, CANDIDATES.index(allocation.types[unit.name])] for u, unit in enumerate(table.units)
        )
        tensors = gguf.GGUFReader(result.path).tensors
        assert of_units + table.fixed_bytes == allocation.tensor_bytes == sum(int(t.n_bytes) for t in tensors)
        assert sum(int(t.n_elements) for t in tensors) == table.n_params


def test_a_tied_embedding_is_quantised_as_the_head(tiny, small_calibration, tmp_path):
    """Under the importance of what the head is given."""
    source = open_source(tiny("granitemoe", tie_word_embeddings=True))
    assert not any(tensor.name == "output.weight" for tensor in source.tensors)
    with cheap_measurements():
        stats = calibrated(source, small_calibration, Run(tmp_path, 2))
    unit = next(unit for unit in cost_table(source, stats).units if unit.name == "token_embd.weight")
    assert unit.importance == "lm_head" and unit.role == "output"
    plan = plan_file(source, cost_table(source, stats), allocate(cost_table(source, stats), 2_500_000), stats)
    tensor = next(tensor for tensor in plan.tensors if tensor.name == "token_embd.weight")
    np.testing.assert_array_equal(tensor.importance_EK[0], stats.importance["lm_head"])


def test_other_models_statistics_are_refused(tiny, source, stats):
    for other in (open_source(tiny("qwen3_moe", n_experts=4)), open_source(tiny("olmoe"))):
        with pytest.raises(Moe2ggufError, match=r"made on another model .*calibrate again"):
            cost_table(other, stats)
        assert source_digest(other) != source_digest(source)


def test_tied_embeddings_cost_twice(tiny, stats):
    """The one matrix is looked up and multiplied with; both errors count."""
    tied = open_source(tiny("qwen3_moe", tie_word_embeddings=True))
    assert "output.weight" not in {tensor.name for tensor in tied.tensors}
    table = cost_table(tied, dataclasses.replace(stats, source_sha256=source_digest(tied)))
    u = [unit.name for unit in table.units].index("token_embd.weight")
    lookup, product = (_costs_EJ(stats.errors[name], stats.types)[0] for name in ("embed_tokens", "lm_head"))
    allowed = np.isfinite(table.cost_UJ[u])
    np.testing.assert_allclose(table.cost_UJ[u, allowed], (lookup + product)[allowed], rtol=1e-12)
    assert_covers(table, tied)


def test_untied_embeddings_cost_once(source, stats):
    table = cost_table(source, stats)
    for name, module in (("token_embd.weight", "embed_tokens"), ("output.weight", "lm_head")):
        u = [unit.name for unit in table.units].index(name)
        allowed = np.isfinite(table.cost_UJ[u])
        np.testing.assert_allclose(
            table.cost_UJ[u, allowed], _costs_EJ(stats.errors[module], stats.types)[0][allowed], rtol=1e-12
        )


def test_each_unit_has_its_own_errors(source, stats):
    """Not its neighbour's: every expert's cost against its error, and each matrix's against its own module's."""
    table = cost_table(source, stats)
    modules = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    for u, unit in enumerate(table.units):
        if unit.expert is not None:
            errors, row = stats.errors[f"layers.{unit.layer}.{unit.projection}"], unit.expert
        elif unit.layer is not None:
            module = modules[unit.name.split(".")[2]]
            errors, row = stats.errors[f"layers.{unit.layer}.self_attn.{module}"], 0
            assert unit.importance == f"layers.{unit.layer}.self_attn.{module}"
        else:
            continue
        allowed = np.isfinite(table.cost_UJ[u])
        expected = _costs_EJ(errors, stats.types)[row]
        np.testing.assert_allclose(table.cost_UJ[u, allowed], expected[allowed], rtol=1e-12)


def errors_of(total_J, probes: dict[Q, float], n_experts: int = 4) -> MatrixErrors:
    share_E = np.arange(1, n_experts + 1) / np.arange(1, n_experts + 1).sum()
    return MatrixErrors(share_E[:, None] * np.asarray(total_J), tuple(probes), np.array([*probes.values()]))


def test_costs_at_the_probes_are_the_probes():
    """All experts of a projection at a probe's type cost together just what the probe found."""
    total_J = 2.0 ** -np.arange(len(CANDIDATES))
    probes = {Q.IQ2_XXS: 0.3, Q.IQ3_XXS: 0.04}
    cost_EJ = _costs_EJ(errors_of(total_J, probes), CANDIDATES)
    for quant_type, kl in probes.items():
        assert cost_EJ[:, CANDIDATES.index(quant_type)].sum() == pytest.approx(kl, rel=1e-12)
    # an expert's part is its part of the error
    np.testing.assert_allclose(cost_EJ[3] / cost_EJ[0], 4, rtol=1e-12)


def test_the_gradient_divides_what_the_probes_found():
    """All experts together at a probe's type cost what it found, each its part by the gradient."""
    total_J = 2.0 ** -np.arange(len(CANDIDATES))
    probes = {Q.IQ2_XXS: 0.3, Q.IQ3_XXS: 0.04}
    by_error = errors_of(total_J, probes)
    by_gradient = dataclasses.replace(by_error, graded_EJ=7 * by_error.error_EJ[::-1])
    cost_EJ = _costs_EJ(by_gradient, CANDIDATES)
    np.testing.assert_allclose(cost_EJ, _costs_EJ(by_error, CANDIDATES)[::-1], rtol=1e-9)
    assert cost_EJ[:, CANDIDATES.index(Q.IQ2_XXS)].sum() == pytest.approx(0.3, rel=1e-12)


def test_costs_between_and_beyond_the_probes():
    """Log-log straight between two probes, in proportion to the error beyond them: by hand."""
    total_J = np.geomspace(8.0, 0.01, len(CANDIDATES))
    low, high = CANDIDATES.index(Q.IQ3_XXS), CANDIDATES.index(Q.IQ2_XXS)
    kl = {Q.IQ2_XXS: 0.5, Q.IQ3_XXS: 0.02}
    cost_J = _costs_EJ(errors_of(total_J, kl), CANDIDATES).sum(0)
    slope = np.log(0.5 / 0.02) / np.log(total_J[high] / total_J[low])
    for j, error in enumerate(total_J):
        if j < high:
            expected = 0.5 * error / total_J[high]
        elif j > low:
            expected = 0.02 * error / total_J[low]
        else:
            expected = 0.02 * (error / total_J[low]) ** slope
        assert cost_J[j] == pytest.approx(expected, rel=1e-9)
    assert (np.diff(cost_J) < 0).all()  # a smaller error never costs more


@pytest.mark.parametrize(("power", "kept"), [(0.8, 0.8), (0.2, 0.5), (1.3, 1.0)])
def test_small_errors_follow_the_trend_of_the_probes(power, kept):
    """KL as a power of the error: below the finest probe that power goes on, between the root and proportion."""
    total_J = np.geomspace(8.0, 0.01, len(CANDIDATES))
    low, high = CANDIDATES.index(Q.IQ3_XXS), CANDIDATES.index(Q.IQ2_XXS)
    kl = {Q.IQ2_XXS: 0.5, Q.IQ3_XXS: 0.5 * (total_J[low] / total_J[high]) ** power}
    cost_J = _costs_EJ(errors_of(total_J, kl), CANDIDATES).sum(0)
    np.testing.assert_allclose(cost_J[low:] / cost_J[low], (total_J[low:] / total_J[low]) ** kept, rtol=1e-9)
    np.testing.assert_allclose(cost_J[:high] / cost_J[high], total_J[:high] / total_J[high], rtol=1e-9)


@pytest.mark.parametrize(
    "probes",
    [
        {Q.IQ3_XXS: 0.02},  # one probe: one sensitivity for all
        {Q.IQ3_XXS: 0.02, Q.IQ2_XXS: 0.5},  # listed from the small error to the large
        {Q.IQ2_XXS: 0.0, Q.IQ3_XXS: -1e-12},  # a matrix that does not matter: rounding below zero
        {Q.IQ2_XXS: 0.01, Q.IQ3_XXS: 0.01},  # the KL saturates
    ],
)
def test_costs_stay_positive_and_monotone(probes):
    total_J = np.geomspace(8.0, 0.01, len(CANDIDATES))
    cost_J = _costs_EJ(errors_of(total_J, probes), CANDIDATES).sum(0)
    assert (cost_J > 0).all() and np.isfinite(cost_J).all()
    assert (np.diff(cost_J) <= 1e-15).all()


def test_types_that_do_not_fit_stay_out():
    total_J = np.geomspace(8.0, 0.01, len(CANDIDATES))
    total_J[:12] = np.inf  # columns that only fit blocks of 32
    cost_EJ = _costs_EJ(errors_of(total_J, {Q.IQ4_NL: 0.02}), CANDIDATES)
    assert np.isinf(cost_EJ[:, :12]).all() and np.isfinite(cost_EJ[:, 12:]).all()


def test_a_perfect_matrix_costs_nothing():
    """A matrix of zeros has no error at any type; 0/0 must not become NaN."""
    cost_EJ = _costs_EJ(errors_of(np.zeros(len(CANDIDATES)), {Q.IQ3_XXS: 0.0}), CANDIDATES)
    assert (cost_EJ == 0).all()


def allowed_types(table, name: str) -> set[Q]:
    u = [unit.name for unit in table.units].index(name)
    return {t for t, cost in zip(table.types, table.cost_UJ[u], strict=True) if np.isfinite(cost)}


def test_floors_by_role(source, stats):
    table = cost_table(source, stats)
    for unit in table.units:
        floor = ROLE_FLOORS_BPW[unit.role]
        fits = {t for t in CANDIDATES if ggml.fits(t, unit.n_columns)}
        assert allowed_types(table, unit.name) == {t for t in fits if ggml.bits_per_weight(t) >= floor}
    assert Q.IQ1_M in allowed_types(table, "blk.0.expert.0.down")
    assert Q.IQ2_S in allowed_types(table, "token_embd.weight")
    assert Q.IQ2_S not in allowed_types(table, "output.weight")


def test_roles():
    assert {
        name: _role(name)
        for name in (
            "token_embd.weight",
            "output.weight",
            "blk.0.attn_q.weight",
            "blk.1.attn_output.weight",
            "blk.1.ffn_down_shexp.weight",
            "blk.0.ffn_gate.weight",
            "blk.0.attn_kv_a_mqa.weight",
        )
    } == {
        "token_embd.weight": "embedding",
        "output.weight": "output",
        "blk.0.attn_q.weight": "attention",
        "blk.1.attn_output.weight": "attention",
        "blk.1.ffn_down_shexp.weight": "shared",
        "blk.0.ffn_gate.weight": "dense",
        "blk.0.attn_kv_a_mqa.weight": "attention",
    }


def test_types_narrow_the_choice(source, stats):
    # attention's output has 128 columns here, so that only Q8_0 of these fits it, whichever comes first
    for types in ((Q.Q4_K, Q.Q8_0), (Q.Q8_0, Q.Q4_K)):
        table = cost_table(source, stats, types=types)
        assert allowed_types(table, "blk.0.expert.1.down") == {Q.Q4_K, Q.Q8_0}
        assert allowed_types(table, "blk.0.attn_output.weight") == {Q.Q8_0}
    # none fits: the others are what is left
    table = cost_table(source, stats, types=(Q.Q4_K,))
    assert allowed_types(table, "blk.0.attn_output.weight") == {Q.IQ4_NL, Q.Q5_0, Q.Q5_1, Q.Q8_0}
    assert "blk.0.attn_output.weight" in table.small_block_units


def test_types_below_every_floor(source, stats):
    with pytest.raises(Moe2ggufError, match=r"none of IQ1_M is possible for .*allow another type"):
        cost_table(source, stats, types=(Q.IQ1_M,))


def test_overrides_pin(source, stats):
    overrides = ((r"blk\.0\.ffn_down_exps", Q.IQ3_S), (r"attn_q", Q.Q6_K), (r"blk\.1\.attn_q", Q.Q4_K))
    table = cost_table(source, stats, types=(Q.Q2_K, Q.IQ3_S, Q.Q6_K, Q.Q8_0), overrides=overrides)
    for e in range(source.n_expert):
        assert allowed_types(table, f"blk.0.expert.{e}.down") == {Q.IQ3_S}
        assert allowed_types(table, f"blk.1.expert.{e}.down") == {Q.Q2_K, Q.IQ3_S, Q.Q6_K, Q.Q8_0}
    # the first pattern that matches wins
    assert allowed_types(table, "blk.1.attn_q.weight") == {Q.Q6_K}
    # a pin is the user's word, and goes below the floor
    table = cost_table(source, stats, overrides=((r"^output\.weight$", Q.IQ2_XXS),))
    assert allowed_types(table, "output.weight") == {Q.IQ2_XXS}


def test_a_pin_that_does_not_fit(source, stats):
    with pytest.raises(Moe2ggufError, match=r"none of Q4_K is possible for blk\.0\.attn_output\.weight.*128 columns"):
        cost_table(source, stats, overrides=((r"attn_output", Q.Q4_K),))


@pytest.mark.parametrize("pattern", ["attn_norm", "no such name", r"ffn_gate_inp"])
def test_a_pin_without_effect(source, stats, pattern):
    """Matches nothing, or only tensors that stay in F32."""
    with pytest.raises(Moe2ggufError, match="no matrix whose type can be chosen"):
        cost_table(source, stats, overrides=((pattern, Q.Q4_K),))


def test_a_type_without_measurements(source, stats):
    for changes in ({"types": (Q.Q4_0,)}, {"overrides": (("attn_q", Q.TQ1_0),)}):
        with pytest.raises(Moe2ggufError, match=r"no measurements of (Q4_0|TQ1_0); the candidates are IQ1_M, "):
            cost_table(source, stats, **changes)


def test_without_statistics_the_bytes_are_the_same(source, stats):
    """The provisional table is what the early check of the budget rests on."""
    rough, measured = cost_table(source, None), cost_table(source, stats)
    assert [u.name for u in rough.units] == [u.name for u in measured.units]
    assert np.array_equal(rough.bytes_UJ, measured.bytes_UJ)
    assert np.array_equal(np.isfinite(rough.cost_UJ), np.isfinite(measured.cost_UJ))
    assert rough.fixed == measured.fixed and rough.fixed_bytes == measured.fixed_bytes


def test_experts_that_are_mxfp4_lose_nothing_as_such(tiny, small_calibration, tmp_path):
    """gpt-oss's: all are what the checkpoint has where there is room, with less some are coarser."""
    source = open_source(tiny("gpt_oss", stored="mxfp4"))
    natives = {tensor.name for tensor in source.tensors if tensor.native_type is not None}
    assert natives == {tensor.name for tensor in source.tensors if "_exps.weight" in tensor.name}
    for bits, all_of_them in ((5.5, True), (4.4, False)):
        with cheap_measurements():
            result = convert(
                source.path, tmp_path / f"{bits}.gguf", bits=bits, layout="stock", calibration=small_calibration,
                quantizer=Quantizer(router="none", tuning=False), work_folder=tmp_path / "work",
            )  # fmt: skip
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(result.path).tensors}
        kept = {name for name in natives if Q(tensors[name].tensor_type) == Q.MXFP4}
        assert kept == natives if all_of_them else 0 < len(kept) < len(natives)
        for name in kept:
            values = gguf.dequantize(np.asarray(tensors[name].data), Q.MXFP4)
            # but for experts that are fitted to what those before them give, where that errs less
            assert (values == source.tensor(name).load()).mean() > 0.98
    other = open_source(tiny("gpt_oss"))
    assert Q.MXFP4 not in cost_table(other, None).types
