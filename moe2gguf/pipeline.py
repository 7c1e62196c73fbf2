"""The stages in order. No printing here: progress and notes go out through callables.

source -> calibrate -> cost table -> allocate -> quantise -> GGUF
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import torch

from moe2gguf import __version__
from moe2gguf.allocate import MAX_GROUPS, Allocation, allocate_fast
from moe2gguf.allocators import ALLOCATORS
from moe2gguf.alone import alone_in
from moe2gguf.calibrate import Progress, calibrate
from moe2gguf.costs import CANDIDATES, CostTable, cost_table, module_names, source_digest
from moe2gguf.dtypes import DTYPES, settled
from moe2gguf.ebss import balance, balanced_text
from moe2gguf.encode_experts import describe, encode_experts
from moe2gguf.errors import BudgetError, Moe2ggufError, OutputError
from moe2gguf.experts import CPU
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import KeyValues, Target, check_target, file_bytes, write_gguf
from moe2gguf.imatrix import read_imatrix, with_imatrix
from moe2gguf.interim import PREFIX as INTERIM_PREFIX
from moe2gguf.interim import remove_interim
from moe2gguf.llama import available_cores
from moe2gguf.provenance import changed_values, provenance
from moe2gguf.prune import n_kept, prune, pruned_folder, shrunk
from moe2gguf.quantize import FilePlan, TensorPlan, encode_tensors, plan_file, plan_uniform
from moe2gguf.recipe import Recipe, save_recipe
from moe2gguf.router import calibrate_routers
from moe2gguf.router import describe as describe_routers
from moe2gguf.sample import kv_bytes_per_token, sample_text, writer_type
from moe2gguf.settings import DEFAULT_QUANTIZER, NO_SKIPPING, Budget, Calibration, Choice, Quantizer
from moe2gguf.skip import Skipping
from moe2gguf.source import Source, open_source
from moe2gguf.speeds import Speeds, measured_speeds, with_seconds
from moe2gguf.spool import FORMAT_VERSION as SPOOL_FORMAT
from moe2gguf.spool import Outcome, Spool
from moe2gguf.states import remove_left_behind
from moe2gguf.stats import FORMAT_VERSION as STATS_FORMAT
from moe2gguf.stats import CalibrationStats, load_stats, save_stats
from moe2gguf.stream import LayerStream, check_runs
from moe2gguf.streams import Matrices, Matrix, Types
from moe2gguf.text import FORMAT_VERSION as TEXT_FORMAT
from moe2gguf.text import CalibrationText, load_tokenizer, save_text, text_at_hand, text_from_files
from moe2gguf.tuning import describe as describe_tuned
from moe2gguf.tuning import tune

Note = Callable[[str], None]

# of text, some to fit and some to judge by
MIN_SEQUENCES = 2
# in a work folder
READABLE_TEXT = "calibration.txt"
LEFT_TO_RESUME = (
    "text.safetensors",
    READABLE_TEXT,
    "stats.safetensors",
    "sampling.gguf",
    f"{INTERIM_PREFIX}*",
    "experts-*",
    "pruned-*",
)


def no_progress(what: str, done: int, total: int) -> None:
    pass


def no_note(text: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class ConvertResult:
    paths: tuple[Path, ...]
    allocation: Allocation
    outcomes: tuple[Outcome, ...]  # of error feedback, empty without
    stats_path: Path
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
    """A checkpoint to a GGUF within the budget. What an earlier run left in work_folder is used again if it fits, or
    with resume=False removed. A recipe decides everything else but the device and where its text lies; without one it
    is saved at recipe_path, where that is given."""
    threads = n_threads or available_cores()
    calibration = calibration or Calibration()
    if recipe is not None:
        calibration = recipe.calibration_on(calibration.text_paths)
        quantizer = dataclasses.replace(recipe.quantizer, device=quantizer.device)
        skipping, prune_share = recipe.skipping, recipe.prune_share
        bits, size_bytes, layout = round(recipe.allocation.bits_per_weight, 2), None, recipe.allocation.layout
    budget, choice = Budget(bits, size_bytes), Choice(layout, max_groups, types, overrides, allocator, objective)
    opened = functools.partial(
        open_source, pre_tokenizer=pre_tokenizer, model_name=model_name, metadata_file=metadata_file
    )
    source = opened(model)
    calibration = settled(calibration, source, quantizer.device)
    work = work_folder or work_folder_for(source, outfile_for(source, outfile, budget))
    text = text_of(source, calibration, work, threads, quantizer.device, progress, note)
    # what is out of reach and a target that cannot be written are found before the hours of work
    skipping.check(source.n_expert_used)
    if prune_share:
        kept = shrunk(source, n_kept(source, prune_share))
        if recipe is None:
            provisional_allocation(kept, budget, choice)
        check_target(Target(outfile_for(kept, outfile, budget), overwrite=overwrite), 0)
        if not resume:
            begin_anew(work)
        folder = pruned_folder(source, prune_share, work)
        stream = functools.partial(stream_of, source, calibration, quantizer.device)
        prune(source, prune_share, folder, request_digest(source, calibration), stream, text, progress, note)
        source, work = opened(folder), folder.parent
    target = Target(outfile_for(source, outfile, budget), split_max_bytes, split_max_tensors, overwrite)
    provisional = provisional_allocation(source, budget, choice) if recipe is None else recipe.allocation
    check_belongs(source, provisional)
    check_target(target, provisional.tensor_bytes)
    if not resume:
        begin_anew(work)

    stats = calibrated(
        source, calibration, work, n_threads=threads, device=quantizer.device, text=text, progress=progress, note=note
    )
    table = cost_table(source, stats, layout=layout, types=types, overrides=overrides)
    if recipe is None:
        speeds = speeds_for(source, choice, work, threads, progress)
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

    paths, outcomes = _quantised(
        source, stats, plan, quantizer, extra_kv, target, work, threads, progress, note, before_removal=save
    )
    return ConvertResult(paths, allocation, outcomes, work / "stats.safetensors", work / READABLE_TEXT, replay)


def write_allocation(
    source: Source,
    stats: CalibrationStats,
    allocation: Allocation,
    target: Target,
    n_threads: int,
    *,
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    skipping: Skipping = NO_SKIPPING,
    imatrix: Path | None = None,
    work_folder: Path | None = None,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> tuple[Path, ...]:
    """The file of an allocation made before. What is quantised before a crash is kept in work_folder  [default: the
    target's]. With an importance matrix from elsewhere, ggml's encoder and that take the place of error feedback."""
    check_belongs(source, allocation)
    table = cost_table(source, stats, layout=allocation.layout)
    check_target(target, allocation.tensor_bytes)
    plan = plan_file(source, table, allocation, stats)
    if imatrix is not None:
        plan = with_imatrix(plan, read_imatrix(imatrix), imatrix)
        quantizer = dataclasses.replace(quantizer, feedback=False)
    extra_kv = provenance(source, stats, allocation, quantizer, skipping)
    work = work_folder or target.path.parent
    return _quantised(source, stats, plan, quantizer, extra_kv, target, work, n_threads, progress, note)[0]


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
    work: Path,
    n_threads: int,
    progress: Progress,
    note: Note,
    before_removal: Callable[[], None] = lambda: None,
) -> tuple[tuple[Path, ...], tuple[Outcome, ...]]:
    """Experts first, layer by layer, then the file, tensor by tensor. `before_removal`: of what it could be made again
    from."""
    for rule, where in (("skip", ""), ("skip_prompt", " in prompts")):
        if f"moe2gguf.{rule}.share" in extra_kv:
            share, kl = (extra_kv[f"moe2gguf.{rule}.{name}"][0] for name in ("share", "kld.predicted"))
            note(f"at run time {share:.1%} of the expert activations{where} are left out: {kl:.5f} nats predicted")
            if not plan.is_grouped:
                note("it takes the patched runtime to leave them out; others run the file and compute all")
    if not quantizer.feedback:
        paths = _write(source, plan, extra_kv, target, n_threads, progress)
        before_removal()
        return tuple(paths), ()
    types = plan.expert_types(stats.layers)
    modules = module_names(source, stats)
    matrices = {
        modules[tensor.name]: _as_in_the_model(tensor)
        for tensor in plan.tensors
        if tensor.name in modules and tensor.quant_type in CANDIDATES
    }
    spool = spool_for(source, work, stats, quantizer, types, matrices)
    spool.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(spool.folder):
        changed = _fill(source, stats, spool, types, matrices, modules, quantizer, n_threads, progress, note)
        outcomes = tuple(spool.outcomes())
        extra_kv = extra_kv | changed_values(source, quantizer, changed)
        paths = _write(source, plan, extra_kv, target, n_threads, progress, spool, modules)
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
    n_threads: int,
    progress: Progress,
    note: Note,
) -> set[str]:
    """Experts and matrices beside them, then routers, norms and scales: the names of tensors that are not the
    checkpoint's."""
    stream = LayerStream(source.path, DTYPES[stats.dtype], quantizer.device)
    encode_experts(
        stream,
        stats.tokens_SL,
        types,
        spool,
        affinity=quantizer.affinity,
        device=quantizer.device,
        n_threads=n_threads,
        progress=progress,
        matrices=matrices,
        # where they are the head too they are multiplied with as well
        embedding_moments_2DD=stats.embedding_moments_2DD if "lm_head" in modules.values() else None,
        output_moments=stats.output_moments,
    )
    note(describe(spool.outcomes()))
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
            device=quantizer.device,
            n_threads=n_threads,
            progress=lambda what, done, total: progress(f"routers, {what}", done, total),
        )
        routers = spool.routers()
        assert routers is not None
        note(describe_routers(routers))
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
            n_threads=n_threads,
            progress=progress,
        )
        tuned = spool.tuned()
        assert tuned is not None
        note(describe_tuned(tuned))
        changed |= tuned.weights.keys()
    return changed


