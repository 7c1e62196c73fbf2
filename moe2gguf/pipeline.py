"""The stages in order. No printing here: progress and notes go out through callables.

source -> calibrate -> cost table -> allocate -> quantise -> GGUF
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import torch

from moe2gguf.allocate import MAX_GROUPS, Allocation
from moe2gguf.alone import alone_in
from moe2gguf.calibrate import calibrate
from moe2gguf.calibration_text import text_of
from moe2gguf.costs import CANDIDATES, cost_table, module_names, source_digest
from moe2gguf.dtypes import DTYPES, settled
from moe2gguf.ebss import balance
from moe2gguf.encode_experts import describe, encode_experts
from moe2gguf.errors import Moe2ggufError, OutputError
from moe2gguf.experts import CPU
from moe2gguf.fitting import fit_budget, provisional_allocation, report_allocation, speeds_for
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import KeyValues, Target, check_target, write_plain, write_plan
from moe2gguf.imatrix import read_imatrix, with_imatrix
from moe2gguf.interim import remove_interim
from moe2gguf.llama import available_cores
from moe2gguf.provenance import changed_values, provenance
from moe2gguf.prune import n_kept, prune, pruned_folder, shrunk
from moe2gguf.quantize import FilePlan, TensorPlan, plan_file, plan_uniform
from moe2gguf.recipe import Recipe, save_recipe
from moe2gguf.router import calibrate_routers
from moe2gguf.router import describe as describe_routers
from moe2gguf.run import Note, Progress, Run, no_note, no_progress
from moe2gguf.settings import DEFAULT_QUANTIZER, NO_SKIPPING, Budget, Calibration, Choice, Quantizer
from moe2gguf.skip import Skipping
from moe2gguf.source import Source, open_source
from moe2gguf.spool import Outcome, Spool
from moe2gguf.states import remove_left_behind
from moe2gguf.stats import CalibrationStats, save_stats
from moe2gguf.stream import LayerStream
from moe2gguf.streams import Matrices, Matrix, Types
from moe2gguf.text import CalibrationText, load_tokenizer
from moe2gguf.tuning import describe as describe_tuned
from moe2gguf.tuning import tune
from moe2gguf.work_folder import (
    READABLE_TEXT,
    STATS,
    begin_anew,
    request_digest,
    spool_for,
    statistics_at_hand,
    work_folder_for,
)


@dataclasses.dataclass(frozen=True)
class ConvertResult:
    paths: tuple[Path, ...]
    allocation: Allocation
    outcomes: tuple[Outcome, ...]  # of error feedback, empty without
    calibration_text: Path
    recipe: Recipe

    @property
    def path(self) -> Path:
        return self.paths[0]


def convert(
    model: str | Path,
    outfile: Path | None = None,
    *,
    bits: float | None = None,
    size_bytes: int | None = None,
    layout: str = "grouped",
    max_groups: int = MAX_GROUPS,
    types: tuple[QuantType, ...] | None = None,
    overrides: tuple[tuple[str, QuantType], ...] = (),
    allocator: str = "global",
    objective: str = "size",
    calibration: Calibration | None = None,
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    skipping: Skipping = NO_SKIPPING,
    prune_share: float = 0.0,
    device: torch.device = CPU,
    recipe: Recipe | None = None,
    recipe_path: Path | None = None,
    work_folder: Path | None = None,
    resume: bool = True,
    split_max_bytes: int = 0,
    split_max_tensors: int = 0,
    overwrite: bool = False,
    pre_tokenizer: str | None = None,
    model_name: str | None = None,
    metadata_file: Path | None = None,
    n_threads: int | None = None,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> ConvertResult:
    """A checkpoint to a GGUF within the budget: `bits` of all tensors per parameter, or `size_bytes` of the file.

    What an earlier run left in `work_folder` is used again where it answers the same, or with resume=False removed.
    `recipe`, one that was saved, decides in place of all settings but the device and the folder that texts lie in;
    where there is none, the one of this conversion is saved at `recipe_path`.

    Raises BudgetError for bytes that no allowed types make, SourceError for a checkpoint that cannot be read or run,
    OutputError for files that cannot be written, Moe2ggufError for what is asked for and cannot be.
    """
    calibration = calibration or Calibration()
    if recipe is not None:
        calibration, quantizer = recipe.calibration_on(calibration.text_paths), recipe.quantizer
        skipping, prune_share = recipe.skipping, recipe.prune_share
        bits, size_bytes, layout = round(recipe.allocation.bits_per_weight, 2), None, recipe.allocation.layout
    budget, choice = Budget(bits, size_bytes), Choice(layout, max_groups, types, overrides, allocator, objective)
    opened = functools.partial(
        open_source, pre_tokenizer=pre_tokenizer, model_name=model_name, metadata_file=metadata_file
    )
    source = opened(model)
    calibration = settled(calibration, source, device)
    work = work_folder or work_folder_for(source, outfile_for(source, outfile, budget))
    run = Run(work, n_threads or available_cores(), device, progress, note)
    text = text_of(source, calibration, run)
    # what is out of reach and a target that cannot be written are found before the hours of work
    skipping.check(source.n_expert_used)
    if prune_share:
        kept = shrunk(source, n_kept(source, prune_share))
        if recipe is None:
            provisional_allocation(kept, budget, choice)
        if outfile is not None:  # else it is named after the pruned checkpoint
            check_target(Target(outfile_for(kept, outfile, budget), overwrite=overwrite), 0)
        if not resume:
            begin_anew(work)
        folder = pruned_folder(source, prune_share, work)
        prune_to(folder, source, prune_share, calibration, text, run)
        source, run = opened(folder), dataclasses.replace(run, work=folder.parent)
    target = Target(outfile_for(source, outfile, budget), split_max_bytes, split_max_tensors, overwrite)
    provisional = provisional_allocation(source, budget, choice) if recipe is None else recipe.allocation
    check_belongs(source, provisional)
    check_target(target, provisional.tensor_bytes)
    if not resume:
        begin_anew(run.work)

    stats = calibrated(source, calibration, run, text)
    table = cost_table(source, stats, layout=layout, types=types, overrides=overrides)
    if recipe is None:
        speeds = speeds_for(source, choice, run)
        allocation, plan = fit_budget(source, stats, table, budget, choice, skipping, speeds)
        report_allocation(source, table, stats, allocation, choice, note)
        assert plan is not None
    else:
        if another := recipe.check_text(stats):
            note(another)
        allocation, plan = recipe.allocation, plan_file(source, table, recipe.allocation, stats)
    extra_kv = provenance(source, stats, allocation, quantizer, skipping)
    replay = Recipe(source.name, calibration, stats.digest, quantizer, skipping, prune_share, allocation)

    def save() -> None:
        if recipe_path is not None and recipe is None:
            save_recipe(replay, recipe_path)

    paths, outcomes = _quantised(source, stats, plan, quantizer, extra_kv, target, run, before_removal=save)
    return ConvertResult(paths, allocation, outcomes, run.work / READABLE_TEXT, replay)


def write_allocation(
    source: Source,
    stats: CalibrationStats,
    allocation: Allocation,
    target: Target,
    run: Run,
    *,
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    skipping: Skipping = NO_SKIPPING,
    imatrix: Path | None = None,
) -> tuple[Path, ...]:
    """The file of an allocation made before. With an importance matrix from elsewhere, ggml's encoder and that take the
    place of error feedback."""
    check_belongs(source, allocation)
    table = cost_table(source, stats, layout=allocation.layout)
    check_target(target, allocation.tensor_bytes)
    plan = plan_file(source, table, allocation, stats)
    if imatrix is not None:
        plan = with_imatrix(plan, read_imatrix(imatrix), imatrix)
        quantizer = dataclasses.replace(quantizer, feedback=False)
    extra_kv = provenance(source, stats, allocation, quantizer, skipping)
    return _quantised(source, stats, plan, quantizer, extra_kv, target, run)[0]


def check_belongs(source: Source, allocation: Allocation) -> None:
    """Raises Moe2ggufError for an allocation of another model's tensors."""
    table = cost_table(source, None, layout=allocation.layout)
    if (
        allocation.source_sha256 != source_digest(source)
        or set(allocation.types) != {unit.name for unit in table.units}
        or allocation.fixed.keys() != table.fixed.keys()
    ):
        raise Moe2ggufError(f"the allocation belongs to another model than {source.path}; allocate again")


