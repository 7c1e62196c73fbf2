"""Router calibration: the closed form against least squares, the trials against runs of their own, and the file."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from moe2gguf import router as stage
from moe2gguf.ggml import QuantType
from moe2gguf.pipeline import convert
from moe2gguf.probes import mean_kl
from moe2gguf.router import MAX_TOKENS, Trials, agreement, calibrate_routers, fit, held_out, n_watched, taken
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.source import open_source
from moe2gguf.spool import Routers, Spool
from moe2gguf.states import States
from moe2gguf.stream import LayerStream
from moe2gguf.streams import NO_MATRICES, Streams, put_back
from moe2gguf.verify import verify_file
from tests.conftest import LAYOUTS, cheap_measurements
from tests.test_encode_experts import N_EXPERTS, TOKENS_SL, encode, every_expert
from tests.tiny_moe import CORPUS

CPU = torch.device("cpu")


def test_watched_scores_are_the_papers() -> None:
    """All of 8, 8 of 16, 20 of 60 or 64; more than are selected wherever there are more."""
    assert [n_watched(8, 2), n_watched(16, 2), n_watched(64, 8), n_watched(60, 4)] == [8, 8, 20, 19]
    assert n_watched(4, 4) == 4 and n_watched(16, 8) == 9 and n_watched(128, 8) == 36


def test_as_many_sequences_are_taken_as_fits_can_use() -> None:
    """Mixtral's eight experts all count on every token; of 128, 36; a short text is taken whole."""
    for (n_experts, n_selected), n_sequences, n_fit in (((8, 2), 128, 16), ((128, 8), 128, 57), ((128, 8), 40, 32)):
        held_out_S = held_out(n_sequences, 512)
        taken_S = taken(held_out_S, 512, n_experts, n_selected)
        fit_s = (taken_S & ~held_out_S).nonzero()[:, 0].tolist()
        assert taken_S[held_out_S].all() and len(fit_s) == n_fit
        watched = n_fit * 512 * n_watched(n_experts, n_selected) / n_experts
        assert watched >= MAX_TOKENS or taken_S.all()
        assert fit_s[0] < n_sequences / n_fit + 1 and fit_s[-1] >= n_sequences - n_sequences / n_fit - 1


