"""Expert statistics against a loop over tokens, in double precision and from the checkpoint's own tensors."""

import dataclasses
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from moe2gguf.calibrate import Progress, calibrate
from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.pipeline import calibrated
from moe2gguf.run import Run, no_progress
from moe2gguf.settings import Calibration
from moe2gguf.source import open_source
from moe2gguf.stats import FORMAT_VERSION, SHRINKAGE_TOKENS, CalibrationStats, load_stats, save_stats
from moe2gguf.stream import LayerStream
from moe2gguf.text import CalibrationText
from tests.tiny_moe import load_whole

SMALL = {"hidden": 64, "intermediate": 32}
TYPES = (QuantType.IQ4_NL, QuantType.Q5_0)


def run_calibration(
    model: Path | LayerStream, n_sequences: int, length: int, progress: Progress = no_progress
) -> CalibrationStats:
    tokens_SL = np.random.default_rng(0).integers(0, 300, (n_sequences, length))
    return calibrate(
        model if isinstance(model, LayerStream) else LayerStream(model),
        CalibrationText(tokens_SL, "random"),
        TYPES,
        source_sha256="",
        request="",
        n_probe_tokens=length,
        n_threads=2,
        seed=0,
        scratch_folder=Path(gettempdir()),
        progress=progress,
    )


def slow_statistics(folder: Path, index: int, tokens_SL: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
    """One layer's ExpertStats of a qwen3_moe, token by token."""
    model = load_whole(folder)
    seen: list[torch.Tensor] = []
    model.model.layers[index].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.inference_mode():
        model(torch.from_numpy(tokens_SL))
    x_SLD = seen[0].double().numpy()
    tensors = {name: weight.double().numpy() for name, weight in load_file(folder / "model.safetensors").items()}
    mlp = f"model.layers.{index}.mlp"
    router_ED = tensors[f"{mlp}.gate.weight"]
    n_experts = len(router_ED)

    def hidden(expert: int, x_D: np.ndarray) -> np.ndarray:
        gate_I = tensors[f"{mlp}.experts.{expert}.gate_proj.weight"] @ x_D
        up_I = tensors[f"{mlp}.experts.{expert}.up_proj.weight"] @ x_D
        return gate_I / (1 + np.exp(-gate_I)) * up_I

    n_E = np.zeros(n_experts)
    gate_sum_E = np.zeros(n_experts)
    gated_sq_up = [np.zeros(x_SLD.shape[-1]) for _ in range(n_experts)]
    gated_sq_down = [np.zeros(SMALL["intermediate"]) for _ in range(n_experts)]
    probability_sum_E, layer_sq_D = np.zeros(n_experts), np.zeros(x_SLD.shape[-1])
    layer_sq_down = [np.zeros(SMALL["intermediate"]) for _ in range(n_experts)]
    for x_LD in x_SLD:
        for x_D in x_LD:
            score_E = np.exp(router_ED @ x_D)
            probability_E = score_E / score_E.sum()
            chosen = np.argsort(-probability_E)[:top_k]
            gates = probability_E[chosen] / probability_E[chosen].sum()
            layer_sq_D += x_D**2
            for e in range(n_experts):
                layer_sq_down[e] += probability_E[e] * hidden(e, x_D) ** 2
            probability_sum_E += probability_E
            for e, gate in zip(chosen, gates, strict=True):
                h_I = hidden(e, x_D)
                n_E[e] += 1
                gate_sum_E[e] += gate
                gated_sq_up[e] += gate * x_D**2
                gated_sq_down[e] += gate * h_I**2
    n_tokens = x_SLD.shape[0] * x_SLD.shape[1]

    def blend(gated_sq: list[np.ndarray], layer: list[np.ndarray]) -> np.ndarray:
        own = [sq / gate if gate else sq for sq, gate in zip(gated_sq, gate_sum_E, strict=True)]
        return np.array(
            [(n * o + SHRINKAGE_TOKENS * l) / (n + SHRINKAGE_TOKENS) for n, o, l in zip(n_E, own, layer, strict=True)]
        )

    return {
        "n_tokens_E": n_E,
        "gate_sum_E": gate_sum_E,
        "importance_gate_up_ED": blend(gated_sq_up, [layer_sq_D / n_tokens] * n_experts),
        "importance_down_EI": blend(gated_sq_down, [layer_sq_down[e] / probability_sum_E[e] for e in range(n_experts)]),
    }


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_sequences", "length", "batch_tokens"),
    [
        pytest.param(6, 2, 6, 16, 4096, id="usual"),
        pytest.param(6, 2, 5, 16, 40, id="the last of several batches is smaller"),
        pytest.param(16, 1, 2, 8, 4096, id="experts no token reached, one expert a token"),
        pytest.param(4, 4, 6, 16, 4096, id="every token takes every expert"),
    ],
)
def test_statistics_are_those_of_a_loop_over_tokens(
    n_experts: int,
    top_k: int,
    n_sequences: int,
    length: int,
    batch_tokens: int,
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe2gguf.calibrate.BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr("moe2gguf.capture.LAYER_SAMPLE_TOKENS", n_sequences * length)
    folder = tiny("qwen3_moe", **SMALL, n_experts=n_experts, top_k=top_k)
    stats = run_calibration(folder, n_sequences, length)
    tokens_SL = np.random.default_rng(0).integers(0, 300, (n_sequences, length))
    assert sorted(stats.layers) == [0, 1] and stats.n_tokens == n_sequences * length
    for index, layer in stats.layers.items():
        wanted = slow_statistics(folder, index, tokens_SL, top_k)
        # tests/test_skip.py has the rest
        assert wanted.keys() == {field.name for field in dataclasses.fields(layer)} - {"drop_harm"}
        for name, value in wanted.items():
            ours = getattr(layer, name)
            assert ours.shape == value.shape and np.isfinite(ours).all(), name
            # f32 sums of up to a hundred terms
            np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-7, err_msg=f"layer {index}: {name}")
        if n_experts == 16:
            assert (layer.n_tokens_E == 0).any()
            # what an expert has not seen it is told by its layer: never zeros, which would quantise to nothing
            assert (layer.importance_gate_up_ED > 0).all() and (layer.importance_down_EI > 0).all()
        if top_k == n_experts:
            assert (layer.n_tokens_E == n_sequences * length).all()


