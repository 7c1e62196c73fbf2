import dataclasses
import io

import gguf
import numpy as np
import pytest
from rich.console import Console

from moe2gguf.errors import FileFormatError, RuntimeMissing
from moe2gguf.ggml import encode
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.source import KeyValue, Source, SourceTensor
from moe2gguf.verify import GAUSSIAN_ERROR, _misplaced_rows, error_limit, render_verification, verify_file
from tests.gguf_files import (
    HIDDEN,
    MIXED,
    N_EXPERTS,
    N_LAYERS,
    Q,
    random_orders,
    random_weights,
    write_moe,
)

UINT32, STRING, FLOAT32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32


def source_of(weights, tmp_path) -> Source:
    return Source(
        path=tmp_path,
        hparams={},
        arch="qwen3moe",
        name="Random MoE",
        n_layer=N_LAYERS,
        n_expert=N_EXPERTS,
        n_expert_used=2,
        n_expert_groups=1,
        tensors=tuple(
            SourceTensor(name, weight.shape, weight.ndim > 1, load=lambda weight=weight: weight.copy())
            for name, weight in weights.items()
        ),
        kv=(
            KeyValue("general.architecture", "qwen3moe", STRING, None),
            KeyValue("general.name", "Random MoE", STRING, None),
            KeyValue("qwen3moe.expert_count", N_EXPERTS, UINT32, None),
        ),
        metadata=gguf.Metadata(),
    )


def problems_of(tmp_path, weights=None, **changes) -> tuple[str, ...]:
    """What verify says of a grouped, reordered file written with `changes`."""
    arguments = {"expert_types": MIXED, "orders": random_orders()} | changes
    path = write_moe(tmp_path / "file.gguf", weights or random_weights(), **arguments)
    return verify_file(path, source_of(random_weights(), tmp_path)).problems


def test_a_sound_file(tmp_path):
    path = write_moe(tmp_path / "file.gguf", random_weights(), expert_types=MIXED, orders=random_orders())
    seen = []
    report = verify_file(
        path,
        source_of(random_weights(), tmp_path),
        progress=lambda done, n, name: seen.append((done, n, name)),
    )
    assert report.ok and report.problems == ()
    n_tensors = len(random_weights())
    assert seen[0] == (0, n_tensors, "token_embd.weight") and seen[-1] == (n_tensors, n_tensors, "")
    # every matrix once: experts by number, each in the group its type says
    experts = [c for c in report.checks if c.expert is not None]
    assert len(experts) == N_LAYERS * 3 * N_EXPERTS
    assert len(report.checks) - len(experts) == n_tensors - N_LAYERS * 3
    order = random_orders()[1]
    assert {c.expert: c.type for c in experts if c.name.startswith("blk.1.ffn_up")} == dict(
        zip(order, MIXED, strict=True)
    )
    assert all(c.relative_error == 0 for c in report.checks if c.type == Q.F32)
    out = io.StringIO()
    Console(file=out, width=150).print(render_verification(report))
    assert "all 20 tensors match" in out.getvalue() and "Q5_0" in out.getvalue()


def test_a_stock_file_and_shards(tmp_path):
    source = source_of(random_weights(), tmp_path)
    assert verify_file(write_moe(tmp_path / "stock.gguf", random_weights()), source).ok
    write_moe(tmp_path / "s.gguf", random_weights(), expert_types=MIXED, orders=random_orders(), split_max_tensors=7)
    assert verify_file(min(tmp_path.glob("s-*.gguf")), source).ok


def swapped(order: np.ndarray) -> np.ndarray:
    order = order.copy()
    order[[0, 3]] = order[[3, 0]]
    return order


def test_a_wrong_order_names_the_expert(tmp_path):
    stated = random_orders() | {1: swapped(random_orders()[1])}
    problems = problems_of(tmp_path, stated_orders=stated)
    a, b = random_orders()[1][[0, 3]]
    for projection in ("gate", "up", "down"):
        assert (
            f"blk.1.ffn_{projection}_exps.g0.weight, expert {b} of the checkpoint, "
            f"holds expert {a}'s weights instead; the expert order is wrong"
        ) in problems
    # the router has rows in the file's real order too, and is exact
    assert any(p.startswith("blk.1.ffn_gate_inp.weight is off by") for p in problems)
    assert all(p.startswith("blk.1.") for p in problems)
    assert len(problems) == 3 * 2 + 1


