"""Matrices beside the experts. Small models of 2 layers: hidden 256, 6 experts, a vocabulary of 320."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from moe2gguf import encode_matrices as stage
from moe2gguf import feedback, ggml, pipeline, quantize
from moe2gguf.costs import cost_table
from moe2gguf.encode_experts import encode_experts
from moe2gguf.encode_matrices import InputMoments
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.imatrix import read_imatrix, write_imatrix
from moe2gguf.pipeline import convert
from moe2gguf.settings import Calibration
from moe2gguf.source import open_source
from moe2gguf.spool import Spool
from moe2gguf.stats import load_stats
from moe2gguf.stream import LayerStream
from moe2gguf.streams import Matrix, Streams
from moe2gguf.work_folder import STATS
from tests.conftest import cheap_measurements

CPU = torch.device("cpu")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def correlated(n_tokens: int, n_columns: int, seed: int) -> torch.Tensor:
    """Tokens with a spectrum that falls, as activations' does."""
    basis_KK = torch.randn(n_columns, n_columns, generator=torch.Generator().manual_seed(1))
    x_TK = torch.randn(n_tokens, n_columns, generator=torch.Generator().manual_seed(seed))
    return x_TK * torch.arange(1, n_columns + 1) ** -0.7 @ basis_KK / 16


def linear(n_rows: int, n_columns: int, seed: int = 0) -> nn.Linear:
    module = nn.Linear(n_columns, n_rows, bias=False)
    module.weight.data = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed)) / 16
    return module


@torch.inference_mode()
def test_sums_of_what_is_given_and_held_out() -> None:
    """16 tokens a batch in runs of two, of which the fourth and eighth are held out; two batches."""
    first, same, other = linear(3, 4), linear(5, 4), linear(2, 4)
    matrices = {name: Matrix(QuantType.Q8_0, None) for name in ("first", "same", "other")}
    given = InputMoments({"first": first, "same": same, "other": other, "unnamed": linear(1, 4)}, matrices)
    assert set(given.modules) == {"first", "same", "other"}
    batches = [correlated(16, 4, seed).view(2, 8, 4) for seed in (0, 1)]
    with given.listening():
        for x_SLK in batches:
            first(x_SLK)
            same(x_SLK)
            other(2 * x_SLK)
    first(batches[0])  # not listened to
    sums = given._sums
    assert sums["first"] is sums["same"]
    held_out = [6, 7, 14, 15]
    for name, factor in (("first", 1), ("other", 4)):
        fit, kept = torch.zeros(4, 4), torch.zeros(4, 4)
        for x_SLK in batches:
            for t, x_K in enumerate(x_SLK.reshape(16, 4)):
                (kept if t in held_out else fit).add_(factor * torch.outer(x_K, x_K))
        torch.testing.assert_close(sums[name].fit_KK, fit)
        torch.testing.assert_close(sums[name].held_out_KK, kept)
        assert (sums[name].n_fit, sums[name].n_held_out) == (24, 8)


@torch.inference_mode()
def test_less_output_error_than_ggmls(pool: ThreadPoolExecutor) -> None:
    """On tokens that were not seen; a type without feedback and too many columns are left to ggml."""
    module, x_TK, unseen_TK = linear(96, 256), correlated(2048, 256, 0), correlated(512, 256, 2)
    importance_K = x_TK.square().mean(0).numpy()
    for quant_type in (QuantType.IQ2_XXS, QuantType.IQ4_XS, QuantType.Q4_K):
        matrices = {"m": Matrix(quant_type, importance_K)}
        given = InputMoments({"m": module}, matrices)
        with given.listening():
            module(x_TK[None])
        blocks, (outcome,) = given.encode(matrices, CPU, pool)
        assert outcome.matrix == "m" and outcome.expert is None and outcome.damping in stage.DAMPINGS

        def error(blocks_NB: np.ndarray, quant_type: QuantType = quant_type) -> float:
            delta_NK = torch.from_numpy(ggml.decode(blocks_NB, quant_type, 256)) - module.weight
            return float((unseen_TK @ delta_NK.T).square().sum())

        plain = ggml.encode(module.weight.numpy(), quant_type, importance_K)
        assert error(blocks["m"]) < 0.8 * error(plain)
        assert outcome.error < 0.8
    assert not InputMoments({"m": module}, {"m": Matrix(QuantType.Q5_0, None)}).modules
    assert not InputMoments({"m": linear(2, 2 * stage.MAX_COLUMNS)}, {"m": Matrix(QuantType.Q4_K, None)}).modules