def test_each_row_is_least_squares_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row in f64, with the ridge as further equations."""
    monkeypatch.setattr(stage, "DAMPINGS", (0.1,))
    rng = torch.Generator().manual_seed(0)
    router_ED = torch.randn(12, 6, generator=rng)
    exact_TD = torch.randn(400, 6, generator=rng)
    found_TD = exact_TD + 0.3 * torch.randn(400, 6, generator=rng)
    held_out_T = torch.arange(400) % 5 == 0
    # of those selected one has not a high score, as where there are biases
    selected_TK = torch.stack([(exact_TD @ router_ED.T).argmax(1), torch.arange(400) % 12], 1)
    found = fit(router_ED, exact_TD, found_TD, held_out_T, selected_TK, CPU)
    assert found is not None and found.damping == 0.1 and found.error < 1

    score_TE = exact_TD.double() @ router_ED.double().T
    watched_TE = score_TE >= score_TE.topk(n_watched(12, 2)).values[:, -1:]
    assert not watched_TE.gather(1, selected_TK).all()
    watched_TE[torch.arange(400), torch.arange(400) % 12] = True
    for expert in range(12):
        tokens = watched_TE[:, expert] & ~held_out_T
        x_nD = found_TD[tokens].double() / len(found_TD[tokens]) ** 0.5
        ridge = (0.1 * x_nD.square().sum(0).mean()).sqrt()
        left = torch.cat([x_nD, ridge * torch.eye(6, dtype=torch.float64)])
        right = torch.cat([score_TE[tokens, expert] / tokens.sum() ** 0.5, ridge * router_ED[expert].double()])
        solved_D = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        torch.testing.assert_close(found.router_ED[expert].double(), solved_D, rtol=1e-4, atol=1e-5)


def test_a_router_that_is_right_stays() -> None:
    """Nothing has changed on the way to it, so no other row can do better on held-out tokens."""
    x_TD, router_ED = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)), torch.randn(4, 6)
    selected_TK = (x_TD @ router_ED.T).topk(2).indices
    assert fit(router_ED, x_TD, x_TD, torch.arange(100) % 4 == 0, selected_TK, CPU) is None


def test_an_expert_that_counts_nowhere_keeps_its_row() -> None:
    rng = torch.Generator().manual_seed(0)
    exact_TD = torch.rand(300, 6, generator=rng)
    router_ED = torch.rand(20, 6, generator=rng)
    router_ED[7] = -10
    selected_TK = (exact_TD @ router_ED.T).topk(2).indices
    found = fit(router_ED, exact_TD, exact_TD * 0.9, torch.arange(300) % 4 == 0, selected_TK, CPU)
    assert found is not None and torch.equal(found.router_ED[7], router_ED[7])
    assert not torch.equal(found.router_ED[6], router_ED[6])


def test_agreement_counts_experts_in_any_order() -> None:
    assert agreement(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [3, 5]])) == 0.75


def test_trials_are_runs_with_one_router_as_it_was(tmp_path: Path) -> None:
    """Layers that add, whose calibrated router adds something else; the second has none, and none helps in the last.
    One trial has room in memory, the others lie on disk."""
    own, calibrated = [1.0, 10.0, 100.0, 1000.0], [2.0, None, 300.0, 500.0]

    def by(term: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x * 2 + term

    start = torch.ones(1, 1, 1)
    trials, everything = Trials(start.clone(), States(start.nbytes, tmp_path)), start.clone()
    for layer, (as_it_was, other) in enumerate(zip(own, calibrated, strict=True)):
        trials.as_it_was(layer, everything, by(as_it_was), other is not None)
        trials.advance(by(as_it_was if other is None else other))
        everything = by(as_it_was if other is None else other)(everything)

    def run(without: set[int]) -> float:
        x = 1.0
        for layer, (as_it_was, other) in enumerate(zip(own, calibrated, strict=True)):
            x = x * 2 + (as_it_was if other is None or layer in without else other)
        return x

    assert list(tmp_path.rglob("*.f32"))
    assert {layer: float(trials.without[layer]) for layer in trials.without} == {
        layer: run({layer}) for layer in (0, 2, 3)
    }
    assert float(trials.untouched_HLD) == run({0, 1, 2, 3}) and float(everything) == run(set())
    # as far as possible from zero is best, so the last layer's should go back
    helps, before, after = trials.judge(everything, lambda x: -float(x))
    assert (helps, before, after) == ([0, 2] if run(set()) > run({0, 1, 2, 3}) else [], -run({0, 1, 2, 3}), -run(set()))


def test_what_reaches_a_router_is_made_up_for(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder, spool = tiny("qwen3_moe"), Spool(tmp_path / "spool")
    encode(folder, every_expert(QuantType.IQ2_XXS), spool)
    calibrated(folder, spool)
    routers = spool.routers()
    assert routers is not None and 0 not in routers.router_ED  # nothing before it is quantised
    assert routers.agreement >= routers.agreement_before or not routers.router_ED
    written = spool._routers.stat().st_mtime_ns
    calibrated(folder, spool)
    assert spool._routers.stat().st_mtime_ns == written


def calibrated(folder: Path, spool: Spool) -> None:
    calibrate_routers(
        LayerStream(folder), TOKENS_SL, every_expert(QuantType.IQ2_XXS), NO_MATRICES, spool,
        n_experts=N_EXPERTS, n_selected=2, device=CPU, n_threads=2, progress=lambda *_: None,
    )  # fmt: skip


def test_those_that_are_kept_are_judged_together(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers' calibrated routers one is said to help: the report is of the model with that one, measured here in
    another way; where it does less than all of them, all are kept, and where they do not help none."""
    folder, types = tiny("qwen3_moe", num_hidden_layers=3), every_expert(QuantType.IQ2_XXS, (0, 1, 2))
    encoded = Spool(tmp_path / "spool")
    encode(folder, types, encoded)

    def calibrated(before: float, after: float) -> Routers:
        (tmp_path / "spool/routers.safetensors").unlink(missing_ok=True)
        monkeypatch.setattr(Trials, "judge", lambda self, *_: ([2] if after < before else [], before, after))
        monkeypatch.setattr(stage, "fit", lambda router_ED, *_: stage.Fit(router_ED * 1.01, 0.1, 0.9))
        calibrate_routers(
            LayerStream(folder), TOKENS_SL, types, NO_MATRICES, encoded,
            n_experts=N_EXPERTS, n_selected=2, device=CPU, n_threads=2, progress=lambda *_: None,
        )  # fmt: skip
        routers = encoded.routers()
        assert routers is not None
        return routers

    kept, better_all, dropped = calibrated(9.0, 4.5), calibrated(1e-8, 1e-9), calibrated(1e-9, 1e-8)
    assert list(kept.router_ED) == [2] and kept.kl_before == 9
    assert list(better_all.router_ED) == [0, 1, 2] and better_all.kl_after == 1e-9
    assert not dropped.router_ED and dropped.kl_after == dropped.kl_before == 1e-9

    stream, tokens_SL = LayerStream(folder), TOKENS_SL[held_out(*TOKENS_SL.shape).numpy()]
    with torch.inference_mode(), ThreadPoolExecutor(2) as pool:
        streams = Streams(stream, tokens_SL, NO_MATRICES, encoded, pool, lambda *_: None)
        for index in range(3):
            with streams.layer(index) as (_, block):
                streams.advance(streams.exact_SLD)
                put_back(block, {(m, e): t for (l, m, e), t in types.items() if l == index}, encoded, index, pool)
                if index == 2:
                    block.router_ED.copy_(block.router_ED * 1.01)
                streams.advance(streams.found_SLD)
        assert kept.kl_after == pytest.approx(mean_kl(stream, streams.exact_SLD, streams.found_SLD), rel=1e-4)