def test_a_wrong_order_in_the_router_alone(tmp_path):
    weights = random_weights()
    weights["blk.2.ffn_gate_inp.weight"] = weights["blk.2.ffn_gate_inp.weight"][[0, 1, 2, 3, 5, 4]]
    (problem,) = problems_of(tmp_path, weights)
    assert problem.startswith("blk.2.ffn_gate_inp.weight is off by") and problem.endswith("F32 must be exact")


def test_two_rows_of_a_fitted_router_in_each_others_place(tmp_path):
    """Alike as they are, that is little of the router's error, which being fitted it may have."""
    weights, rng = random_weights(), np.random.default_rng(0)
    router_ED = weights["blk.2.ffn_gate_inp.weight"]
    router_ED[4] = router_ED[5] + 0.3 * rng.standard_normal(router_ED.shape[1]).astype(np.float32)
    source = source_of(weights, tmp_path)
    extra_kv = {"moe2gguf.router_calibrated": [False, False, True]}
    for order, n_problems in (([0, 1, 2, 3, 4, 5], 0), ([0, 1, 2, 3, 5, 4], 2)):
        fitted_ED = (router_ED * 1.02)[order] + 0.01 * rng.standard_normal(router_ED.shape).astype(np.float32)
        in_file = weights | {"blk.2.ffn_gate_inp.weight": fitted_ED.astype(np.float32)}
        problems = verify_file(write_moe(tmp_path / "file.gguf", in_file, extra_kv=extra_kv), source).problems
        assert len(problems) == n_problems and all("of the checkpoint's in the place of row" in p for p in problems)


def test_rows_that_are_exact_are_in_their_place():
    """Their squared distances are sums that cancel, to a little below nothing."""
    for seed in range(20):
        weight_EK = np.random.default_rng(seed).standard_normal((16, 512)).astype(np.float32)
        assert _misplaced_rows(weight_EK, weight_EK.copy()) == []


def test_one_projection_in_another_order(tmp_path):
    weights = random_weights()
    weights["blk.0.ffn_down_exps.weight"] = weights["blk.0.ffn_down_exps.weight"][[1, 0, 2, 3, 4, 5]]
    problems = problems_of(tmp_path, weights)
    assert len(problems) == 2 and all("blk.0.ffn_down_exps." in p and "order is wrong" in p for p in problems)


def test_nearly_equal_experts_are_no_wrong_order(tmp_path):
    """Experts upcycled from one dense matrix: the encoder's error is far larger than their difference."""
    weights = random_weights()
    for name, weight in weights.items():
        if "_exps" in name:
            weights[name] = (weight[:1] + 1e-4 * weight).astype(np.float32)
    path = write_moe(tmp_path / "file.gguf", weights, expert_types=(Q.Q4_0,) * N_EXPERTS)
    assert verify_file(path, source_of(weights, tmp_path)).ok


def test_no_permutation(tmp_path):
    stated = random_orders() | {0: np.array([0, 1, 2, 3, 4, 4])}
    assert "moe2gguf.expert_order.0 is no permutation of the 6 experts: [0, 1, 2, 3, 4, 4]" in problems_of(
        tmp_path, stated_orders=stated
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"leave_out": ["output.weight"]}, "output.weight is missing"),
        ({"rename": {"output.weight": "out.weight"}}, "out.weight is in the file and not in the checkpoint"),
        (
            {"leave_out": ["blk.1.ffn_up_exps.g1.weight"]},
            "blk.1.ffn_up_exps.weight has groups g0, g2; they must be g0 … at most g6, without a gap",
        ),
        (
            {"leave_out": ["blk.1.ffn_up_exps.g2.weight"]},
            "the groups of blk.1.ffn_up_exps.weight hold 3 experts, the checkpoint has 6",
        ),
        (
            {"rename": {"blk.1.ffn_up_exps.g2.weight": "blk.1.ffn_up_exps.weight"}},
            "blk.1.ffn_up_exps.weight is in the file both whole and in groups",
        ),
        (
            {"rename": {f"blk.0.ffn_{p}_exps.g0.weight": f"blk.0.ffn_{p}_exps.g0.bias" for p in ("gate", "up")}},
            "blk.0.ffn_gate_exps.weight has groups g1, g2; they must be g0 … at most g6, without a gap",
        ),
    ],
)
def test_names_that_do_not_match(tmp_path, changes, problem):
    assert problem in problems_of(tmp_path, **changes)


