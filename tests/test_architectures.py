"""Every architecture from checkpoint to GGUF in both layouts, against transformers on the values the file holds.

llama.cpp rounds activations to 8 bits before it multiplies by quantised weights, so logits of the file itself only
agree up to that noise. Its float path has none: the same file with every block written out as the floats it stands
for, in the same groups and the same order, must agree with transformers to float rounding.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the runtime: moe2gguf runtime install")

from moe2gguf import sample
from moe2gguf.calibration_text import text_of
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.pipeline import convert
from moe2gguf.run import Run
from moe2gguf.settings import Calibration
from moe2gguf.source import layer_of, open_source
from moe2gguf.stats import load_stats
from moe2gguf.text import CalibrationText
from moe2gguf.verify import verify_file
from moe2gguf.work_folder import STATS
from tests.conftest import LAYOUTS, MIDDLE_BITS, N_EXPERTS, Converted, cheap_measurements
from tests.dequantised import dequantised_checkpoint, dequantised_tensors
from tests.gguf_files import rewritten
from tests.logits import TABLE_NOISE, llama_logits, transformers_logits
from tests.tiny_configs import MODEL_TYPES

# dimensions no K-quant block divides, experts narrower than the model, three experts a token
ODD = {"hidden": 192, "intermediate": 96, "top_k": 3}
# what mixes streams, or chooses what to attend to, stays F32, which in narrow layers is much
BITS = dict.fromkeys(MODEL_TYPES, MIDDLE_BITS) | {"glm5_next": 5.0, "minimax_m3_vl": 5.0}
CASES = [
    *(pytest.param(model_type, {}, bits, id=model_type) for model_type, bits in BITS.items()),
    pytest.param("gpt_oss", {"stored": "mxfp4"}, MIDDLE_BITS, id="gpt_oss-mxfp4"),
    pytest.param("minimax_m2", {"stored": "fp8"}, MIDDLE_BITS, id="minimax_m2-fp8"),
    pytest.param("deepseek_v3", {"stored": "int4"}, MIDDLE_BITS, id="deepseek_v3-int4"),
    # experts narrower at both ends than what the router is given
    pytest.param("nemotron_h", {"hidden": 512, "moe_latent_size": 256}, MIDDLE_BITS, id="nemotron_h-latent"),
    # blocks of 32 begin at 4.5 bits
    *(pytest.param(t, ODD, 5.6, id=f"{t}-odd") for t in ("mixtral", "deepseek_v2", "granitemoe_swa", "gpt_oss")),
]
TOKENS = np.random.default_rng(0).integers(0, 300, 96).tolist()

# float sums in another order: up to 5e-6 of the logits' spread was seen; one expert in a wrong place gives 0.1 and more
FLOAT_NOISE = 5e-5
# Rounding 256 activations to 255 steps up to the largest leaves an error of about 0.7 % (largest of them 3 σ, steps of
# 3σ/127, √12). A token passes some 14 products one after the other, and 0.7 % · √14 = 2.6 %; with attention's part 4 %.
# The median, because a token whose router is nearly tied goes to another expert then, and rightly so.
ROUNDING_NOISE = 0.04
# the state of linear attention, or of state-space layers, carries it on from token to token
RECURRENT_NOISE = dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe", "nemotron_h", "jamba"), 0.15)


def expert_types(path: Path) -> dict[tuple[int | None, str], list[str]]:
    """(layer, "gate" | "up" | "down" | "gate_up") -> type of every expert, in the file's order."""
    types: dict[tuple[int | None, str], list[str]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if match := re.search(r"ffn_(\w+)_exps(\.g\d)?\.weight$", tensor.name):
            key = layer_of(tensor.name), match[1]
            types[key] = types.get(key, []) + [tensor.tensor_type.name] * int(tensor.shape[-1])
    return types


def as_it_stands(path: Path, out: Path) -> Path:
    """The file with every block as the floats it stands for: same tensors, same groups, same order of experts."""
    reader = gguf.GGUFReader(path)
    floats = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(map(int, tensor.shape[::-1])))
        for tensor in reader.tensors
    }
    return rewritten(path, out, floats)