def _quantised(
    source: Source,
    stats: CalibrationStats,
    plan: FilePlan,
    quantizer: Quantizer,
    extra_kv: KeyValues,
    target: Target,
    run: Run,
    before_removal: Callable[[], None] = lambda: None,
) -> tuple[tuple[Path, ...], tuple[Outcome, ...]]:
    """Experts first, layer by layer, then the file, tensor by tensor. `before_removal`: of what it could be made again
    from."""
    for rule, where in (("skip", ""), ("skip_prompt", " in prompts")):
        if f"moe2gguf.{rule}.share" in extra_kv:
            share, kl = (extra_kv[f"moe2gguf.{rule}.{name}"][0] for name in ("share", "kld.predicted"))
            run.note(f"at run time {share:.1%} of the expert activations{where} are left out: {kl:.5f} nats predicted")
            if not plan.is_grouped:
                run.note("it takes the patched runtime to leave them out; others run the file and compute all")
    if not quantizer.feedback:
        paths = write_plan(source, plan, extra_kv, target, run.n_threads, run.progress)
        before_removal()
        return tuple(paths), ()
    types = plan.expert_types(stats.layers)
    modules = module_names(source, stats)
    matrices = {
        modules[tensor.name]: _as_in_the_model(tensor)
        for tensor in plan.tensors
        if tensor.name in modules and tensor.quant_type in CANDIDATES
    }
    spool = spool_for(source, run.work, run.device, stats, quantizer, types, matrices)
    spool.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(spool.folder):
        changed = _fill(source, stats, spool, types, matrices, modules, quantizer, run)
        outcomes = tuple(spool.outcomes())
        extra_kv = extra_kv | changed_values(source, quantizer, changed)
        paths = write_plan(source, plan, extra_kv, target, run.n_threads, run.progress, spool, modules)
        before_removal()
        spool.remove()
    return tuple(paths), outcomes