def test_matrix_importance_is_the_mean_square(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe2gguf.calibrate.BATCH_TOKENS", 40)
    folder = tiny("qwen2_moe", **SMALL)
    stats = run_calibration(folder, 5, 16)
    model, seen = load_whole(folder), {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    with torch.inference_mode():
        model(torch.from_numpy(np.random.default_rng(0).integers(0, 300, (5, 16))))
    # routers are not quantised, so they need none
    assert stats.importance.keys() == seen.keys() | {"lm_head"}
    for name, x in seen.items():
        wanted_K = x.double().square().reshape(-1, x.shape[-1]).mean(0)
        np.testing.assert_allclose(stats.importance[name], wanted_K.numpy(), rtol=1e-5, err_msg=name)


def living_bytes() -> int:
    """What all tensors of this process hold, each storage once."""
    storages = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter) and not candidate.is_meta:
            storages[candidate.untyped_storage().data_ptr()] = candidate.untyped_storage().nbytes()
    return sum(storages.values())


def test_one_layer_in_memory(tiny: Callable[..., Path]) -> None:
    """At every report of progress only the layer at hand has weights, and no copy of its size is alive."""
    folder = tiny("mixtral", hidden=64, intermediate=160, n_experts=24, num_hidden_layers=4)
    weights = load_file(folder / "model.safetensors")
    layer_bytes = sum(4 * weight.numel() for name, weight in weights.items() if "layers.0." in name)
    del weights
    gc.collect()
    before, living, stream = living_bytes(), [], LayerStream(folder)

    def progress(what: str, done: int, _total: int) -> None:
        # looking at all objects takes a tenth of a second; and CPython fails to finish a tuple that another thread is
        # making of a generator while it is looked at, as threads do that measure errors
        if done % 16 or what.endswith("errors"):
            return
        if match := re.match(r"layer (\d+)/4", what):
            filled = [not any(p.is_meta for p in layer.parameters()) for layer in stream.layers]
            assert filled == [index == int(match[1]) - 1 for index in range(4)], what
        living.append(living_bytes() - before)

    run_calibration(stream, 2, 16, progress)
    # beside the layer: embedding, head, the hidden states of all probes, one expert in work
    assert layer_bytes < max(living) < 1.5 * layer_bytes


# --- the file ---


def assert_same(ours: CalibrationStats, theirs: CalibrationStats) -> None:
    for field in ("types", "source_sha256", "n_tokens", "n_probe_tokens", "seed", "dtype", "text", "digest", "request"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.layers.keys() == theirs.layers.keys()
    for index, layer in ours.layers.items():
        again = theirs.layers[index]
        others = vars(again) | vars(again.drop_harm)
        for name, value in (vars(layer) | vars(layer.drop_harm)).items():
            if name != "drop_harm":
                assert value.dtype == others[name].dtype
                np.testing.assert_array_equal(value, others[name], err_msg=name)
    assert ours.importance.keys() == theirs.importance.keys()
    for name, importance_K in ours.importance.items():
        np.testing.assert_array_equal(importance_K, theirs.importance[name], err_msg=name)
    assert ours.errors.keys() == theirs.errors.keys()
    for name, errors in ours.errors.items():
        assert errors.probe_types == theirs.errors[name].probe_types
        np.testing.assert_array_equal(errors.error_EJ, theirs.errors[name].error_EJ, err_msg=name)
        np.testing.assert_array_equal(errors.probe_kl, theirs.errors[name].probe_kl, err_msg=name)


def test_saved_and_loaded(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One expert a token: the empty histogram must survive as well."""
    stats = run_calibration(tiny("qwen3_moe", **SMALL, n_experts=16, top_k=1), 2, 8)
    save_stats(stats, tmp_path / "stats.safetensors")
    assert_same(load_stats(tmp_path / "stats.safetensors"), stats)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]
    # the same input once more: the same bytes
    save_stats(run_calibration(tiny("qwen3_moe", **SMALL, n_experts=16, top_k=1), 2, 8), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "stats.safetensors").read_bytes()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    refused = re.escape(f"{path} is not a statistics file of `moe2gguf calibrate`")
    path.write_text("no safetensors")
    with pytest.raises(Moe2ggufError, match=refused):
        load_stats(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(Moe2ggufError, match=refused):
        load_stats(path)
    save_file({"weight": np.zeros(3, np.float32)}, path, {"moe2gguf": "no JSON"})
    with pytest.raises(Moe2ggufError, match=refused):
        load_stats(path)
    with pytest.raises(Moe2ggufError, match="absent"):
        load_stats(tmp_path / "absent.safetensors")
    save_file({"weight": np.zeros(3, np.float32)}, path, {"moe2gguf": json.dumps({"format": 99})})
    with pytest.raises(Moe2ggufError, match=f"has format 99, this version reads {FORMAT_VERSION}; calibrate again"):
        load_stats(path)


def test_a_truncated_file_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_stats(run_calibration(tiny("qwen3_moe", **SMALL), 2, 8), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Moe2ggufError, match="is not a statistics file"):
        load_stats(path)


def test_only_the_same_request_is_answered_from_the_file(
    needs_runtime: None, tiny: Callable[..., Path], tmp_path: Path, small_text: Path
) -> None:
    source = open_source(tiny("qwen3_moe", **SMALL))
    text = tmp_path / "small.txt"
    text.write_text(small_text.read_text())
    request = Calibration((text,), n_sequences=2, sequence_tokens=16, n_probe_tokens=16)

    def notes(calibration: Calibration = request, of=source) -> tuple[CalibrationStats, list[str]]:
        said: list[str] = []
        stats = calibrated(of, calibration, Run(tmp_path / "work", 2, note=said.append))
        return stats, [note for note in said if "σ" not in note]

    first, said = notes()
    assert said == []
    (left := tmp_path / "work/calibrating-0003").mkdir()  # by a run that was killed when it had saved the statistics
    again, said = notes()
    assert_same(again, first)
    assert not left.exists()
    assert [note.split(" in ")[0] for note in said] == ["using the statistics"]
    others = [
        dataclasses.replace(request, n_sequences=3),
        dataclasses.replace(request, sequence_tokens=15),
        dataclasses.replace(request, n_probe_tokens=32),
        dataclasses.replace(request, seed=1),
    ]
    for other in others:
        assert notes(other)[1] == [
            f"the statistics in {tmp_path / 'work/stats.safetensors'} answer another request: calibrating anew"
        ]
        assert notes(other)[1][0].startswith("using the statistics")
    notes()
    assert notes()[1][0].startswith("using the statistics")
    text.write_text(small_text.read_text()[5:])  # the same name, other words
    assert "another request" in notes()[1][0]
    another_model = open_source(tiny("qwen3_moe", **SMALL, n_experts=4))
    assert "another request" in notes(of=another_model)[1][0]
