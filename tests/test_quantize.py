import dataclasses
import json

import gguf
import numpy as np
import pytest

from moe2gguf import ggml
from moe2gguf.costs import cost_table, reorderable
from moe2gguf.fitting import fit_budget
from moe2gguf.ggml import QuantType as Q
from moe2gguf.gguf_file import Target
from moe2gguf.pipeline import write_allocation
from moe2gguf.quantize import (
    FLOAT_FALLBACK,
    ROWS_PER_JOB,
    encode_tensors,
    plan_uniform,
)
from moe2gguf.run import Run
from moe2gguf.settings import Budget, Choice, Quantizer
from moe2gguf.source import SourceTensor, open_source
from moe2gguf.stats import CalibrationStats


def encode_all(plan, n_threads: int = 2) -> dict[str, np.ndarray]:
    return {t.name: blocks for t, blocks in encode_tensors(plan, n_threads, lambda *_: None)}


def importance_of(stats: CalibrationStats, name: str, expert: int) -> np.ndarray:
    layer = stats.layers[int(name.split(".")[1])]
    return (layer.importance_down_EI if "ffn_down" in name else layer.importance_gate_up_ED)[expert]


MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


def matrix_importance(stats: CalibrationStats, name: str) -> np.ndarray | None:
    if name == "output.weight":
        return stats.importance["lm_head"]
    if name == "token_embd.weight":
        return None  # rows are looked up, not multiplied
    return stats.importance[f"layers.{name.split('.')[1]}.{MODULES[name.split('.')[2]]}"]


@pytest.mark.parametrize("layout", ["grouped", "stock"])
def test_file_holds_each_expert_encoded(converted, source, stats, layout, tmp_path):
    """Byte for byte, gguf-py's reading of the file against one encoding per expert, in the order the file states."""
    (path,) = write_allocation(
        source,
        stats,
        converted("qwen3_moe").results[layout].allocation,
        Target(tmp_path / "plain.gguf"),
        Run(tmp_path, 2),
        quantizer=Quantizer(feedback=False),
    )
    reader = gguf.GGUFReader(path)
    orders = {
        layer: reader.fields[key].contents() if (key := f"moe2gguf.expert_order.{layer}") in reader.fields else None
        for layer in range(source.n_layer)
    }
    types = converted("qwen3_moe").results[layout].allocation.types
    seen: dict[str, int] = {}
    for tensor in reader.tensors:
        stem, dot, _ = tensor.name.partition(".g")
        grouped = dot and ".g" in tensor.name and stem.endswith("_exps")
        name = f"{stem}.weight" if grouped else tensor.name
        original = source.tensor(name)
        weight = original.load()
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        order = orders.get(layer) or list(range(source.n_expert))
        quant_type = Q(tensor.tensor_type)
        if "_exps" not in name:
            if "ffn_gate_inp" in name:
                weight = weight[order]
            if quant_type == Q.F32:
                assert np.array_equal(tensor.data, weight), name
            else:
                assert quant_type == types[name]
                assert np.array_equal(tensor.data, ggml.encode(weight, quant_type, matrix_importance(stats, name))), (
                    name
                )
            continue
        for blocks_NB in tensor.data:
            position = seen.get(name, 0)
            seen[name] = position + 1
            expert = order[position]
            projection = name.removeprefix(f"blk.{layer}.ffn_").removesuffix("_exps.weight")
            if layout == "grouped" and projection != "down":
                projection = "gate_up"
            assert types[f"blk.{layer}.expert.{expert}.{projection}"] == quant_type
            expected_NB = ggml.encode(weight[expert], quant_type, importance_of(stats, name, expert))
            assert np.array_equal(blocks_NB, expected_NB), (tensor.name, expert)
    assert len(seen) == 3 * source.n_layer and {*seen.values()} == {source.n_expert}
    reordered = [order for order in orders.values() if order is not None and order != sorted(order)]
    assert bool(reordered) == (layout == "grouped")  # an order was put to the test