def _fill(
    source: Source,
    stats: CalibrationStats,
    spool: Spool,
    types: Types,
    matrices: Matrices,
    modules: Mapping[str, str],
    quantizer: Quantizer,
    run: Run,
) -> set[str]:
    """Experts and matrices beside them, then routers, norms and scales: the names of tensors that are not the
    checkpoint's."""
    stream = LayerStream(source.path, DTYPES[stats.dtype], run.device)
    encode_experts(
        stream,
        stats.tokens_SL,
        types,
        spool,
        affinity=quantizer.affinity,
        device=run.device,
        n_threads=run.n_threads,
        progress=run.progress,
        matrices=matrices,
        # where they are the head too they are multiplied with as well
        embedding_moments_2DD=stats.embedding_moments_2DD if "lm_head" in modules.values() else None,
        output_moments=stats.output_moments,
    )
    run.note(describe(spool.outcomes()))
    changed: set[str] = set()
    if quantizer.router != "none":
        calibrate_routers(
            stream,
            stats.tokens_SL,
            types,
            matrices,
            spool,
            n_experts=source.n_expert,
            n_selected=source.n_expert_used,
            device=run.device,
            n_threads=run.n_threads,
            progress=lambda what, done, total: run.progress(f"routers, {what}", done, total),
        )
        routers = spool.routers()
        assert routers is not None
        run.note(describe_routers(routers))
        changed = {f"blk.{layer}.ffn_gate_inp.weight" for layer in routers.router_ED}
    if quantizer.tuning:
        tune(
            source,
            stream,
            stats.tokens_SL,
            types,
            matrices,
            spool,
            seed=stats.seed,
            n_threads=run.n_threads,
            progress=run.progress,
        )
        tuned = spool.tuned()
        assert tuned is not None
        run.note(describe_tuned(tuned))
        changed |= tuned.weights.keys()
    return changed


def _as_in_the_model(tensor: TensorPlan) -> Matrix:
    """With its columns where the model has them."""
    importance_K, columns_K = None if tensor.importance_EK is None else tensor.importance_EK[0], tensor.source.columns_K
    if importance_K is not None and columns_K is not None:
        importance_K = importance_K[columns_K.argsort()]
    return Matrix(tensor.quant_type, importance_K, columns_K is None)