def in_checkpoint_order(path: Path, out: Path, *, rolled: str = "") -> Path:
    """The same values as one tensor each, experts as the checkpoint has them, for any llama.cpp.

    One tensor's experts can be moved on by one place, which is the smallest mistake a layout could make.
    """
    floats = dequantised_tensors(path)
    if rolled:
        floats[rolled] = np.roll(floats[rolled], 1, axis=0)
    return rewritten(path, out, floats, plain=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model_type", "options", "bits"), CASES)
def test_logits_are_those_of_the_values_in_the_file(
    model_type: str, options: dict, bits: float, layout: str, converted: Callable[..., Converted], tmp_path: Path
) -> None:
    case = converted(model_type, bits, **options)
    path = case.results[layout].path
    checkpoint = dequantised_checkpoint(path, case.folder, tmp_path / "checkpoint")
    wanted = transformers_logits(checkpoint, TOKENS)
    spread = wanted.std()

    exact = llama_logits(as_it_stands(path, tmp_path / "float.gguf"), TOKENS)
    atol = TABLE_NOISE.get(model_type, FLOAT_NOISE) * spread
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=atol)
    if layout == "grouped":
        stock = llama_logits(in_checkpoint_order(path, tmp_path / "stock.gguf"), TOKENS)
        np.testing.assert_allclose(exact, stock, rtol=0, atol=atol)

    def median_error(logits_TV: np.ndarray) -> float:
        return float(np.median(np.sqrt(np.square(logits_TV - wanted).mean(1))) / spread)

    layer = max(index for index, _ in expert_types(path))
    misplaced = in_checkpoint_order(path, tmp_path / "wrong.gguf", rolled=f"blk.{layer}.ffn_down_exps.weight")
    noise = median_error(llama_logits(path, TOKENS))
    assert noise < RECURRENT_NOISE.get(model_type, ROUNDING_NOISE)
    assert noise < (0.5 if model_type in RECURRENT_NOISE else 0.2) * median_error(llama_logits(misplaced, TOKENS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model_type", "options", "bits"), CASES)
def test_every_tensor_is_the_checkpoints(
    model_type: str, options: dict, bits: float, layout: str, converted: Callable[..., Converted]
) -> None:
    case = converted(model_type, bits, **options)
    result, source = case.results[layout], open_source(case.folder)
    report = verify_file(result.path, source)
    assert report.ok, report.problems
    n_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(result.path).tensors)
    assert n_bytes == result.allocation.tensor_bytes
    # one expert's matrix more or less is all that a step of this size can be off: these models are small
    assert 0.99 < n_bytes * 8 / source.n_params / bits <= 1


# with the four types for odd columns an order may come out as it was
@pytest.mark.parametrize(
    ("model_type", "options", "bits"),
    [case for case in CASES if case.values[0] not in ("deepseek_v3", "deepseek_v32") and case.values[1] is not ODD],
)
def test_experts_get_types_and_places_of_their_own(
    model_type: str, options: dict, bits: float, converted: Callable[..., Converted]
) -> None:
    case = converted(model_type, bits, **options)
    grouped, stock = (gguf.GGUFReader(case.results[layout].path) for layout in LAYOUTS)
    arch = open_source(case.folder).arch
    assert grouped.get_field("general.architecture").contents() == f"{arch}+grouped"
    assert stock.get_field("general.architecture").contents() == arch

    types = expert_types(case.results["grouped"].path)
    assert any(len(set(of_experts)) > 1 for of_experts in types.values())
    for (layer, projection), of_experts in types.items():
        assert len(of_experts) == N_EXPERTS
        assert projection != "up" or of_experts == types.get((layer, "gate"), of_experts)
    orders = [grouped.get_field(f"moe2gguf.expert_order.{layer}") for layer in range(3)]
    assert any(order is not None and order.contents() != list(range(N_EXPERTS)) for order in orders)

    assert all(len(set(of_experts)) == 1 for of_experts in expert_types(case.results["stock"].path).values())
    assert not any("expert_order" in name for name in stock.fields)
    # only the sum of costs decides which layout is better, and one type for all is a special case of several
    assert case.results["grouped"].allocation.lower_bound_kl <= case.results["stock"].allocation.predicted_kl


def test_gate_and_up_in_one_matrix_are_grouped_as_such(converted: Callable[..., Converted]) -> None:
    path = converted("granitemoe_swa").results["grouped"].path
    assert {projection for _, projection in expert_types(path)} == {"gate_up", "down"}
    assert any("ffn_gate_up_exps.g1." in tensor.name for tensor in gguf.GGUFReader(path).tensors)


def test_routing_groups_keep_the_order(converted: Callable[..., Converted]) -> None:
    case = converted("deepseek_v3")
    reader = gguf.GGUFReader(case.results["grouped"].path)
    assert reader.get_field("general.architecture").contents() == "deepseek2"
    assert not any("expert_order" in name for name in reader.fields)
    assert any("chooses experts through groups" in note for note in case.notes["grouped"])
    assert not any("chooses experts through groups" in note for note in case.notes["stock"])


def test_what_seems_to_be_worth_nothing_is_kept(converted: Callable[..., Converted]) -> None:
    """GLM-5's choice of tokens has no effect on texts as short as calibration's."""
    tensors = gguf.GGUFReader(converted("glm_moe_dsa").results["grouped"].path).tensors
    types = {tensor.tensor_type.name for tensor in tensors if "indexer" in tensor.name}
    assert types == {"F32", "Q8_0"}


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "granitemoe_swa", "gpt_oss"])
def test_odd_columns_are_noted(model_type: str, converted: Callable[..., Converted]) -> None:
    case = converted(model_type, 5.6, **ODD)
    for layout in LAYOUTS:
        types = {t for of_experts in expert_types(case.results[layout].path).values() for t in of_experts}
        assert types <= {"IQ4_NL", "Q5_0", "Q5_1", "Q8_0"}
        assert any(
            "columns that are no multiple of 256 and use types with blocks of 32" in n for n in case.notes[layout]
        )