@torch.inference_mode()
def test_ggmls_bytes_stay_where_feedback_is_worse(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = feedback.quantize
    monkeypatch.setattr(feedback, "quantize", lambda w_ENK, *rest: honest(-w_ENK, *rest))
    module, x_TK = linear(2 * feedback.ROWS_PER_JOB + 1, 256), correlated(64, 256, 0)
    matrices = {"m": Matrix(QuantType.Q4_K, x_TK.square().mean(0).numpy())}
    given = InputMoments({"m": module}, matrices)
    with given.listening():
        module(x_TK[None])
    blocks, (outcome,) = given.encode(matrices, CPU, pool)
    assert outcome.damping is None and outcome.error == 1
    expected = ggml.encode(module.weight.numpy(), QuantType.Q4_K, matrices["m"].importance_K)
    np.testing.assert_array_equal(blocks["m"], expected)


def test_rows_are_found_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, rng = Spool(tmp_path), np.random.default_rng(0)
    monkeypatch.setattr("moe2gguf.spool.KEYED_ROWS", 2)
    weight_NK = rng.standard_normal((5, 8), np.float32)
    weight_NK[3] = 0
    blocks_NB = np.arange(10, dtype=np.uint8).reshape(5, 2)
    assert not spool.has_matrices(1)
    spool.put_matrices(1, {"layers.1.q": (weight_NK, blocks_NB)}, [])
    spool.put_matrices("lm_head", {"lm_head": (weight_NK, blocks_NB)}, [])
    assert spool.has_matrices(1) and not spool.has_matrices(0)
    order = [4, 0, 3, 1, 2]
    for name in ("layers.1.q", "lm_head"):
        np.testing.assert_array_equal(spool.matrix(name, weight_NK[order]), blocks_NB[order])
    assert spool.matrix("layers.1.k", weight_NK) is None and spool.matrix("layers.0.q", weight_NK) is None
    changed_NK = weight_NK.copy()
    changed_NK[2, 7] = np.nextafter(changed_NK[2, 7], 9)
    assert spool.matrix("lm_head", changed_NK) is None
    assert spool.matrix("lm_head", weight_NK[:, [1, 0, *range(2, 8)]]) is None


def test_columns_that_the_converter_moves(
    tiny: Callable[..., Path], small_calibration: Calibration, tmp_path: Path
) -> None:
    """Qwen3.5's linear attention has more heads of values than of keys, and other places for them in a GGUF: the file's
    columns weigh what they do in the model, in the importance matrix too."""
    source = open_source(tiny("qwen3_5_moe_text"))
    with cheap_measurements():
        result = convert(source.path, tmp_path / "a.gguf", bits=3.6, calibration=small_calibration)
    stats = load_stats(result.calibration_text.with_name(STATS))
    write_imatrix(tmp_path / "imatrix.gguf", source, cost_table(source, stats, layout="stock"), stats)
    tensor, module = source.tensor("blk.0.ssm_out.weight"), "layers.0.linear_attn.out_proj"
    with torch.inference_mode(), LayerStream(source.path).layer(0) as layer:
        weight_NK = layer.get_submodule("linear_attn.out_proj").weight.numpy().copy()
    assert tensor.columns_K is not None and not np.array_equal(tensor.load(), weight_NK)
    np.testing.assert_array_equal(tensor.load(), weight_NK[:, tensor.columns_K])
    importance_K = stats.importance[module][tensor.columns_K]
    np.testing.assert_allclose(read_imatrix(tmp_path / "imatrix.gguf")[tensor.name][0], importance_K, rtol=1e-6)
    in_file = {t.name: t for t in gguf.GGUFReader(result.path).tensors}[tensor.name]
    expected = ggml.encode(tensor.load(), QuantType(in_file.tensor_type), importance_K)
    np.testing.assert_array_equal(in_file.data, expected)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_the_file_has_them(
    tiny: Callable[..., Path],
    small_calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    """Mixtral's converter has the rows of queries and keys in another order; Qwen2-MoE has shared experts."""
    by_ggml = []
    encode = quantize._encode
    monkeypatch.setattr(quantize, "_encode", lambda tensor, *rest: by_ggml.append(tensor.name) or encode(tensor, *rest))
    folder = tiny(model_type)
    done = convert(folder, tmp_path / "a.gguf", bits=4.5, calibration=small_calibration, n_threads=2)
    source, header = open_source(folder), read_gguf(done.path)
    beside = [t for t in source.tensors if t.quantisable and "_exps" not in t.name and len(t.shape) == 2]
    stored = {tensor.name: tensor for tensor in header.tensors}
    fed_back = [t for t in beside if stored[t.name].type in stage.CODECS]
    assert len(fed_back) > len(beside) / 2
    assert not {t.name for t in fed_back} & set(by_ggml)
    assert {o.matrix for o in done.outcomes if o.expert is None} >= {
        "layers.0.self_attn.q_proj",
        "lm_head",
        "embed_tokens",
    }
    for tensor in fed_back:
        of_file = stored[tensor.name]
        exact, found = tensor.load(), ggml.decode(of_file.blocks(), of_file.type, tensor.shape[1])
        assert np.square(found - exact).sum() < 0.5 * np.square(exact).sum(), tensor.name


class _Stop(Exception):
    pass


@pytest.mark.parametrize("tied", [False, True])
def test_what_gradients_say_reaches_quantisation(
    tiny: Callable[..., Path],
    small_calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
) -> None:
    """Embeddings that are the head too are multiplied with, which those moments know nothing of."""
    given = {}

    def stop(*_arguments: object, **options: object) -> None:
        given.update(options)
        raise _Stop

    monkeypatch.setattr(pipeline, "encode_experts", stop)
    with pytest.raises(_Stop):
        convert(
            tiny("qwen3_moe", tie_word_embeddings=tied), tmp_path / "a.gguf", bits=4.5,
            calibration=small_calibration, n_threads=2,
        )  # fmt: skip
    stats = load_stats(next(tmp_path.glob("*.moe2gguf")) / "stats.safetensors")
    assert set(given["output_moments"]) == {0, 1}
    for layer, moments_DD in given["output_moments"].items():
        np.testing.assert_array_equal(moments_DD, stats.output_moments[layer])
    if tied:
        assert given["embedding_moments_2DD"] is None
    else:
        np.testing.assert_array_equal(given["embedding_moments_2DD"], stats.embedding_moments_2DD)


@torch.inference_mode()
def test_streams_carry_the_files_matrices(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """What the layers after them are fitted to, and a second pass, have the bytes of the file."""
    stream, spool = LayerStream(tiny("qwen3_moe")), Spool(tmp_path)
    tokens_SL = np.random.default_rng(0).integers(0, 300, (8, 32))
    matrices = {f"layers.{i}.self_attn.{m}_proj": Matrix(QuantType.IQ2_XXS, None) for i in (0, 1) for m in "qkv"}
    matrices = {
        name: Matrix(matrix.quant_type, np.ones(_columns(stream, name), np.float32))
        for name, matrix in matrices.items()
    }
    matrices["embed_tokens"] = Matrix(QuantType.IQ3_XXS, None)
    gradient_TD = correlated(512, 256, 0)
    moments_2DD = torch.stack([part_TD.T @ part_TD for part_TD in gradient_TD.split(384)]).numpy()
    types = {(layer, m, e): QuantType.Q4_K for layer in (0, 1) for m in ("gate", "up", "down") for e in range(6)}

    def encode(into: Spool) -> None:
        encode_experts(
            stream, tokens_SL, types, into, affinity="gate", device=CPU, n_threads=2, progress=lambda *_: None,
            matrices=matrices, embedding_moments_2DD=moments_2DD,
        )  # fmt: skip

    encode(spool)
    written = {path: path.stat().st_mtime_ns for path in spool.folder.iterdir()}
    encode(spool)  # nothing is left to do
    assert written == {path: path.stat().st_mtime_ns for path in spool.folder.iterdir()}
    with ThreadPoolExecutor(2) as pool:
        exact_VD = stream.embedding_VD.clone()
        blocks_VB = spool.matrix("embed_tokens", exact_VD.numpy())
        assert blocks_VB is not None
        found_VD = torch.from_numpy(ggml.decode(blocks_VB, QuantType.IQ3_XXS, 256))
        plain_VD = torch.from_numpy(ggml.round_trip(exact_VD.numpy(), QuantType.IQ3_XXS, None))
        streams = Streams(stream, tokens_SL, matrices, spool, pool, lambda *_: None)
        np.testing.assert_array_equal(streams.found_SLD.numpy(), found_VD[tokens_SL].numpy())
        torch.testing.assert_close(stream.embedding_VD, exact_VD, rtol=0, atol=0)
        # an embedding's error by what gradients that were not seen make of it
        unseen_TD = correlated(512, 256, 2)
        miss, plain = ((unseen_TD @ (w_VD - exact_VD).T).square().sum() for w_VD in (found_VD, plain_VD))
        assert miss < 0.6 * plain
        with streams.layer(1) as (layer, _):
            exact_NK = layer.self_attn.q_proj.weight.clone()
            streams.quantise_matrices()
            blocks_NB = spool.matrix("layers.1.self_attn.q_proj", exact_NK.numpy())
            assert blocks_NB is not None
            decoded_NK = ggml.decode(blocks_NB, QuantType.IQ2_XXS, exact_NK.shape[1])
            np.testing.assert_array_equal(layer.self_attn.q_proj.weight.numpy(), decoded_NK)
    # what a killed run has not written is made again, with the same bytes
    broken = Spool(tmp_path / "broken")
    encode(broken)
    for part in ("0001", "embed_tokens"):
        path = broken.folder / f"matrices-{part}.safetensors"
        before = path.read_bytes()
        path.unlink()
        encode(broken)
        assert path.read_bytes() == before


def _columns(stream: LayerStream, name: str) -> int:
    layer, path = int(name.split(".")[1]), name.split(".", 2)[2]
    return stream.layers[layer].get_submodule(path).weight.shape[1]