def calibrated(
    source: Source, calibration: Calibration, run: Run, text: Callable[[], CalibrationText] | None = None
) -> CalibrationStats:
    """The statistics in the work folder if they answer the same request, else new ones, saved there. `text` is asked
    for the calibration text where another model is to write it."""
    calibration, path = settled(calibration, source, run.device), run.work / STATS
    request = request_digest(source, calibration)  # of the text before it is read
    try:
        run.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the work folder {run.work}: {error.strerror}; choose another --work") from error

    def at_hand() -> CalibrationStats | None:
        if (stats := statistics_at_hand(source, calibration, run.work)) is not None:
            run.note(f"using the statistics in {path} ({stats.n_tokens:,} tokens of {stats.text})")
        return stats

    if (stats := at_hand()) is not None:
        with suppress(Moe2ggufError), alone_in(run.work):
            remove_interim(run.work)  # there where the run that saved them was killed just then
        return stats
    with alone_in(run.work, lambda: run.note(f"another run calibrates in {run.work}: waiting for it")):
        if (stats := at_hand()) is None:
            stats = _calibrated(source, calibration, request, run, text or text_of(source, calibration, run))
    return stats


def _calibrated(
    source: Source, calibration: Calibration, request: str, run: Run, text: Callable[[], CalibrationText]
) -> CalibrationStats:
    if (path := run.work / STATS).exists():
        run.note(f"the statistics in {path} answer another request: calibrating anew")
    remove_left_behind(run.work)
    found = text()
    tokenizer = load_tokenizer(source.path)
    (run.work / READABLE_TEXT).write_text(
        "\n".join(str(tokenizer.decode(sequence, skip_special_tokens=True)) for sequence in found.tokens_SL),
        encoding="utf-8",
    )
    stats = calibrate(
        stream_of(source, calibration, run.device),
        found,
        CANDIDATES,
        source_sha256=source_digest(source),
        request=request,
        n_probe_tokens=calibration.n_probe_tokens,
        sensitivity=calibration.sensitivity,
        n_threads=run.n_threads,
        seed=calibration.seed,
        scratch_folder=run.work,
        progress=run.progress,
        note=run.note,
    )
    save_stats(stats, path)
    remove_interim(run.work)
    sigma = balance(np.stack([layer.n_tokens_E for layer in stats.layers.values()]))
    run.note(f"the text uses the experts to within σ = {sigma:.4f} of evenly")
    return stats


def prune_to(
    folder: Path,
    source: Source,
    share: float,
    calibration: Calibration,
    text: Callable[[], CalibrationText],
    run: Run,
) -> None:
    """The checkpoint without the share of its experts that matter least, by the calibration text; one run at a time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder.parent}: {error.strerror}; choose another") from error
    stream = functools.partial(stream_of, source, calibration, run.device)
    request = request_digest(source, calibration)
    with alone_in(folder.parent, lambda: run.note(f"another run works in {folder.parent}: waiting for it")):
        prune(source, share, folder, request, stream, text, run.progress, run.note)


def stream_of(source: Source, calibration: Calibration, device: torch.device) -> LayerStream:
    return LayerStream(source.path, DTYPES[calibration.dtype], device)


def outfile_for(source: Source, outfile: Path | None, budget: Budget) -> Path:
    """`--outfile` with its {ftype} filled in, or a name after gguf's convention in the current folder.

    Raises OutputError for what is no name of a file.
    """
    bits = budget.bits if budget.size_bytes is None else round(budget.size_bytes * 8 / source.n_params, 2)
    encoding = f"MQ{bits:g}".replace(".", "_")
    if outfile is not None:
        try:
            return outfile.with_name(gguf.fill_templated_filename(outfile.name, encoding))
        except (KeyError, IndexError, ValueError) as error:
            raise OutputError(f"{outfile} names no file; --outfile takes a name, {{ftype}} in it or not") from error
    meta = source.metadata
    name = gguf.naming_convention(
        meta.name, meta.basename, meta.finetune, meta.version, meta.size_label, encoding, model_type=None
    )
    return Path(f"{name}.gguf")


def write_float(
    model: str | Path,
    outfile: Path,
    *,
    ftype: str = "bf16",
    pre_tokenizer: str | None = None,
    progress: Progress = no_progress,
) -> Path:
    """The checkpoint as a GGUF of one type (bf16, f16, f32, q8_0), a base to compare with."""
    source = open_source(model, pre_tokenizer=pre_tokenizer)
    return write_plain(source, plan_uniform(source, QuantType[ftype.upper()]), outfile, available_cores(), progress)