def test_statistics_are_shared_between_layouts(converted: Callable[..., Converted]) -> None:
    case = converted("mixtral")
    assert not any(note.startswith("using the statistics") for note in case.notes["grouped"])
    assert case.notes["stock"][0] == (
        f"using the statistics in {case.work / 'stats.safetensors'} (128 tokens of small.txt)"
    )


def test_experts_of_large_models_write_in_fewer_bits(
    needs_runtime: None, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny("qwen3_moe"))
    calibration = Calibration((), writer="sample", n_sequences=2, sequence_tokens=32)
    types: dict[bool, set[str]] = {True: set(), False: set()}

    def sample_text(path: Path, *arguments: Any, **options: Any) -> CalibrationText:
        for tensor in read_gguf(path).tensors:
            types["exps" in tensor.name].add(tensor.type.name)
        return sample.sample_text(path, *arguments, **options)

    monkeypatch.setattr("moe2gguf.calibration_text.sample_text", sample_text)
    monkeypatch.setattr(sample, "HALF_BYTE_PARAMS", source.n_params)
    text = text_of(source, calibration, Run(tmp_path, 2))()
    assert text.tokens_SL.shape == (2, 32) and types == {True: {"Q4_0"}, False: {"Q8_0", "F32"}}


def test_the_model_writes_its_own_text(needs_runtime: None, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", **ODD)
    own = Calibration((), writer="sample", n_sequences=4, sequence_tokens=32, n_probe_tokens=64)
    with cheap_measurements():
        first, again = (
            convert(folder, tmp_path / f"{n}.gguf", bits=5.6, calibration=own, work_folder=tmp_path / n)
            for n in ("first", "again")
        )
    assert first.path.read_bytes() == again.path.read_bytes()
    stats = load_stats(first.calibration_text.with_name(STATS))
    assert (stats.text, stats.n_tokens) == ("self-sampled", 128)
    assert len(first.calibration_text.read_text(encoding="utf-8")) > 64
    # the file that it sampled from is gone
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == [
        "calibration.txt",
        "stats.safetensors",
        "text.safetensors",
    ]
    assert verify_file(first.path, open_source(folder)).ok