def _as_in_the_model(tensor: TensorPlan) -> Matrix:
    """With its columns where the model has them."""
    importance_K, columns_K = None if tensor.importance_EK is None else tensor.importance_EK[0], tensor.source.columns_K
    if importance_K is not None and columns_K is not None:
        importance_K = importance_K[columns_K.argsort()]
    return Matrix(tensor.quant_type, importance_K, columns_K is None)


def spool_for(
    source: Source, work: Path, stats: CalibrationStats, quantizer: Quantizer, types: Types, matrices: Matrices
) -> Spool:
    """Of its own for all that its bytes depend on."""
    recipe = [
        __version__,
        SPOOL_FORMAT,
        stats.request,
        stats.digest,
        checkpoint_identity(source),
        quantizer.affinity,
        quantizer.device.type,
        quantizer.router,
        quantizer.tuning,
        sorted(map(str, types.items())),
        sorted((name, matrix.quant_type.name) for name, matrix in matrices.items()),
    ]
    remove_left_behind(work)
    return Spool(work / f"experts-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}")


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
    return _write_plain(source, plan_uniform(source, QuantType[ftype.upper()]), outfile, available_cores(), progress)


def calibrated(
    source: Source,
    calibration: Calibration,
    work: Path,
    *,
    n_threads: int,
    device: torch.device = CPU,
    text: Callable[[], CalibrationText] | None = None,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> CalibrationStats:
    """The statistics in `work` if they answer the same request, else new ones, saved there. `text` is asked for the
    calibration text where another model is to write it."""
    calibration, path = settled(calibration, source, device), work / "stats.safetensors"
    request = request_digest(source, calibration)  # of the text before it is read
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the work folder {work}: {error.strerror}; choose another --work") from error

    def at_hand() -> CalibrationStats | None:
        if (stats := statistics_at_hand(source, calibration, work)) is not None:
            note(f"using the statistics in {path} ({stats.n_tokens:,} tokens of {stats.text})")
        return stats

    if (stats := at_hand()) is not None:
        with suppress(Moe2ggufError), alone_in(work):
            remove_interim(work)  # there where the run that saved them was killed just then
        return stats
    with alone_in(work, lambda: note(f"another run calibrates in {work}: waiting for it")):
        if (stats := at_hand()) is None:
            stats = _calibrated(source, calibration, request, work, n_threads, device, text, progress, note)
    return stats


def _calibrated(
    source: Source,
    calibration: Calibration,
    request: str,
    work: Path,
    n_threads: int,
    device: torch.device,
    text: Callable[[], CalibrationText] | None,
    progress: Progress,
    note: Note,
) -> CalibrationStats:
    if (path := work / "stats.safetensors").exists():
        note(f"the statistics in {path} answer another request: calibrating anew")
    remove_left_behind(work)
    found = (text or text_of(source, calibration, work, n_threads, device, progress, note))()
    tokenizer = load_tokenizer(source.path)
    (work / READABLE_TEXT).write_text(
        "\n".join(str(tokenizer.decode(sequence, skip_special_tokens=True)) for sequence in found.tokens_SL),
        encoding="utf-8",
    )
    stats = calibrate(
        stream_of(source, calibration, device),
        found,
        CANDIDATES,
        source_sha256=source_digest(source),
        request=request,
        n_probe_tokens=calibration.n_probe_tokens,
        sensitivity=calibration.sensitivity,
        n_threads=n_threads,
        seed=calibration.seed,
        scratch_folder=work,
        progress=progress,
        note=note,
    )
    save_stats(stats, path)
    remove_interim(work)
    sigma = balance(np.stack([layer.n_tokens_E for layer in stats.layers.values()]))
    note(f"the text uses the experts to within σ = {sigma:.4f} of evenly")
    return stats


def stream_of(source: Source, calibration: Calibration, device: torch.device) -> LayerStream:
    return LayerStream(source.path, DTYPES[calibration.dtype], device)


def statistics_at_hand(source: Source, calibration: Calibration, work: Path) -> CalibrationStats | None:
    """The statistics in `work`, if there are any and they answer this request."""
    try:
        stats = load_stats(work / "stats.safetensors")
    except Moe2ggufError:  # none, or of another version
        return None
    return stats if stats.request == request_digest(source, calibration) else None


def provisional_allocation(source: Source, budget: Budget, choice: Choice) -> Allocation:
    """What fits the budget where all weights count alike. Raises BudgetError where nothing does."""
    table = cost_table(source, None, layout=choice.layout, types=choice.types, overrides=choice.overrides)
    return fit_budget(source, None, table, budget, choice)[0]


def speeds_for(
    source: Source, choice: Choice, work: Path, n_threads: int, progress: Progress = no_progress, *, save: bool = True
) -> Speeds | None:
    """What the objective asks to be measured; kept in `work`."""
    return (
        measured_speeds(source, n_threads, work, save=save, progress=progress) if choice.objective == "speed" else None
    )


def fit_budget(
    source: Source,
    stats: CalibrationStats | None,
    table: CostTable,
    budget: Budget,
    choice: Choice,
    skipping: Skipping = NO_SKIPPING,
    speeds: Speeds | None = None,
) -> tuple[Allocation, FilePlan | None]:
    """The best allocation within the budget, and the plan of its file (none without statistics). `speeds` are those of
    the objective."""

    def best(tensor_bytes: int) -> Allocation:
        if speeds is not None and stats is not None:
            found = allocate_fast(with_seconds(table, speeds, stats), tensor_bytes, max_groups=choice.max_groups)
        else:
            found = ALLOCATORS[choice.allocator](table, stats, tensor_bytes, choice.max_groups)
        return dataclasses.replace(
            found,
            source_sha256=source_digest(source),
            recipe=_recipe(budget, choice, stats, speeds),
        )

    if budget.bits is not None:
        allocation = best(int(budget.bits * source.n_params / 8))
        return allocation, None if stats is None else plan_file(source, table, allocation, stats)
    assert budget.size_bytes is not None
    tensor_bytes = budget.size_bytes - file_bytes(source, FilePlan((), {}), {})
    if stats is None:
        return best(tensor_bytes), None
    # the header grows with the number of groups, which only an allocation tells
    for _ in range(8):
        allocation = best(tensor_bytes)
        plan = plan_file(source, table, allocation, stats)
        total = file_bytes(source, plan, provenance(source, stats, allocation, skipping=skipping))
        if total <= budget.size_bytes:
            return allocation, plan
        tensor_bytes = allocation.tensor_bytes - (total - budget.size_bytes)
    raise BudgetError(f"no allocation makes a file of at most {budget.size_bytes:,} bytes; raise --size")


def report_allocation(
    source: Source,
    table: CostTable,
    stats: CalibrationStats,
    allocation: Allocation,
    choice: Choice,
    note: Note,
) -> None:
    """What a user should know about the allocation and would not guess."""
    if allocation.layout != choice.layout:
        note(
            f"{source.name} chooses experts through groups or a table of ids, so they keep their order: "
            "one type per projection of a layer"
        )
    if table.small_block_units:
        note(
            f"{len(table.small_block_units)} matrices have columns that are no multiple of 256 and use types with "
            f"blocks of 32 (first: {table.small_block_units[0]})"
        )
    cold = {layer: int((expert.n_tokens_E < 32).sum()) for layer, expert in stats.layers.items()}
    if sum(cold.values()):
        worst = max(cold, key=lambda layer: cold[layer])
        note(
            f"{sum(cold.values())} experts saw fewer than 32 calibration tokens (most in layer {worst}: "
            f"{cold[worst]}); their importance leans on the layer's average"
        )
    if allocation.tensor_bytes < 0.995 * allocation.budget_bytes:
        what = "the types allowed fill" if choice.objective == "size" else "the fastest types within a tenth fill"
        note(f"{what} {allocation.tensor_bytes:,} of {allocation.budget_bytes:,} bytes")


def _recipe(budget: Budget, choice: Choice, stats: CalibrationStats | None, speeds: Speeds | None) -> str:
    recipe: dict[str, object] = {
        "budget": budget.describe(),
        "layout": choice.layout,
        "allocator": choice.allocator,
        "objective": choice.objective,
        "max_groups": choice.max_groups,
        "types": [t.name for t in choice.types or CANDIDATES],
        "overrides": [[pattern, t.name] for pattern, t in choice.overrides],
    }
    if stats is not None:
        recipe["calibration"] = {
            "text": stats.text,
            "tokens": stats.n_tokens,
            "probe_tokens": stats.n_probe_tokens,
        }
    if speeds is not None:
        recipe["speeds"] = speeds.as_json()
    return json.dumps(recipe, sort_keys=True)


def outfile_for(source: Source, outfile: Path | None, budget: Budget) -> Path:
    """`--outfile` with its {ftype} filled in, or a name after gguf's convention in the current folder."""
    bits = budget.bits if budget.size_bytes is None else round(budget.size_bytes * 8 / source.n_params, 2)
    encoding = f"MQ{bits:g}".replace(".", "_")
    if outfile is not None:
        return outfile.with_name(gguf.fill_templated_filename(outfile.name, encoding))
    meta = source.metadata
    name = gguf.naming_convention(
        meta.name, meta.basename, meta.finetune, meta.version, meta.size_label, encoding, model_type=None
    )
    return Path(f"{name}.gguf")


def work_folder_for(source: Source, target: Path) -> Path:
    """One folder for all budgets of a model, beside its files."""
    return target.parent / f"{source.label}.moe2gguf"


def begin_anew(work: Path) -> None:
    """Without what earlier runs left; how fast this machine is stays known."""
    if not work.is_dir():
        return
    with alone_in(work):
        for pattern in LEFT_TO_RESUME:
            for path in work.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def text_of(
    source: Source,
    calibration: Calibration,
    work: Path,
    n_threads: int,
    device: torch.device,
    progress: Progress,
    note: Note,
) -> Callable[[], CalibrationText]:
    """The calibration text, read or written by the model when it is first asked for. Raises Moe2ggufError where it
    would be overwritten, or removed with what earlier runs left, or calibration could not make use of it."""
    check_runs(source.path)
    load_tokenizer(source.path)
    for path in calibration.text_paths:
        if path.resolve() == (work / READABLE_TEXT).resolve():
            raise Moe2ggufError(f"{path} is where the text that was used is written; give a copy, or another --work")
    return functools.cache(lambda: _calibration_text(source, calibration, work, n_threads, device, progress, note))


def sequence_length(source: Source, calibration: Calibration) -> int:
    """Tokens of a sequence of text: no more than the model takes."""
    return min(calibration.sequence_tokens, source.hparams.get("max_position_embeddings", calibration.sequence_tokens))


def _calibration_text(
    source: Source,
    calibration: Calibration,
    work: Path,
    n_threads: int,
    device: torch.device,
    progress: Progress,
    note: Note,
) -> CalibrationText:
    length, wanted = sequence_length(source, calibration), calibration.n_sequences
    if wanted < MIN_SEQUENCES:
        raise Moe2ggufError(f"{wanted} sequence of text: at least {MIN_SEQUENCES} are needed, one is held out")
    if calibration.text_paths:
        found = text_from_files(calibration.text_paths, source.path, wanted, length)
        if (n := len(found.tokens_SL)) < MIN_SEQUENCES:
            raise Moe2ggufError(
                f"the calibration text has {n} sequence of {length} tokens, at least {MIN_SEQUENCES} are needed, of "
                "which one is held out; give more --text or a smaller --length"
            )
        if n < wanted:
            note(f"the calibration text has {n} sequences of {length} tokens, {wanted} were asked for")
        return found
    path, request = work / "text.safetensors", _text_request(source, calibration, length)
    if (at_hand := text_at_hand(request, path)) is not None:
        note(f"using the text in {path}, which the model wrote before")
        return at_hand
    found = _written_text(source, calibration, length, work, n_threads, device, progress, note)
    save_text(found, request, path)
    return found


def _written_text(
    source: Source,
    calibration: Calibration,
    length: int,
    work: Path,
    n_threads: int,
    device: torch.device,
    progress: Progress,
    note: Note,
) -> CalibrationText:
    """By the model itself."""
    writer = work / "sampling.gguf"
    _write_plain(source, plan_uniform(source, QuantType.Q8_0, writer_type(source)), writer, n_threads, progress)
    kv_bytes = kv_bytes_per_token(source)
    try:
        if calibration.writer == "ebss":
            balanced = balanced_text(
                writer,
                calibration.n_sequences,
                length,
                n_experts=source.n_expert,
                n_selected=source.n_expert_used,
                kv_bytes_per_token=kv_bytes,
                n_threads=n_threads,
                on_gpu=device != CPU,
                seed=calibration.seed,
                progress=lambda done, total: progress("the model writes balanced calibration text", done, total),
            )
            note(f"self-sampled texts rejected because they repeat themselves: {balanced.n_rejected}")
            return balanced.text
        return sample_text(
            writer,
            calibration.n_sequences,
            length,
            kv_bytes_per_token=kv_bytes,
            n_threads=n_threads,
            on_gpu=device != CPU,
            seed=calibration.seed,
            progress=lambda done, total: progress("the model writes calibration text", done, total),
        )
    finally:
        writer.unlink(missing_ok=True)


def _write(
    source: Source,
    plan: FilePlan,
    extra_kv: KeyValues,
    target: Target,
    n_threads: int,
    progress: Progress,
    spool: Spool | None = None,
    modules: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    encoded = encode_tensors(
        plan, n_threads, lambda name, done, total: progress(f"write {name}", done, total), spool, modules
    )
    return write_gguf(source, plan, encoded, extra_kv, target)


def _write_plain(source: Source, plan: FilePlan, outfile: Path, n_threads: int, progress: Progress) -> Path:
    target = Target(outfile, overwrite=True)
    check_target(target, plan.tensor_bytes)
    return _write(source, plan, {}, target, n_threads, progress)[0]


WEIGHTS_AND_WORDS = ("*.safetensors", "tokenizer*", "vocab*", "merges*", "special_tokens*")


def checkpoint_identity(source: Source) -> str:
    """Weights and tokenizer count as changed when the size or time of a file is: to read them all takes minutes."""
    files = sorted(file for pattern in WEIGHTS_AND_WORDS for file in source.path.glob(pattern))
    return f"{source_digest(source)} {[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]}"


def request_digest(source: Source, calibration: Calibration) -> str:
    """sha256 over everything the statistics depend on.

    Of the program that is its version and the number of the stage's format, which is raised when the stage computes
    something else; a digest of the sources would throw hours of work away for a comment.
    """
    digest = hashlib.sha256(
        f"{__version__} {STATS_FORMAT} {checkpoint_identity(source)} {[t.name for t in CANDIDATES]}".encode()
    )
    digest.update(f"{TEXT_FORMAT}".encode())
    for path in calibration.text_paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise Moe2ggufError(f"cannot read the calibration text {path}: {error.strerror}") from error
    digest.update(repr(dataclasses.replace(calibration, text_paths=())).encode())
    return digest.hexdigest()


def _text_request(source: Source, calibration: Calibration, length: int) -> str:
    """sha256 over everything that a text by the model depends on."""
    options = calibration.writer, calibration.n_sequences, length, calibration.seed
    return hashlib.sha256(f"{__version__} {TEXT_FORMAT} {checkpoint_identity(source)} {options}".encode()).hexdigest()
