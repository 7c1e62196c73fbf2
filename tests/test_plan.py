import io

import pytest
from rich.console import Console

from moe2gguf.errors import BudgetError
from moe2gguf.ggml import QuantType as Q
from moe2gguf.pipeline import Budget, Calibration, Choice
from moe2gguf.plan import _duration, make_plan, render_plan
from moe2gguf.source import open_source


def rendered(plan) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(render_plan(plan))
    return out.getvalue()


def planned(folder, tmp_path, **changes):
    arguments = {
        "budget": Budget(bits=3.6),
        "choice": Choice(),
        "calibration": Calibration(),
        "work_folder": tmp_path / "work",
    } | changes
    return make_plan(
        str(folder),
        None,
        arguments.pop("budget"),
        arguments.pop("choice"),
        arguments.pop("calibration"),
        pre_tokenizer=None,
        **arguments,
    )


def test_before_calibration(tiny, tmp_path):
    folder = tiny("qwen3_moe")
    plan = planned(folder, tmp_path)
    source = open_source(folder)
    assert not plan.measured and plan.cold_experts is None
    assert not (tmp_path / "work").exists()  # nothing is written
    assert sum(role.n_params for role in plan.roles) == source.n_params
    assert sum(role.n_bytes for role in plan.roles) == plan.allocation.tensor_bytes <= 3.6 * source.n_params / 8
    low, high = plan.reachable_bytes
    assert low < plan.allocation.tensor_bytes < high
    # experts, embeddings and the like by their number of parameters
    of_role = {role.role: role for role in plan.roles}
    assert of_role["expert"].n_params == 2 * 6 * 3 * 256 * 256
    assert of_role["embedding"].n_params == of_role["output"].n_params == 320 * 256
    assert sum(n for _, n in of_role["expert"].types) == 2 * 2 * 6
    assert of_role["kept in F32"].bits_per_weight == 32
    assert plan.calibration_seconds > 0 and plan.quantise_seconds > 0
    # self-sampled text needs room for a Q8_0 file
    text = tmp_path / "text.txt"
    text.write_text("x")
    sampled = plan.disk_bytes - planned(folder, tmp_path, calibration=Calibration((text,))).disk_bytes
    assert sampled == int(source.n_params * 8.5 / 8)
    out = rendered(plan)
    assert "provisional" in out and "8 experts" not in out and "2 of 6 experts" in out
    assert f"{plan.allocation.tensor_bytes:,} bytes" in out


def test_after_calibration(converted, small_calibration, tmp_path):
    """The plan is then the conversion's own allocation."""
    done = converted("qwen3_moe")
    for layout in ("grouped", "stock"):
        plan = planned(
            done.folder, tmp_path, choice=Choice(layout), calibration=small_calibration, work_folder=done.work
        )
        assert plan.measured and plan.calibration_seconds == 0
        assert plan.allocation == done.results[layout].allocation
        assert sum(role.n_bytes for role in plan.roles) == plan.allocation.tensor_bytes
        assert plan.cold_experts is not None and plan.cold_experts > 0  # 128 tokens for 6 experts
        assert f"mean KL divergence {plan.allocation.predicted_kl:.4f}" in rendered(plan)


def test_another_request_is_not_taken_for_calibrated(converted, tmp_path):
    done = converted("qwen3_moe")
    assert not planned(done.folder, tmp_path, work_folder=done.work).measured


def test_the_layout_that_a_router_allows(tiny, tmp_path):
    plan = planned(tiny("deepseek_v3"), tmp_path)
    assert plan.allocation.layout == "stock" and "stock layout" in rendered(plan)


def test_what_was_not_measured_is_shown(converted, small_calibration, tmp_path):
    done = converted("deepseek_v2")
    plan = planned(done.folder, tmp_path, calibration=small_calibration, work_folder=done.work)
    of_role = {role.role: role for role in plan.roles}
    # two split matrices in each of three layers
    assert sum(n for _, n in of_role["not measured"].types) == 6
    assert {name for name, _ in of_role["not measured"].types} <= {"Q8_0", "BF16"}


def test_size_counts_the_header(tiny, tmp_path):
    plan = planned(tiny("qwen3_moe"), tmp_path, budget=Budget(size_bytes=1_500_000))
    assert 1_450_000 < plan.allocation.tensor_bytes < 1_500_000


def test_out_of_reach(tiny, tmp_path):
    for bits in (0.5, 20.0):
        with pytest.raises(BudgetError, match=f"^{bits:.2f} bits per weight"):
            planned(tiny("qwen3_moe"), tmp_path, budget=Budget(bits=bits))
    choice = Choice(types=(Q.Q5_K, Q.Q8_0))
    with pytest.raises(BudgetError, match="allow smaller types with --types"):
        planned(tiny("qwen3_moe"), tmp_path, budget=Budget(bits=3.0), choice=choice)


def test_the_name_is_the_conversions(tiny, tmp_path):
    folder = tiny("qwen3_moe")
    plan = planned(folder, tmp_path, model_name="Other Name")
    assert plan.outfile.name.startswith("Other-Name-") and plan.outfile.name.endswith("-MQ3_6.gguf")


def test_durations():
    assert [_duration(s) for s in (0.2, 89, 91, 5399, 5400, 36000)] == [
        "0 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
        "10.0 h",
    ]
