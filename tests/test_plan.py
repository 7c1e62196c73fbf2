import io
from math import prod

import pytest
import torch
from rich.console import Console

from moe2gguf.errors import BudgetError
from moe2gguf.ggml import QuantType as Q
from moe2gguf.memory import BASE_BYTES, WRITER_BYTES, Sizes, sampling_bytes
from moe2gguf.plan import _duration, make_plan, render_plan
from moe2gguf.settings import Budget, Calibration, Choice
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


def sizes(source, calibration):
    return Sizes(source, calibration, calibration.sequence_tokens, torch.float32, 2, torch.device("cpu"), n_branches=1)


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
    # the model's own text needs room for a Q8_0 file
    text = tmp_path / "text.txt"
    text.write_text("x")
    sampled = plan.disk_bytes - planned(folder, tmp_path, calibration=Calibration((text,))).disk_bytes
    assert sampled == int(source.n_params * 8.5 / 8)
    out = rendered(plan)
    assert "the model's own text" in out and "none with --text FILE" in " ".join(out.split())
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


def test_memory_of_sampling(tiny, tmp_path):
    """Counted by hand: 2 layers, 2 heads of keys and values of 64 columns each in 16 bits, a vocabulary of 320."""
    folder = tiny("qwen3_moe")
    source = open_source(folder)
    shapes = {t.name: t.shape for t in source.tensors}
    assert shapes["blk.0.attn_k.weight"] == shapes["blk.1.attn_v.weight"]
    n_kv = shapes["blk.0.attn_k.weight"][0]
    of_token = 2 * 2 * 2 * n_kv  # layers, keys and values, bytes
    large = 2 * max(prod(shape) for shape in shapes.values()) * 4
    for calibration, n_parallel in (
        (Calibration(n_sequences=128, sequence_tokens=512, writer="sample"), 128),
        (Calibration(n_sequences=500, sequence_tokens=512, writer="sample"), 128),
        (Calibration(n_sequences=100, sequence_tokens=512, writer="sample"), 100),
        (Calibration(n_sequences=20, sequence_tokens=512), 40),
        (Calibration(n_sequences=100, sequence_tokens=512), 128),
    ):
        wanted = of_token * 512 * n_parallel + 24 * 320 * n_parallel
        assert wanted > large and sampling_bytes(sizes(source, calibration)) == wanted
    # few and short texts: what is left is a tensor on its way into the file
    assert sampling_bytes(sizes(source, Calibration(n_sequences=1, sequence_tokens=16))) == large
    # MLA caches one compressed key for all heads
    latent = open_source(tiny("deepseek_v2"))
    rows = [t.shape[0] for t in latent.tensors if "attn_kv_a_mqa" in t.name]
    found = sampling_bytes(sizes(latent, Calibration(n_sequences=128, sequence_tokens=512)))
    assert len(rows) == latent.n_layer and found == 2 * sum(rows) * 512 * 128 + 24 * 320 * 128


def test_sampling_is_planned_for_where_it_takes_most(tiny, tmp_path, monkeypatch):
    folder, text = tiny("qwen3_moe"), tmp_path / "text.txt"
    text.write_text("x")
    read, written = Calibration((text,)), Calibration()
    assert (
        planned(folder, tmp_path, calibration=written).calibration_ram_bytes
        == planned(folder, tmp_path, calibration=read).calibration_ram_bytes + WRITER_BYTES
    )
    monkeypatch.setattr("moe2gguf.memory.sampling_bytes", lambda *_: 10 * 2**30)
    assert (
        planned(folder, tmp_path, calibration=written).calibration_ram_bytes == BASE_BYTES + WRITER_BYTES + 10 * 2**30
    )
    assert planned(folder, tmp_path, calibration=read).calibration_ram_bytes < 2**30


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


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_machine_that_is_too_small_is_told(tiny, tmp_path, monkeypatch, is_enough):
    plan = planned(tiny("qwen3_moe"), tmp_path)
    most = max(plan.calibration_ram_bytes, plan.quantise_ram_bytes)
    monkeypatch.setattr("moe2gguf.plan.memory_bytes", lambda: most if is_enough else most - 1)
    assert ("; this machine has" in " ".join(rendered(plan).split())) != is_enough


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