def test_a_wrong_shape(tmp_path):
    weights = random_weights()
    weights["blk.0.attn_q.weight"] = weights["blk.0.attn_q.weight"][:32]
    assert problems_of(tmp_path, weights) == (
        f"blk.0.attn_q.weight has shape (32, {HIDDEN}), the checkpoint's has ({HIDDEN}, {HIDDEN})",
    )


def test_key_values(tmp_path):
    path = write_moe(tmp_path / "file.gguf", random_weights())
    source = source_of(random_weights(), tmp_path)
    kv = (
        *source.kv[:2],
        KeyValue("qwen3moe.expert_count", 8, UINT32, None),
        KeyValue("qwen3moe.rope.freq_base", 1e4, FLOAT32, None),
    )
    assert verify_file(path, dataclasses.replace(source, kv=kv)).problems == (
        "key qwen3moe.expert_count has another value than the converter gives it",
        "key qwen3moe.rope.freq_base is missing",
    )
    other = dataclasses.replace(source, arch="mixtral")
    assert "general.architecture is 'qwen3moe', the checkpoint's is 'mixtral'" in verify_file(path, other).problems


def corrupt(path, name: str, offset: int, data: bytes) -> None:
    tensor = next(t for t in read_gguf(path).tensors if t.name == name)
    with open(path, "r+b") as file:
        file.seek(tensor.offset + offset)
        file.write(data)


def test_damaged_blocks(tmp_path):
    path = write_moe(tmp_path / "file.gguf", random_weights(), expert_types=MIXED, orders=random_orders())
    expert_bytes = HIDDEN * HIDDEN // 32 * 18  # Q4_0
    # position 1 of group 0: its first scale becomes NaN
    corrupt(path, "blk.0.ffn_up_exps.g0.weight", expert_bytes, np.float16(np.nan).tobytes())
    corrupt(path, "output.weight", 0, bytes(1000))  # a third of the tensor is lost
    corrupt(path, "blk.2.attn_norm.weight", 4, np.float32(1.5).tobytes())
    source = source_of(random_weights(), tmp_path)
    report = verify_file(path, source)
    expert = random_orders()[0][1]
    assert len(report.problems) == 3 and not report.ok
    assert report.problems[0].startswith("output.weight is off by 0.")
    assert report.problems[0].endswith("(relative RMS error), Q8_0 has at most 0.016")
    assert f"blk.0.ffn_up_exps.g0.weight, expert {expert} of the checkpoint, decodes to values" in report.problems[1]
    assert report.problems[2].startswith("blk.2.attn_norm.weight is off by")
    out = io.StringIO()
    Console(file=out, width=150).print(render_verification(report))
    assert "3 problems" in out.getvalue()


def test_no_tensor_data_at_all(tmp_path):
    path = write_moe(tmp_path / "file.gguf", random_weights())
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(FileFormatError, match="truncated"):
        verify_file(path, source_of(random_weights(), tmp_path))


def test_limits_separate_sound_from_wrong():
    for quant_type in GAUSSIAN_ERROR:
        # below what zeros (1) and another expert's weights (√2) give, above the encoder's own error
        assert GAUSSIAN_ERROR[quant_type] < error_limit(quant_type) < 1
    assert error_limit(Q.F32) == 0 and error_limit(Q.Q8_K) is None


@pytest.mark.parametrize("quant_type", GAUSSIAN_ERROR, ids=lambda t: t.name)
def test_gaussian_errors_are_the_encoders(quant_type):
    weight_RK = np.random.default_rng(0).standard_normal((16, 512), np.float32)
    try:
        blocks_RB = encode(weight_RK, quant_type)
    except RuntimeMissing as error:
        pytest.skip(str(error))
    difference = gguf.quants.dequantize(blocks_RB, quant_type) - weight_RK
    error = float(np.sqrt(np.square(difference).mean() / np.square(weight_RK).mean()))
    assert error == pytest.approx(GAUSSIAN_ERROR[quant_type], rel=0.05)  # another sample of weights, four digits