def test_biases_follow_their_experts(converted):
    """gpt_oss: biases of router and experts stay whole tensors, their rows in the new order."""
    done = converted("gpt_oss")
    source, reader = open_source(done.folder), gguf.GGUFReader(done.results["grouped"].path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    checked = 0
    for layer in range(source.n_layer):
        key = f"moe2gguf.expert_order.{layer}"
        order = reader.fields[key].contents() if key in reader.fields else list(range(source.n_expert))
        # the router's weights may be calibrated: tests/test_router.py
        for part in ("ffn_gate_inp.bias", "ffn_gate_exps.bias", "ffn_down_exps.bias"):
            name = f"blk.{layer}.{part}"
            assert np.array_equal(tensors[name].data, source.tensor(name).load()[order])
            checked += order != sorted(order)
    assert checked


def test_threads_and_runs_make_the_same_bytes(source, stats):
    table = cost_table(source, stats)
    _, plan = fit_budget(source, stats, table, Budget(bits=3.0), Choice())
    assert plan is not None and plan.is_grouped
    one, four = encode_all(plan, 1), encode_all(plan, 4)
    assert one.keys() == four.keys()
    assert all(np.array_equal(one[name], four[name]) for name in one)


def test_plan_sums_to_the_allocation(source, stats):
    for layout in ("grouped", "stock"):
        table = cost_table(source, stats, layout=layout)
        for max_groups in (1, 2, 4, 7):
            choice = Choice(layout=layout, max_groups=max_groups)
            allocation, plan = fit_budget(source, stats, table, Budget(bits=3.3), choice)
            assert plan is not None and plan.tensor_bytes == allocation.tensor_bytes
            groups: dict[str, list[int]] = {}
            for tensor in plan.tensors:
                if tensor.experts is not None and "_exps" in tensor.name and ".g" in tensor.name.split("_exps")[1]:
                    groups.setdefault(tensor.name.split(".g")[0], []).append(int(tensor.name.split(".")[-2][1:]))
            assert all(found == list(range(len(found))) for found in groups.values())
            assert all(2 <= len(found) <= max_groups for found in groups.values())
            assert plan.is_grouped == bool(groups)
            if max_groups == 1 or layout == "stock":
                assert not groups and not plan.expert_orders


def synthetic(n_rows: int, n_columns: int, *, name: str = "blk.0.attn_q.weight", quantisable: bool = True):
    weight_NK = np.random.default_rng(0).standard_normal((n_rows, n_columns), np.float32)
    return SourceTensor(name, weight_NK.shape, quantisable, weight_NK.copy), weight_NK


def test_long_matrices_are_cut_without_a_trace(source):
    """More rows than one job takes, and not a multiple of it."""
    tensor, weight_NK = synthetic(2 * ROWS_PER_JOB + 77, 32)
    plan = plan_uniform(dataclasses.replace(source, tensors=(tensor,)), Q.Q5_0)
    (blocks_NB,) = encode_all(plan, 3).values()
    assert np.array_equal(blocks_NB, ggml.encode(weight_NK, Q.Q5_0))


def test_uniform_files_fall_back_where_blocks_do_not_fit(source):
    tensors = (
        synthetic(3, 64, name="a.weight")[0],
        synthetic(3, 40, name="b.weight")[0],
        synthetic(3, 64, name="c_norm.weight", quantisable=False)[0],
    )
    plan = plan_uniform(dataclasses.replace(source, tensors=tensors), Q.Q8_0)
    assert [t.quant_type for t in plan.tensors] == [Q.Q8_0, FLOAT_FALLBACK, Q.F32]
    for (tensor, blocks), planned in zip(encode_tensors(plan, 1, lambda *_: None), plan.tensors, strict=True):
        assert blocks.nbytes == planned.n_bytes == tensor.n_bytes


def test_one_tensor_is_read_once_and_let_go(source, stats):
    """All groups of a tensor come from one reading."""
    loads: list[str] = []

    def counted(tensor: SourceTensor) -> SourceTensor:
        def load():
            loads.append(tensor.name)
            return tensor.load()

        return dataclasses.replace(tensor, load=load)

    watched = dataclasses.replace(source, tensors=tuple(counted(t) for t in source.tensors))
    _, plan = fit_budget(watched, stats, cost_table(watched, stats), Budget(bits=3.0), Choice())
    assert plan is not None and len(plan.tensors) > len(source.tensors)
    encode_all(plan)
    assert loads == [tensor.name for tensor in source.tensors]


def test_progress_names_each_tensor(source):
    seen = []
    plan = plan_uniform(source, Q.F32)
    for _ in encode_tensors(plan, 1, lambda name, done, total: seen.append((name, done, total))):
        pass
    assert seen == [(t.name, i, len(source.tensors)) for i, t in enumerate(source.tensors)]


def test_routers_with_groups_keep_the_order(converted, source):
    """deepseek_v3 chooses among groups of neighbouring experts first: nothing may move."""
    done = converted("deepseek_v3")
    grouped_router = open_source(done.folder)
    assert not reorderable(grouped_router) and reorderable(source)
    assert not reorderable(dataclasses.replace(source, tensors=(synthetic(4, 4, name="blk.0.ffn_tid2eid.weight")[0],)))
    reader = gguf.GGUFReader(done.results["grouped"].path)
    assert not [key for key in reader.fields if key.startswith("moe2gguf.expert_order")]
    assert not [tensor.name for tensor in reader.tensors if ".g0." in tensor.name]
    assert reader.fields["moe2gguf.layout"].contents() == "stock"
    assert json.loads(reader.fields["moe2gguf.recipe"].contents())["layout"] == "grouped"  # as asked


def test_plan_of_one_type_keeps_the_checkpoints_order(source, stats):
    """At the top of the range all experts have the same type: no groups, no order, plain names."""
    table = cost_table(source, stats, types=(Q.Q8_0,))
    _, plan = fit_budget(source, stats, table, Budget(bits=8.55), Choice())
    assert plan is not None and not plan.is_grouped and not plan.expert_orders
    assert [t.name for t in plan.tensors] == [t.name for t in source.tensors]
    assert all(t.experts is None for t in plan.tensors)