def test_spooled_and_read_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert spool.routers() is None
    routers = Routers({3: np.eye(4, dtype=np.float32)}, 0.1, 0.05, 0.9, 0.95)
    spool.put_routers(routers)
    back = spool.routers()
    assert back is not None and list(back.router_ED) == [3] and np.array_equal(back.router_ED[3], routers.router_ED[3])
    assert (back.kl_before, back.kl_after, back.agreement_before, back.agreement) == (0.1, 0.05, 0.9, 0.95)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_has_the_routers_that_help(
    layout: str, needs_runtime: None, tiny: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever the trials say: the second layer's router is kept, in the file's order of experts."""
    monkeypatch.setattr(Trials, "judge", lambda self, *_: ([1] if 1 in self.without else [], 0.2, 0.1))
    folder = tiny("qwen3_moe")
    words = np.random.default_rng(0).choice(" ".join(CORPUS).split(), 1500)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    calibration = Calibration((tmp_path / "text.txt",), n_sequences=48, sequence_tokens=32, n_probe_tokens=64)

    def routers(quantizer: Quantizer) -> tuple[list[np.ndarray], list[bool] | None]:
        said: list[str] = []
        with cheap_measurements():
            path = convert(
                folder, tmp_path / f"{quantizer.router}.gguf", bits=3.0, layout=layout, quantizer=quantizer,
                calibration=calibration, work_folder=tmp_path / "work", note=said.append,
            ).path  # fmt: skip
        assert any("calibrated routers: 1;" in line for line in said) == (quantizer.router == "qesc")
        assert verify_file(path, open_source(folder)).ok
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        found = []
        for layer in range(2):
            router_ED = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
            order = reader.get_field(f"moe2gguf.expert_order.{layer}")
            found.append(router_ED if order is None else router_ED[np.argsort(order.contents())])
        flags = reader.get_field("moe2gguf.router_calibrated")
        return found, None if flags is None else flags.contents()

    as_they_were, no_flags = routers(Quantizer(router="none", tuning=False))
    found, flags = routers(Quantizer(tuning=False))
    assert no_flags is None and flags == [False, True]
    np.testing.assert_array_equal(found[0], as_they_were[0])
    change = np.linalg.norm(found[1] - as_they_were[1], axis=1) / np.linalg.norm(as_they_were[1], axis=1)
    assert (change > 0).all() and (change < 0.5).all()
