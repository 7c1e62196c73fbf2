"""Ours and its peers at equal bytes, measured by llama.cpp's own tools; the record of it is all that a report needs.

A budget is the file of one of llama-quantize's presets: every other method may have as many bytes and no more. All are
calibrated on the same text. Files, statistics and what was measured stay in the folder, and what is unchanged is not
made or measured anew.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe2gguf import __version__, ggml
from moe2gguf.allocators import ALLOCATORS
from moe2gguf.card import sha256_of
from moe2gguf.child import Finished, run_child
from moe2gguf.costs import cost_table
from moe2gguf.errors import BudgetError, Moe2ggufError
from moe2gguf.evaluate import held_out_text
from moe2gguf.fitting import fit_budget
from moe2gguf.gguf_file import file_bytes
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.inspect import inspect_file
from moe2gguf.llama import available_cores, memory_bytes
from moe2gguf.llama_tools import (
    BaseRun,
    Divergence,
    Speed,
    divergence,
    importance_matrix,
    run_base,
    run_llama_bench,
    speed,
)
from moe2gguf.peers import (
    greedy_types,
    measure_classes,
    preset_tensor_bytes,
    quantize_preset,
    quantize_with_types,
    tensor_classes,
)
from moe2gguf.pipeline import write_float
from moe2gguf.provenance import provenance
from moe2gguf.record import (
    METHODS,
    Absent,
    Cost,
    Data,
    ExpertMap,
    Rate,
    Record,
    Row,
    Setting,
    SkipPoint,
    SkipSpeed,
    TaskScore,
    save_record,
)
from moe2gguf.run import Progress, no_progress
from moe2gguf.runtime import find_runtime
from moe2gguf.settings import Budget, Choice
from moe2gguf.source import Source, open_source
from moe2gguf.stats import CalibrationStats, load_stats
from moe2gguf.steps import Steps
from moe2gguf.text import read_text
from moe2gguf.work_folder import READABLE_TEXT, STATS, TEXT, checkpoint_identity

FULL_BITS = (2.1, 2.5, 3.0, 3.5, 4.25)
QUICK_BITS = (2.5, 3.5)
QUICK_METHODS = ("search", "stock", "grouped", "skipping")  # at the second
SKIP_SHARE = 0.15
SKIP_STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
BYTES_APART = 0.005  # a file that leaves more of its bytes unused is not compared
PROBE_CHUNKS = 8
BYTES_PER_TOKEN = 6  # more than any text has, to cut the default text to measure on
# modules that no conversion runs; those of MEASURING make or measure what conversions are compared with
MEASURING = ("llama_tools.py", "peers.py", "evaluate.py", "tasks.py")
APART = {
    *MEASURING,
    "bench.py",
    "card.py",
    "child.py",
    "demo.py",
    "plot.py",
    "record.py",
    "report.py",
    "steps.py",
}

# what `moe2gguf convert` is given; the paper's programs know neither router calibration nor tuning
OURS: dict[str, tuple[str, ...]] = {
    "grouped": ("--layout", "grouped", "--skip", f"{SKIP_SHARE:g}"),
    "stock": ("--layout", "stock"),
    "uniform": ("--allocator", "uniform", "--router", "none", "--no-tune"),
    "pmq": ("--allocator", "pmq", "--router", "none", "--no-tune"),
}


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    model: str
    bits: tuple[float, ...]  # per budget: the preset nearest to it
    methods: tuple[str, ...] = tuple(METHODS)  # for the first budget
    more_methods: tuple[str, ...] = tuple(METHODS)  # for the others
    text: Path | None = None  # held out, to measure on; None: CPython's own
    calibration_texts: tuple[Path, ...] = ()  # none: the model writes its own
    n_sequences: int = 128
    sequence_tokens: int = 512
    n_probe_tokens: int = 2048
    seed: int = 0
    n_ctx: int = 512
    n_chunks: int = 64
    n_rounds: int = 9
    n_threads: int = dataclasses.field(default_factory=available_cores)
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness: its names, or YAML files


@dataclasses.dataclass(frozen=True)
class _File:
    """A file that a method made for a budget."""

    method: str
    budget: str
    path: Path
    sha256: str
    cost: Cost

    @property
    def strength(self) -> float:
        return 1.0 if self.method == "skipping" else 0.0

    @property
    def name(self) -> str:
        """Of its steps."""
        return f"{self.budget}-{self.method}" if self.budget else self.method


def run_bench(
    request: BenchRequest, folder: Path, *, command: str = "", progress: Progress = no_progress
) -> tuple[Record, Path]:
    """The record, which is also folder/bench.json. `command` is what the user typed, for the record."""
    runtime = find_runtime()
    began = time.monotonic()
    folder = folder.resolve()
    bench = _Bench(request, folder, runtime.version, progress)
    base_run = bench.base_run()
    presets = bench.presets()
    files: list[_File] = [bench.base_file]
    absent: list[Absent] = []
    for number, preset in enumerate(presets):
        of_preset = bench.preset_file(preset)
        for method in METHODS:
            if method == "preset":
                files.append(of_preset)
            elif method in (request.more_methods if number else request.methods):
                made = bench.file(method, of_preset)
                if isinstance(made, Absent):
                    absent.append(made)
                else:
                    files.append(made)
    grouped = next((file for file in files if file.method == "grouped"), None)
    if grouped is None:
        reason = next((a.reason for a in absent if a.method == "grouped"), "not among the methods")
        raise Moe2ggufError(f"no grouped file at {', '.join(presets)}: {reason}; change --bits")
    divergences = {file.name: bench.divergence(file, base_run) for file in files[1:]}
    rates = bench.rates(files)
    skip_points, tasks = bench.skip_points(grouped, base_run), bench.task_scores(files)
    record = Record(
        setting=_setting(command, runtime.version, request.n_threads, bench, time.monotonic() - began),
        data=bench.data(),
        base_run=base_run,
        rows=tuple(_row(file, divergences.get(file.name), *rates[file.name]) for file in files),
        absent=tuple(absent),
        shared=dict(bench.shared),
        n_rounds=request.n_rounds,
        skip_file=grouped.path.name,
        skip_points=skip_points,
        experts=_expert_map(grouped.path, bench.stats),
        tasks=tasks,
    )
    path = folder / "bench.json"
    save_record(record, path)
    return record, path


class _Bench:
    """Makes and measures files, each in a step."""

    def __init__(self, request: BenchRequest, folder: Path, runtime_version: str, progress: Progress):
        self.request, self.folder, self.progress = request, folder, progress
        self.files_folder = folder / "files"
        self.files_folder.mkdir(parents=True, exist_ok=True)
        self.steps = Steps(folder / "steps")
        self.shared: dict[str, Cost] = {}
        converting, measuring = _code_digests()
        self.converter = f"{__version__} {converting} {runtime_version}"
        self.referee = f"{__version__} {measuring} {runtime_version}"
        self.source: Source = open_source(request.model)
        self.base = folder / "base.gguf"
        self.logits = folder / "base.kld"
        self.text = folder / "held-out.txt"
        self.imatrix = folder / "imatrix.gguf"
        self.work = folder / "statistics"
        self.model = checkpoint_identity(self.source)
        self.held_out = self._held_out()
        self._calibrate()
        self.stats: CalibrationStats = load_stats(self.work / STATS)
        self.base_file = self._base_file()
        self._importance()

    def _inputs(self, program: str, **more: Any) -> dict[str, Any]:
        return {"program": program, "model": self.model, "threads": self.request.n_threads, **more}

    def _ours(self, *words: object) -> list[object]:
        return [sys.executable, "-m", "moe2gguf.cli", *words]

    def _shown(self, *words: object) -> str:
        """A command as a user would type it in the folder."""
        return shlex.join(
            str(word.relative_to(self.folder))
            if isinstance(word, Path) and word.is_relative_to(self.folder)
            else str(word)
            for word in words
        )

    def _calibration_options(self) -> list[object]:
        request = self.request
        options: list[object] = ["--work", self.work, "--sequences", request.n_sequences]
        options += ["--length", request.sequence_tokens, "--probe-tokens", request.n_probe_tokens]
        options += ["--seed", request.seed, "--threads", request.n_threads]
        for path in request.calibration_texts:
            options += ["--text", path.resolve()]
        return options

    def _calibrate(self) -> None:
        words = ["calibrate", self.request.model, *self._calibration_options()]
        outputs = [self.work / STATS, self.work / READABLE_TEXT]

        def work() -> dict[str, Any]:
            self.progress("moe2gguf calibrate", 0, 0)
            for path in [
                *outputs,
                self.work / TEXT,
            ]:  # a run that was cut off may have left them: their cost would not be known
                path.unlink(missing_ok=True)
            done = run_child(self._ours(*words), self.folder / "moe2gguf.log", what="moe2gguf calibrate")
            return _cost(self._shown("moe2gguf", *words), done)

        inputs = self._inputs(
            self.converter,
            words=[str(word) for word in words],
            texts=[p.resolve() for p in self.request.calibration_texts],
        )
        self.shared["calibration"] = Cost(**self.steps.run("calibrate", inputs, outputs, work))

    def _base_file(self) -> _File:
        def work() -> dict[str, Any]:
            self.progress("the base", 0, 0)
            began = time.monotonic()
            write_float(self.request.model, self.base)
            return {"sha256": sha256_of(self.base), "seconds": time.monotonic() - began}

        made = self.steps.run("base", self._inputs(self.converter), [self.base], work)
        return _File("base", "", self.base, made["sha256"], Cost("", made["seconds"], None))

    def _importance(self) -> None:
        text, n_ctx = self.work / READABLE_TEXT, self.request.sequence_tokens

        def work() -> dict[str, Any]:
            self.progress("llama-imatrix", 0, 0)
            done = importance_matrix(self.base, text, self.imatrix, self.request.n_threads, n_ctx=n_ctx)
            words = ["llama-imatrix", "-m", self.base, "-f", text, "-o", self.imatrix, "-c", n_ctx, "--process-output"]
            return _cost(self._shown(*words), done)

        inputs = self._inputs(self.referee, base=self.base, text=text, n_ctx=n_ctx)
        made = self.steps.run("imatrix", inputs, [self.imatrix], work)
        self.shared["importance matrix"] = Cost(**made)

    def _held_out(self) -> str:
        """The text to measure on."""
        request = self.request
        if request.text:
            return read_text(request.text)
        return held_out_text(request.n_chunks * request.n_ctx * BYTES_PER_TOKEN)

    def base_run(self) -> BaseRun:
        """Also writes the text to measure on, and the base's log-probabilities of it."""
        request = self.request
        held_out = self.held_out + "\n"  # the tools take one newline off
        if not self.text.exists() or self.text.read_text(encoding="utf-8") != held_out:
            self.text.write_text(held_out, encoding="utf-8")

        def work() -> dict[str, Any]:
            self.progress("the base's log-probabilities", 0, 0)
            return dataclasses.asdict(
                run_base(
                    self.base,
                    self.text,
                    self.logits,
                    n_ctx=request.n_ctx,
                    max_chunks=request.n_chunks,
                    n_threads=request.n_threads,
                )
            )

        inputs = self._inputs(
            self.referee, base=self.base, text=self.text, n_ctx=request.n_ctx, n_chunks=request.n_chunks
        )
        return BaseRun(**self.steps.run("base-run", inputs, [self.logits], work))

    def presets(self) -> tuple[str, ...]:
        """For each of the bits wished for the preset nearest to it, fewest bits first, each once."""

        def work() -> dict[str, Any]:
            self.progress("llama-quantize --dry-run", 0, 0)
            return preset_tensor_bytes(self.base, self.folder)

        n_bytes = self.steps.run("presets", self._inputs(self.referee, base=self.base), [], work)
        n_params = self.source.n_params
        nearest = [min(n_bytes, key=lambda p: abs(n_bytes[p] * 8 / n_params - bits)) for bits in self.request.bits]
        return tuple(sorted(dict.fromkeys(nearest), key=lambda preset: n_bytes[preset]))

    def preset_file(self, preset: str) -> _File:
        path = self.files_folder / f"{preset}.gguf"

        def make() -> Cost:
            done = quantize_preset(preset, self.base, self.imatrix, path, self.request.n_threads, self.folder)
            shown = self._shown("llama-quantize", "--imatrix", self.imatrix, self.base, path, preset)
            return Cost(shown, done.seconds, done.peak_rss_bytes)

        return self._made("preset", preset, path, {"base": self.base, "imatrix": self.imatrix}, make)

    def file(self, method: str, preset: _File) -> _File | Absent:
        """In at most the preset's bytes."""
        if method == "skipping":
            grouped = self.file("grouped", preset)
            return grouped if isinstance(grouped, Absent) else dataclasses.replace(grouped, method="skipping")
        found = self._searched(preset) if method == "search" else self._converted(method, preset)
        if isinstance(found, _File):
            used = found.path.stat().st_size / preset.path.stat().st_size
            assert used <= 1
            if used < 1 - BYTES_APART:
                return Absent(method, preset.budget, f"its types fill {used:.1%} of the preset's bytes")
        return found

    def _converted(self, method: str, preset: _File) -> _File | Absent:
        size_bytes = preset.path.stat().st_size
        if reason := self._out_of_reach(method, size_bytes):
            return Absent(method, preset.budget, reason)
        path = self.files_folder / f"{preset.budget}-{method}.gguf"
        words: list[object] = ["convert", self.request.model, "--size", size_bytes, "--outfile", path, *OURS[method]]
        words += [*self._calibration_options(), "--force"]

        def make() -> Cost:
            done = run_child(self._ours(*words), self.folder / "moe2gguf.log", what=f"moe2gguf convert ({method})")
            return Cost(self._shown("moe2gguf", *words), done.seconds, done.peak_rss_bytes)

        stats = self.work / STATS
        return self._made(method, preset.budget, path, {"words": [str(w) for w in words], "stats": stats}, make)

    def _out_of_reach(self, method: str, size_bytes: int) -> str | None:
        """Why there is no file of that size, known before a conversion."""
        choice = Choice(
            layout="stock" if method == "stock" else "grouped",
            allocator=method if method in ALLOCATORS else "global",
        )
        table = cost_table(self.source, self.stats, layout=choice.layout)
        try:
            allocation, plan = fit_budget(self.source, self.stats, table, Budget(size_bytes=size_bytes), choice)
        except Moe2ggufError as error:  # too few bytes, or columns that the method has no types for
            return str(error)
        assert plan is not None
        used = file_bytes(self.source, plan, provenance(self.source, self.stats, allocation)) / size_bytes
        return None if used >= 1 - BYTES_APART else f"its types fill {used:.1%} of the preset's bytes"

    def _searched(self, preset: _File) -> _File | Absent:
        base, of_preset = read_gguf(self.base), read_gguf(preset.path)
        classes = tensor_classes(base, of_preset, self.imatrix)
        text = self.work / READABLE_TEXT

        def probe() -> dict[str, Any]:
            began = time.monotonic()
            found = measure_classes(
                classes,
                self.base,
                self.imatrix,
                text,
                self.folder,
                n_chunks=PROBE_CHUNKS,
                n_ctx=self.request.n_ctx,
                n_threads=self.request.n_threads,
                progress=self.progress,
            )
            kld = {name: {t.name: value for t, value in by_type.items()} for name, by_type in found.items()}
            return {"kld": kld, "seconds": time.monotonic() - began}

        shapes = [[c.name, [t.name for t in c.tensors], [t.name for t in c.ladder]] for c in classes]
        inputs = self._inputs(
            self.referee,
            base=self.base,
            imatrix=self.imatrix,
            text=text,
            n_ctx=self.request.n_ctx,
            n_chunks=PROBE_CHUNKS,
            classes=shapes,
        )
        made = self.steps.run("probes", inputs, [], probe)
        n_probes = sum(len(by_type) for by_type in made["kld"].values())
        shown = f"llama-quantize and llama-perplexity, {n_probes} times on {PROBE_CHUNKS} chunks of calibration text"
        self.shared["search"] = Cost(shown, made["seconds"], None)
        probed = {
            name: {ggml.QuantType[t]: value for t, value in by_type.items()} for name, by_type in made["kld"].items()
        }
        in_classes = {t.name for c in classes for t in c.tensors}
        # the header and what no class holds are as in the preset's file
        available = sum(-(-t.n_bytes // 32) * 32 for t in of_preset.tensors if t.name in in_classes)
        path = self.files_folder / f"{preset.budget}-search.gguf"
        types_file = path.with_suffix(".types.txt")
        try:
            types = greedy_types(classes, probed, available)
        except BudgetError as error:
            return Absent("search", preset.budget, str(error))

        def make() -> Cost:
            done = quantize_with_types(
                types, self.base, self.imatrix, preset.budget, path, types_file, self.request.n_threads, self.folder
            )
            words = ["llama-quantize", "--imatrix", self.imatrix, "--tensor-type-file", types_file, self.base, path]
            return Cost(self._shown(*words, preset.budget), done.seconds, done.peak_rss_bytes)

        chosen = [f"{name}={quant_type.name}" for name, quant_type in types.items()]
        inputs = {"base": self.base, "imatrix": self.imatrix, "types": chosen}
        return self._made("search", preset.budget, path, inputs, make)

    def _made(self, method: str, budget: str, path: Path, inputs: Mapping[str, Any], make: Callable[[], Cost]) -> _File:
        def work() -> dict[str, Any]:
            self.progress(f"{METHODS[method]}, {budget}", 0, 0)
            cost = make()
            return {"sha256": sha256_of(path), "cost": dataclasses.asdict(cost)}

        program = self.converter if method in OURS else self.referee
        made = self.steps.run(f"{budget}-{method}", self._inputs(program, **inputs), [path], work)
        return _File(method, budget, path, made["sha256"], Cost(**made["cost"]))

    def divergence(self, file: _File, base_run: BaseRun) -> Divergence:
        return self._divergence(file, base_run, file.strength, f"{file.name}-divergence")

    def _divergence(self, file: _File, base_run: BaseRun, strength: float, step: str) -> Divergence:
        def work() -> dict[str, Any]:
            self.progress("perplexity and KL divergence", 0, 0)
            found = divergence(
                file.path,
                self.logits,
                base_run,
                n_ctx=self.request.n_ctx,
                n_threads=self.request.n_threads,
                folder=self.folder,
                skip_strength=strength,
            )
            return dataclasses.asdict(found)

        inputs = self._inputs(self.referee, file=file.path, logits=self.logits, strength=strength)
        return Divergence(**self.steps.run(step, inputs, [], work))

    def skip_points(self, file: _File, base_run: BaseRun) -> tuple[SkipPoint, ...]:
        """The thresholds of the file, scaled."""
        points = []
        turns = {f"{strength:g}": (file.path, strength) for strength in SKIP_STRENGTHS}
        rounds = self._rounds(f"{file.budget}-skipping-speed", turns)
        rows = {0.0: "grouped", 1.0: "skipping"}  # measured for their rows
        for strength in SKIP_STRENGTHS:
            step = f"{file.budget}-{rows.get(strength, f'skipping-{strength:g}')}-divergence"
            found = self._divergence(file, base_run, strength, step)
            assert found.skipped is not None
            speed_there = _skip_speed(f"{strength:g}", rounds)
            points.append(SkipPoint(strength, found.skipped, found.kld_mean, speed_there))
        return tuple(points)

    def rates(self, files: Sequence[_File]) -> dict[str, tuple[Rate, Rate]]:
        """Prompt and decode of each file."""
        rounds = self._rounds("speed", {file.name: (file.path, file.strength) for file in files})
        return {file.name: (_rate(file, rounds, "prompt"), _rate(file, rounds, "decode")) for file in files}

    def _rounds(self, step: str, turns: Mapping[str, tuple[Path, float]]) -> list[dict[str, Speed]]:
        """In every round each file, at its strength, has one turn, forwards and backwards."""
        request = self.request

        def work() -> dict[str, Any]:
            rounds: list[dict[str, list[float]]] = []
            for number in range(request.n_rounds):
                speeds = {}
                for name, (path, strength) in list(turns.items())[:: -1 if number % 2 else 1]:
                    self.progress("tokens per second, round", number, request.n_rounds)
                    found = speed(path, n_threads=request.n_threads, folder=self.folder, skip_strength=strength)
                    speeds[name] = [found.prompt, found.decode]
                rounds.append(speeds)
            return {"rounds": rounds}

        inputs = self._inputs(
            self.referee,
            files=[path for path, _ in turns.values()],
            names=list(turns),
            n_rounds=request.n_rounds,
        )
        return [
            {name: Speed(*found) for name, found in speeds.items()}
            for speeds in self.steps.run(step, inputs, [], work)["rounds"]
        ]

    def data(self) -> Data:
        request, stats = self.request, self.stats
        return Data(
            model=self.source.name if request.model != "demo" else "demo",
            n_params=self.source.n_params,
            text=request.text.name
            if request.text
            else f"CPython {platform.python_version()}'s documentation and library",
            text_sha256=hashlib.sha256(self.text.read_bytes()).hexdigest(),
            n_ctx=request.n_ctx,
            calibration_text=stats.text,
            calibration_tokens=stats.n_tokens,
            calibration_digest=stats.digest,
            seed=stats.seed,
        )

    def task_scores(self, files: Sequence[_File]) -> tuple[TaskScore, ...]:
        """Of every file once, skipping off."""
        request = self.request
        if not request.tasks:
            return ()
        try:
            from moe2gguf.tasks import run_tasks
        except ModuleNotFoundError as error:
            raise Moe2ggufError(
                f"--tasks needs lm-evaluation-harness, and {error.name} is missing: pip install 'moe2gguf[tasks]'"
            ) from None
        os.environ["LLAMA_EXPERT_SKIP"] = "0"
        scores: list[TaskScore] = []
        for file in {file.path: file for file in files}.values():

            def work(path: Path = file.path) -> dict[str, Any]:
                self.progress("lm-evaluation-harness", 0, 0)
                found = run_tasks(path, request.tasks, n_ctx=request.n_ctx, n_threads=request.n_threads)
                return {"scores": [dataclasses.asdict(score) for score in found]}

            described = [Path(task) if Path(task).is_file() else task for task in request.tasks]
            inputs = self._inputs(self.referee, file=file.path, tasks=described, n_ctx=request.n_ctx)
            done = self.steps.run(f"{file.name}-tasks", inputs, [], work)
            scores += [TaskScore(**score) for score in done["scores"]]
        return tuple(scores)


def _rate(file: _File, rounds: Sequence[Mapping[str, Speed]], what: str) -> Rate:
    of_preset = _ratio(file.name, f"{file.budget}-preset", rounds, what) if file.budget else None
    return dataclasses.replace(_spread(file.name, rounds, what), of_preset=of_preset)


def _skip_speed(name: str, rounds: Sequence[Mapping[str, Speed]]) -> SkipSpeed:
    return SkipSpeed(
        _spread(name, rounds, "prompt"),
        _spread(name, rounds, "decode"),
        _ratio(name, "0", rounds, "prompt"),
        _ratio(name, "0", rounds, "decode"),
    )


def _spread(name: str, rounds: Sequence[Mapping[str, Speed]], what: str) -> Rate:
    found = [getattr(turns[name], what) for turns in rounds]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return Rate(median, low, high, None)


def _ratio(name: str, other: str, rounds: Sequence[Mapping[str, Speed]], what: str) -> float:
    """The median over the rounds, each a pair of neighbours in time."""
    return statistics.median(getattr(turns[name], what) / getattr(turns[other], what) for turns in rounds)


def _row(file: _File, measured: Divergence | None, prompt: Rate, decode: Rate) -> Row:
    header = read_gguf(file.path)
    return Row(
        method=file.method,
        budget=file.budget,
        file=file.path.name,
        sha256=file.sha256,
        file_bytes=header.file_bytes,
        bits_per_weight=header.bits_per_weight,
        divergence=measured,
        prompt=prompt,
        decode=decode,
        cost=file.cost,
    )


def _cost(command: str, done: Finished) -> dict[str, Any]:
    return dataclasses.asdict(Cost(command, done.seconds, done.peak_rss_bytes))


def _expert_map(path: Path, stats: CalibrationStats) -> ExpertMap:
    layers, bits_LE, share_LE = [], [], []
    for layer in inspect_file(path).layers:
        by_projection = [[ggml.bits_per_weight(t) for t in layer.checkpoint_types(p)] for p in layer.projections]
        n_tokens_E = stats.layers[layer.index].n_tokens_E
        layers.append(layer.index)
        bits_LE.append(tuple(statistics.fmean(bits) for bits in zip(*by_projection, strict=True)))
        share_LE.append(tuple(float(n) for n in n_tokens_E / n_tokens_E.mean()))
    return ExpertMap(path.name, tuple(layers), tuple(bits_LE), tuple(share_LE))


def _setting(command: str, runtime: str, n_threads: int, bench: _Bench, seconds: float) -> Setting:
    about = run_llama_bench(["-m", bench.base, "-p", 1, "-n", 0, "-r", 1, "-t", n_threads], bench.folder)[0]
    return Setting(
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        runtime=runtime,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=", ".join(filter(None, (about["cpu_info"], about["gpu_info"]))),
        backends=about["backends"],
        n_threads=n_threads,
        memory_bytes=memory_bytes(),
        seconds=seconds,
        resumed=bench.steps.n_found > 0,
    )


def _code_digests() -> tuple[str, str]:
    """Of the modules that convert, kernels included, and of those that make and measure what they are compared with."""
    import moe2gguf_kernels

    converting, measuring = hashlib.sha256(), hashlib.sha256()
    for package in (Path(__file__).parent, Path(moe2gguf_kernels.__path__[0])):
        for path in sorted(package.rglob("*.py")):
            if path.name in MEASURING:
                measuring.update(path.read_bytes())
            elif path.name not in APART:
                converting.update(path.read_bytes())
    return converting.hexdigest()[:16], measuring.hexdigest()[:16]
