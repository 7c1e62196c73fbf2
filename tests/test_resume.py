"""A conversion that is killed goes on where it was, to the same bytes; a changed option costs what depends on it."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from moe2gguf import pipeline
from moe2gguf.errors import BudgetError
from moe2gguf.ggml import QuantType as Q
from moe2gguf.gguf_file import Target, check_target
from moe2gguf.pipeline import convert
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.skip import Skipping
from moe2gguf.source import open_source
from moe2gguf.stats import CalibrationStats
from moe2gguf.streams import Matrix
from moe2gguf.work_folder import request_digest, spool_for
from tests.conftest import cheap_measurements

# each is there after the stage that the one before it began: the model to sample from, its text, a layer of the
# calibration, all and the head, the statistics, one layer of experts, both, the routers, the file being written
MOMENTS = (
    "work/sampling.gguf",
    "work/text.safetensors",
    "work/calibrating-0001",
    "work/calibrating-0003",
    "work/stats.safetensors",
    "work/experts-*/layer-0000.safetensors",
    "work/experts-*/layer-0001.safetensors",
    "work/experts-*/routers.safetensors",
    ".a.gguf.partial/*",
)
N_RANDOM = 3
ITSELF = Calibration(n_sequences=4, sequence_tokens=32, n_probe_tokens=64)


@contextmanager
def few_types() -> Iterator[None]:
    """None of those whose tables ggml computes for seconds in every process."""
    with cheap_measurements(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe2gguf.interim.INTERIM_SECONDS", 0.0)
        patch.setattr(pipeline, "CANDIDATES", (Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q6_K, Q.IQ4_NL, Q.Q5_0, Q.Q5_1, Q.Q8_0))
        yield


def converted_in(model: Path, folder: Path) -> None:
    """With text of its own and shards, so that there is much that can be left half done."""
    torch.set_num_threads(1)
    with few_types():
        convert(
            model, folder / "a.gguf", bits=3.6, calibration=ITSELF, work_folder=folder / "work", split_max_tensors=12,
            n_threads=1, note=lambda text: (folder / "notes").open("a").write(f"{text}\n"),
        )  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    kept = [folder / "work" / "stats.safetensors", folder / "work" / "calibration.txt"]
    return {path.name: path.read_bytes() for path in [*folder.glob("*.gguf"), *kept]}


def killed(start: Callable[[], multiprocessing.process.BaseProcess], is_time: Callable[[float], bool]) -> bool:
    """Whether it was before it had ended by itself."""
    process, began = start(), time.monotonic()
    while process.is_alive() and not is_time(time.monotonic() - began):
        time.sleep(0.001)
    assert process.pid is not None
    was_alive = process.is_alive()
    if was_alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == (-signal.SIGKILL if was_alive else 0)
    return was_alive


@pytest.mark.slow
def test_killed_again_and_again(needs_runtime: None, tiny, tmp_path: Path) -> None:
    """At every stage in turn, each time going on from what the last run left; then at random times from the start."""
    model = tiny("qwen3_moe")
    # its children start at once, with everything imported and no threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    importing = context.Process(target=int)
    importing.start()
    importing.join()

    def start_in(folder: Path) -> Callable[[], multiprocessing.process.BaseProcess]:
        def start() -> multiprocessing.process.BaseProcess:
            process = context.Process(target=converted_in, args=(model, folder))
            process.start()
            return process

        return start

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    began = time.monotonic()
    killed(start_in(undisturbed), lambda _: False)
    seconds = time.monotonic() - began
    wanted = results(undisturbed)
    assert len(wanted) > 3 and not [*undisturbed.glob("work/experts-*"), *undisturbed.glob(".*")]

    folder = tmp_path / "stages"
    folder.mkdir()
    n_from_text = n_from_statistics = 0
    for moment in (*MOMENTS, None):
        if moment is not None and any(folder.glob(moment)):
            continue  # on a busy machine the one before got there before it was killed
        has_statistics = (folder / "work" / "stats.safetensors").exists()
        n_from_statistics += has_statistics
        n_from_text += not has_statistics and (folder / "work" / "text.safetensors").exists()
        was_killed = killed(start_in(folder), lambda _, moment=moment: moment is not None and any(folder.glob(moment)))
        assert was_killed == (moment is not None), moment
        assert bool([*folder.glob("*.gguf")]) == (moment is None), moment
    assert results(folder) == wanted
    notes = (folder / "notes").read_text()
    assert 1 <= n_from_statistics == notes.count("using the statistics in")
    assert n_from_text == notes.count("using the text in")
    assert "an earlier run passed 1 of 2 layers" in notes and "an earlier run passed 2 of 2 layers" in notes
    assert not [*folder.glob("work/experts-*"), *folder.glob("work/calibrating-*"), *folder.glob(".*")]

    folder, rng = tmp_path / "random", random.Random(0)
    folder.mkdir()
    for _ in range(N_RANDOM):
        after = rng.uniform(0.05, 0.5) * seconds
        killed(start_in(folder), lambda passed, after=after: passed > after)
        if [*folder.glob("*-00001-of-*.gguf")]:
            break
    else:
        killed(start_in(folder), lambda _: False)
    assert results(folder) == wanted


def test_shards_of_a_run_that_was_cut_off_are_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a-00002-of-00003.gguf").write_text("of a run that was killed while it renamed them, the last first")
    check_target(Target(tmp_path / "a.gguf"), 1)


class Stages:
    """The files that stages leave, and which of them a call makes anew."""

    def __init__(self, work: Path):
        self.paths = {name: work / f"{name}.safetensors" for name in ("text", "stats")}

    def now(self) -> dict[str, tuple[int, int]]:
        return {name: (p.stat().st_ino, p.stat().st_mtime_ns) for name, p in self.paths.items() if p.exists()}

    def renewed(self, call: Callable[[], object]) -> set[str]:
        before = self.now()
        call()
        return {name for name, identity in self.now().items() if identity != before.get(name)}


@pytest.mark.slow
def test_what_an_option_costs(needs_runtime: None, tiny, small_text: Path, tmp_path: Path) -> None:
    model, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(tiny("qwen3_moe"), model)
    stages = Stages(work)

    def renewed(calibration: Calibration, bits: float = 3.6, **options: object) -> set[str]:
        def call() -> None:
            with few_types():
                convert(
                    model, tmp_path / "a.gguf", bits=bits, calibration=calibration, work_folder=work, overwrite=True,
                    quantizer=Quantizer(feedback=False), **options,
                )  # fmt: skip

        return stages.renewed(call)

    assert renewed(ITSELF) == {"text", "stats"}
    for options in (
        {"bits": 3.3},
        {"layout": "stock"},
        {"allocator": "uniform", "bits": 4.0},
        {"skipping": Skipping(0.1)},
    ):
        assert renewed(ITSELF, **options) == set(), options
    probed = dataclasses.replace(ITSELF, n_probe_tokens=32)
    assert renewed(probed) == {"stats"}
    assert renewed(dataclasses.replace(probed, seed=1)) == {"text", "stats"}
    assert renewed(dataclasses.replace(probed, seed=1, n_sequences=3)) == {"text", "stats"}
    read = dataclasses.replace(probed, seed=1, text_paths=(small_text,))
    assert renewed(read) == {"stats"}
    # other weights of the same shapes; another tokenizer; a damaged file; another format
    for path in (model / "model.safetensors", model / "tokenizer.json"):
        os.utime(path, ns=(0, 0))
        assert renewed(read) == {"stats"}, path
    stages.paths["stats"].write_bytes(b"what is left of a disk")
    assert renewed(read) == {"stats"}
    assert renewed(read) == set()
    # a mistake costs nothing
    with pytest.raises(BudgetError):
        renewed(read, bits=0.5, resume=False)
    assert renewed(read) == set()
    assert renewed(read, resume=False) == {"stats"} and not stages.paths["text"].exists()


def test_the_format_of_a_stage_counts(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised when the stage computes something else, and what depends on it is made anew."""
    source = open_source(tiny("qwen3_moe"))
    read = dataclasses.replace(ITSELF, text_paths=(Path(__file__),))
    of_read, of_written = request_digest(source, read), request_digest(source, ITSELF)
    with monkeypatch.context() as patch:
        patch.setattr("moe2gguf.work_folder.TEXT_FORMAT", 99)
        assert request_digest(source, read) != of_read and request_digest(source, ITSELF) != of_written
    with monkeypatch.context() as patch:
        patch.setattr("moe2gguf.work_folder.STATS_FORMAT", 99)
        assert request_digest(source, read) != of_read and request_digest(source, ITSELF) != of_written


def test_what_quantised_layers_depend_on(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(tiny("qwen3_moe"), tmp_path / "model")
    source = open_source(model)
    nothing = np.zeros((0, 0), np.int32)
    stats = CalibrationStats((), "", 0, 0, 0, "f32", nothing, "", "", "a request", layers={}, importance={}, errors={})
    types = {(0, "down", 0): Q.Q3_K, (0, "down", 1): Q.Q4_K}
    matrices = {"layers.0.self_attn.q_proj": Matrix(Q.Q4_K, None)}

    def folder(
        stats: CalibrationStats = stats,
        types: dict = types,
        matrices: dict = matrices,
        device: str = "cpu",
        **changes: object,
    ) -> Path:
        quantizer = dataclasses.replace(Quantizer(), **changes)
        return spool_for(source, tmp_path, torch.device(device), stats, quantizer, types, matrices).folder

    others = [
        folder(affinity="none"),
        folder(router="none"),
        folder(device="cuda"),
        folder(stats=dataclasses.replace(stats, request="another")),
        folder(stats=dataclasses.replace(stats, digest="another")),
        folder(types=types | {(0, "down", 1): Q.Q5_K}),
        folder(matrices={"layers.0.self_attn.q_proj": Matrix(Q.Q5_K, None)}),
    ]
    before = folder()
    monkeypatch.setattr("moe2gguf.work_folder.SPOOL_FORMAT", 99)
    others.append(folder())
    monkeypatch.undo()
    assert len({*others, folder()}) == len(others) + 1
    assert folder() == folder(device="cpu", types=dict(reversed(types.items())))
    # other weights under the same names
    os.utime(model / "model.safetensors", (0, 0))
    assert folder() not in {*others, before}
