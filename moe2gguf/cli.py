"""The command line: one command per stage, in the order of the pipeline."""

import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe2gguf import __version__
from moe2gguf.errors import Moe2ggufError
from moe2gguf.llama import available_cores
from moe2gguf.runtime.command import runtime

console = Console()

# what may be said to `convert` along with a recipe to replay
BESIDE_A_RECIPE = {
    *("model", "recipe_path", "text_paths", "work_folder", "resume", "device_name", "threads", "dry_run"),
    *("outfile", "split_max_size", "split_max_tensors", "force", "model_name", "metadata", "pre_tokenizer"),
}


# torch's, and where a disk is full safetensors'
SAID_OF = {
    "OutOfMemoryError": "the GPU's memory does not hold it ({}); take --dtype bf16, in which a layer is half as large, "
    "or --device cpu",
    "SafetensorError": "a file of weights or statistics cannot be written or read ({}); make room there",
}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class _Group(click.Group):
    """Prints a user's mistake as one sentence, exit code 1. Usage errors are click's, exit code 2."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the pipeline

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except Moe2ggufError as error:
            click.echo(f"moe2gguf: {error}", err=True)
            context.exit(1)
        except BrokenPipeError:
            # who reads our output has seen enough; nor is there anybody for what is left of it in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(128 + signal.SIGPIPE)
        except OSError as error:
            # a disk that fills up or a folder that cannot be written; OSError names the file
            click.echo(f"moe2gguf: {error}", err=True)
            context.exit(1)
        except Exception as error:
            # of libraries that commands which do without do not load
            if (said := SAID_OF.get(type(error).__name__)) is None:
                raise
            click.echo(f"moe2gguf: {said.format(_first_line(error))}. What is done already is kept", err=True)
            context.exit(1)
        except KeyboardInterrupt:
            click.echo("moe2gguf: interrupted; statistics already written are kept", err=True)
            context.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="moe2gguf")
@click.option("--verbose", is_flag=True, help="Show what the libraries underneath have to say.")
def main(verbose: bool) -> None:
    """Compress a Hugging Face Mixture-of-Experts model into the best GGUF at a given size.

    MODEL is a checkpoint folder, a Hub id such as Qwen/Qwen3-30B-A3B, or "demo" for the model that comes along.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)


class _Size(click.ParamType):
    """4500000000, 12GiB, 4.5G, 700M: the G of split sizes is 10^9, as llama.cpp has it; GiB is 2^30."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG])(iB|B)?)?", value)
        if match is None:
            self.fail(f"{value!r} is not a size like 12GiB, 4.5G or 700M", param, context)
        power = {None: 0, "K": 1, "M": 2, "G": 3}[match[2]]
        return int(float(match[1]) * (1024 if match[3] == "iB" else 1000) ** power)


class _Type(click.ParamType):
    """A ggml type that calibration measures."""

    name = "type"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        from moe2gguf.costs import CANDIDATES

        for candidate in CANDIDATES:
            if candidate.name == value.upper():
                return candidate
        self.fail(f"{value!r} is not one of {', '.join(t.name for t in CANDIDATES)}", param, context)


class _Override(_Type):
    """REGEX=TYPE, as llama-quantize's --tensor-type."""

    name = "regex=type"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        pattern, separator, quant_type = value.rpartition("=")
        if not separator:
            self.fail(f"{value!r} is not REGEX=TYPE", param, context)
        try:
            re.compile(pattern)
        except re.error as error:
            self.fail(f"{pattern!r} is not a regular expression: {error}", param, context)
        return pattern, super().convert(quant_type, param, context)


def _together(*options: Callable) -> Callable:
    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)

naming_options = _together(
    click.option("--model-name", help="Name to write, instead of the one derived from the checkpoint."),
    click.option("--metadata", type=_existing_file, help="JSON that overrides authorship metadata."),
    click.option("--pre-tokenizer", help="llama.cpp's name of the pre-tokenizer, where it cannot be recognised."),
)
model_options = _together(click.argument("model"), naming_options)
calibration_options = _together(
    click.option(
        "--text",
        "text_paths",
        type=_existing_file,
        multiple=True,
        help="Calibration text; repeatable. Without it the model writes its own.",
    ),
    click.option(
        "--calib",
        type=click.Choice(["ebss", "sample"]),
        default="ebss",
        show_default=True,
        help="How the model writes it: beams that use the experts evenly, or plain sampling in half the time.",
    ),
    click.option("--sequences", default=128, show_default=True, type=click.IntRange(min=2), help="Sequences of text."),
    click.option("--length", default=512, show_default=True, type=click.IntRange(min=16), help="Tokens of each."),
    click.option(
        "--probe-tokens",
        default=2048,
        show_default=True,
        type=click.IntRange(min=16),
        help="Tokens of text on which the model's sensitivity is probed.",
    ),
    click.option(
        "--sensitivity",
        type=click.Choice(["gradient", "probe"]),
        default="gradient",
        show_default=True,
        help="How a layer's experts compare: by their output errors weighed by the loss's gradient, or by these alone. "
        "Gradients also let an expert's rows make up for each other's errors.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "f32", "bf16"]),
        default="auto",
        show_default=True,
        help="What the model is run in. auto: bf16 for models of a billion parameters or more stored in it, where the "
        "device is faster so; else f32.",
    ),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all sampling."),
    click.option(
        "--work",
        "work_folder",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for the statistics, which later runs use again  [default: MODEL.moe2gguf beside the output].",
    ),
    click.option(
        "--resume/--no-resume",
        default=True,
        show_default=True,
        help="Go on from the text, statistics and layers that earlier runs left in that folder, or remove these first.",
    ),
)
budget_options = _together(
    click.option(
        "--bits",
        "--target-bpw",
        type=click.FloatRange(min=0, min_open=True),
        help="Stored bits of all tensors per parameter.",
    ),
    click.option("--size", "--target-size", "size_bytes", type=_Size(), help="Size of the whole file, such as 12GiB."),
    click.option(
        "--layout",
        type=click.Choice(["grouped", "stock"]),
        default="grouped",
        show_default=True,
        help="A type per expert (needs the patched runtime), or per tensor (runs everywhere).",
    ),
    click.option(
        "--max-groups",
        default=7,
        show_default=True,
        type=click.IntRange(1, 7),
        help="Most runs of one type that a layer's experts may form.",
    ),
    click.option(
        "--allocator",
        type=click.Choice(["global", "pmq", "uniform"]),
        default="global",
        show_default=True,
        help="One program over the whole model; MC-MoE's, layer by layer; one type for all experts.",
    ),
    click.option(
        "--objective",
        type=click.Choice(["size", "speed"]),
        default="size",
        show_default=True,
        help="Least KL divergence in the bytes; or, for up to a tenth more, the fastest decoding on this CPU.",
    ),
    click.option(
        "--types",
        type=_Type(),
        multiple=True,
        help="Allow only these types, such as IQ2_XXS; repeatable  [default: all; an unknown name lists them].",
    ),
    click.option(
        "--tensor-type", type=_Override(), multiple=True, help="Pin the type of tensors whose name matches; repeatable."
    ),
    click.option("--output-tensor-type", type=_Type(), help="Pin the type of output.weight."),
    click.option("--token-embedding-type", type=_Type(), help="Pin the type of token_embd.weight."),
)
output_options = _together(
    click.option(
        "--outfile",
        type=click.Path(path_type=Path),
        help="File to write; {ftype} in it is filled in  [default: a name by GGUF's convention, here].",
    ),
    click.option("--split-max-size", type=_Size(), default=0, help="Cut into files of at most N(M|G)."),
    click.option("--split-max-tensors", type=click.IntRange(min=0), default=0, help="Cut after so many tensors."),
    click.option("--force", is_flag=True, help="Replace an existing file."),
)
quantizer_options = _together(
    click.option(
        "--feedback/--no-feedback",
        default=True,
        show_default=True,
        help="Matrices with error feedback, or by ggml's encoder alone: faster, and without --router and --tune.",
    ),
    click.option(
        "--affinity",
        type=click.Choice(["none", "gate", "gate2"]),
        default="gate",
        show_default=True,
        help="What a token weighs in its experts: 1, its gate weight, or that squared.",
    ),
    click.option(
        "--router",
        type=click.Choice(["qesc", "none"]),
        default="qesc",
        show_default=True,
        help="Routers calibrated to what the quantised model gives them, or as they are.",
    ),
    click.option(
        "--tune/--no-tune",
        "tuning",
        default=True,
        show_default=True,
        help="Descent on the KL divergence over routers, norms and the scales of blocks, when all is quantised.",
    ),
)
device_option = click.option(
    "--device",
    "device_name",
    default="auto",
    show_default=True,
    help="Where the model is run and error feedback computes: auto, cpu, cuda or cuda:1 (pip install 'moe2gguf[gpu]').",
)
_share = click.FloatRange(min=0, max=1, max_open=True)
skip_options = _together(
    click.option(
        "--skip",
        type=_share,
        default=0.0,
        help="Share of expert activations to leave out at run time, those of small gate weight  [default: none].",
    ),
    click.option(
        "--skip-prompt",
        type=_share,
        default=0.0,
        help="Share to leave out in prompts, of experts that the prompt seldom selects  [default: none].",
    ),
)
prune_option = click.option(
    "--prune-experts",
    "prune_share",
    type=_share,
    default=0.0,
    help="Share of each layer's experts to leave out of the file for good, those that matter least  [default: none].",
)
recipe_option = click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A recipe to replay, which decides everything; if it is not there, the file to save this one's to.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="Threads  [default: all cores].")


def _overrides(options: dict[str, Any]) -> tuple:
    pinned = tuple(options["tensor_type"])
    if options["output_tensor_type"]:
        pinned += ((r"^output\.weight$", options["output_tensor_type"]),)
    if options["token_embedding_type"]:
        pinned += ((r"^token_embd\.weight$", options["token_embedding_type"]),)
    return pinned


def _budget(options: dict[str, Any]):
    from moe2gguf.settings import Budget

    if (options["bits"] is None) == (options["size_bytes"] is None):
        raise click.UsageError("give either --bits or --size")
    return Budget(options["bits"], options["size_bytes"])


def _choice(options: dict[str, Any]):
    from moe2gguf.settings import Choice

    types, overrides = options["types"] or None, _overrides(options)
    return Choice(
        options["layout"], options["max_groups"], types, overrides, options["allocator"], options["objective"]
    )


def _quantizer(options: dict[str, Any]):
    from moe2gguf.settings import Quantizer

    if options["feedback"]:
        return Quantizer(True, options["affinity"], options["router"], options["tuning"])
    for name, asked, option in (
        ("router", options["router"] != "none", f"--router {options['router']}"),
        ("tuning", options["tuning"], "--tune"),
    ):
        if asked and _is_typed(name):
            raise click.UsageError(f"{option} comes after error feedback; leave it or --no-feedback out")
    return Quantizer(False, options["affinity"], "none", False)


def _is_typed(name: str) -> bool:
    """Whether an option is on the command line."""
    return click.get_current_context().get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE


def _device(options: dict[str, Any]):
    from moe2gguf.backend import device

    return device(options["device_name"], _note)


def _calibration(options: dict[str, Any]):
    from moe2gguf.settings import Calibration

    if options["text_paths"] and _is_typed("calib"):
        raise click.UsageError(
            "--calib is how the model writes its own text, and --text is another; leave one of them out"
        )
    return Calibration(
        text_paths=options["text_paths"],
        writer=options["calib"],
        n_sequences=options["sequences"],
        sequence_tokens=options["length"],
        n_probe_tokens=options["probe_tokens"],
        sensitivity=options["sensitivity"],
        dtype=options["dtype"],
        seed=options["seed"],
    )


@contextmanager
def progress_display() -> Iterator[Callable[[str, int, int], None]]:
    """One live line on a terminal; elsewhere a line whenever the work at hand changes."""
    err = Console(stderr=True)
    if not err.is_terminal:
        said: list[str] = []

        def say(what: str, done: int, total: int) -> None:
            stage = re.sub(r" (blk\.\d+\.|token_embd|output)\S*", " tensors", what)
            if said[-1:] != [stage]:
                said.append(stage)
                click.echo(stage, err=True)

        yield say
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


@main.command(short_help="Convert a checkpoint to a GGUF, all stages in one go.")
@model_options
@budget_options
@calibration_options
@quantizer_options
@device_option
@skip_options
@prune_option
@recipe_option
@output_options
@threads_option
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.pass_context
def convert(context: click.Context, model: str, dry_run: bool, recipe_path: Path | None, **options: Any) -> None:
    """Convert MODEL to a GGUF of the given bits or size: all stages in one go.

    Statistics are kept in the work folder, so another budget for the same model takes only the last steps.
    """
    from moe2gguf import pipeline
    from moe2gguf.allocate import describe_speed
    from moe2gguf.plan import make_plan, render_plan
    from moe2gguf.recipe import load_recipe
    from moe2gguf.skip import Skipping

    recipe = load_recipe(recipe_path) if recipe_path is not None and recipe_path.exists() else None
    if recipe is not None:
        for parameter in context.command.params:
            if parameter.name is not None and parameter.name not in BESIDE_A_RECIPE and _is_typed(parameter.name):
                raise click.UsageError(f"{parameter.opts[0]} is decided by {recipe_path}; leave one of them out")
        options["bits"] = round(recipe.allocation.bits_per_weight, 2)
        options["layout"], options["prune_share"] = recipe.allocation.layout, recipe.prune_share
    elif recipe_path is not None and not recipe_path.parent.is_dir():
        raise Moe2ggufError(
            f"there is no folder {recipe_path.parent} to save the recipe in; make it, or choose another"
        )
    budget, choice, device = _budget(options), _choice(options), _device(options)
    calibration, quantizer = _calibration(options), _quantizer(options)
    skipping = Skipping(options["skip"], options["skip_prompt"])
    if dry_run:
        if recipe is not None:
            calibration, quantizer = recipe.calibration_on(calibration.text_paths), recipe.quantizer
        plan = make_plan(
            model,
            options["outfile"],
            budget,
            choice,
            calibration,
            quantizer=quantizer,
            skipping=skipping if recipe is None else recipe.skipping,
            prune_share=options["prune_share"],
            allocation=None if recipe is None else recipe.allocation,
            device=device,
            work_folder=options["work_folder"],
            resume=options["resume"],
            n_threads=options["threads"],
            pre_tokenizer=options["pre_tokenizer"],
            model_name=options["model_name"],
            metadata_file=options["metadata"],
        )
        console.print(render_plan(plan))
        return
    with progress_display() as progress:
        result = pipeline.convert(
            model,
            options["outfile"],
            bits=options["bits"],
            size_bytes=options["size_bytes"],
            layout=choice.layout,
            max_groups=choice.max_groups,
            types=choice.types,
            overrides=choice.overrides,
            allocator=choice.allocator,
            objective=choice.objective,
            calibration=calibration,
            quantizer=quantizer,
            skipping=skipping,
            prune_share=options["prune_share"],
            device=device,
            recipe=recipe,
            recipe_path=recipe_path,
            work_folder=options["work_folder"],
            resume=options["resume"],
            split_max_bytes=options["split_max_size"],
            split_max_tensors=options["split_max_tensors"],
            overwrite=options["force"],
            pre_tokenizer=options["pre_tokenizer"],
            model_name=options["model_name"],
            metadata_file=options["metadata"],
            n_threads=options["threads"],
            progress=progress,
            note=_note,
        )
    allocation = result.allocation
    click.echo(
        f"{allocation.bits_per_weight:.3f} bits per weight, predicted mean KL divergence {allocation.predicted_kl:.4f} "
        f"(no allocation under these rules below {allocation.lower_bound_kl:.4f})"
    )
    if allocation.decode_seconds is not None:
        click.echo(f"predicted decoding: {describe_speed(allocation)}")
    for path in result.paths:
        click.echo(f"{path}  {path.stat().st_size:,} bytes")
    if recipe_path is not None and recipe is None:
        click.echo(recipe_path)


def _open(model: str, options: dict[str, Any]):
    from moe2gguf.source import open_source

    return open_source(
        model,
        pre_tokenizer=options["pre_tokenizer"],
        model_name=options.get("model_name"),
        metadata_file=options.get("metadata"),
    )


@main.command(short_help="Write a checkpoint without some of its experts (REAP).")
@model_options
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--share", type=_share, required=True, help="Of each layer's experts, those that matter least.")
@calibration_options
@device_option
@threads_option
def prune(model: str, folder: Path, share: float, **options: Any) -> None:
    """Write MODEL without a share of its experts to FOLDER, as a checkpoint (REAP).

    The default of --work is FOLDER.moe2gguf.
    """
    from moe2gguf.calibration_text import text_of
    from moe2gguf.dtypes import settled
    from moe2gguf.pipeline import prune_to
    from moe2gguf.work_folder import begin_anew

    folder = Path(os.path.abspath(folder))
    source, device = _open(model, options), _device(options)
    calibration = settled(_calibration(options), source, device)
    with progress_display() as progress:
        run = _run(options, options["work_folder"] or folder.with_name(f"{folder.name}.moe2gguf"), device, progress)
        text = text_of(source, calibration, run)
        if not options["resume"]:
            begin_anew(run.work)
        prune_to(folder, source, share, calibration, text, run)
    click.echo(folder)


def _run(options: dict[str, Any], work: Path, device: Any, progress: Callable[[str, int, int], None]):
    from moe2gguf.run import Run

    return Run(work, options["threads"] or available_cores(), device, progress, _note)


@main.command(short_help="Run text through the model: the statistics.")
@model_options
@calibration_options
@device_option
@click.option(
    "--imatrix",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the importance as a .gguf that llama-quantize --imatrix reads.",
)
@threads_option
def calibrate(model: str, imatrix: Path | None, **options: Any) -> None:
    """Run text through MODEL once and save what allocation and quantisation need."""
    from moe2gguf.calibration_text import text_of
    from moe2gguf.costs import cost_table
    from moe2gguf.imatrix import write_imatrix
    from moe2gguf.pipeline import calibrated
    from moe2gguf.work_folder import STATS, begin_anew, work_folder_for

    calibration, source, device = _calibration(options), _open(model, options), _device(options)
    work = options["work_folder"] or work_folder_for(source, Path("model.gguf"))
    with progress_display() as progress:
        run = _run(options, work, device, progress)
        text = text_of(source, calibration, run)
        if not options["resume"]:
            begin_anew(work)
        stats = calibrated(source, calibration, run, text)
    click.echo(work / STATS)
    if imatrix is not None:
        write_imatrix(imatrix, source, cost_table(source, stats, layout="stock"), stats)
        click.echo(imatrix)


@main.command(short_help="Choose a type for every expert within the budget.")
@model_options
@budget_options
@click.option("--stats", "stats_path", type=_existing_file, required=True, help="Statistics from `calibrate`.")
@click.option("--outfile", type=click.Path(path_type=Path), default=Path("allocation.json"), show_default=True)
@threads_option
def allocate(model: str, stats_path: Path, outfile: Path, **options: Any) -> None:
    """Choose the type of every expert and matrix within the budget, and save the choice."""
    from moe2gguf.allocate import describe_speed, save_allocation
    from moe2gguf.costs import cost_table
    from moe2gguf.experts import CPU
    from moe2gguf.fitting import fit_budget, report_allocation, speeds_for
    from moe2gguf.stats import load_stats

    source, stats = _open(model, options), load_stats(stats_path)
    budget = _budget(options)
    choice = _choice(options)
    table = cost_table(source, stats, layout=choice.layout, types=choice.types, overrides=choice.overrides)
    with progress_display() as progress:
        speeds = speeds_for(source, choice, _run(options, stats_path.parent, CPU, progress))
    allocation, _ = fit_budget(source, stats, table, budget, choice, speeds=speeds)
    report_allocation(source, table, stats, allocation, choice, _note)
    save_allocation(allocation, outfile)
    click.echo(
        f"{allocation.bits_per_weight:.3f} bits per weight, predicted KL {allocation.predicted_kl:.4f}: {outfile}"
    )
    if allocation.decode_seconds is not None:
        click.echo(f"predicted decoding: {describe_speed(allocation)}")


@main.command()
@model_options
@click.option("--stats", "stats_path", type=_existing_file, required=True, help="Statistics from `calibrate`.")
@click.option("--allocation", "allocation_path", type=_existing_file, required=True, help="From `allocate`.")
@quantizer_options
@device_option
@skip_options
@click.option(
    "--imatrix",
    type=_existing_file,
    help="llama.cpp's importance matrix, as .gguf: ggml's encoder with it instead of error feedback.",
)
@output_options
@threads_option
def quantize(model: str, stats_path: Path, allocation_path: Path, imatrix: Path | None, **options: Any) -> None:
    """Write the GGUF of an allocation."""
    from moe2gguf.allocate import load_allocation
    from moe2gguf.gguf_file import Target
    from moe2gguf.pipeline import outfile_for, write_allocation
    from moe2gguf.settings import Budget
    from moe2gguf.skip import Skipping
    from moe2gguf.stats import load_stats

    source, stats = _open(model, options), load_stats(stats_path)
    allocation = load_allocation(allocation_path)
    target = Target(
        outfile_for(source, options["outfile"], Budget(bits=round(allocation.bits_per_weight, 2))),
        options["split_max_size"],
        options["split_max_tensors"],
        options["force"],
    )
    with progress_display() as progress:
        paths = write_allocation(
            source,
            stats,
            allocation,
            target,
            _run(options, stats_path.parent, _device(options), progress),
            quantizer=_quantizer(options),
            skipping=Skipping(options["skip"], options["skip_prompt"]),
            imatrix=imatrix,
        )
    for path in paths:
        click.echo(f"{path}  {path.stat().st_size:,} bytes")


@main.command(short_help="Decode a file and compare it with its checkpoint.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", "model", required=True, help="The checkpoint: a folder, a Hub id, or demo.")
@naming_options
def verify(file: Path, model: str, **options: Any) -> None:
    """Decode every tensor of FILE and compare it with the checkpoint; exit code 1 if anything is wrong.

    Give the names and metadata that the file was converted with.
    """
    from moe2gguf.verify import render_verification, verify_file

    source = _open(model, options)
    with progress_display() as progress:
        report = verify_file(file, source, progress=lambda done, total, name: progress(f"verify {name}", done, total))
    console.print(render_verification(report))
    if not report.ok:
        raise Moe2ggufError(f"{file} does not hold what {model} does: {len(report.problems)} problems, listed above")


@main.command(short_help="Show types per layer and expert, and provenance.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the types, as .png or .svg.")
def inspect(file: Path, plot: Path | None) -> None:
    """Show the types of FILE per layer and expert, its groups, thresholds and provenance."""
    from moe2gguf.inspect import inspect_file, render_report

    report = inspect_file(file)
    console.print(render_report(report))
    if plot is not None:
        from moe2gguf.plot import plot_bits

        plot_bits(report, plot)
        click.echo(plot)


@main.command(short_help="Write a model card beside a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--base", type=_existing_file, help="The unquantised GGUF: KL divergence from it is measured.")
@click.option("--text", type=_existing_file, help="Held-out text to measure on  [default: CPython's documentation].")
@click.option("--chunks", default=32, show_default=True, type=click.IntRange(min=1), help="Of 512 tokens each.")
@click.option("--force", is_flag=True, help="Replace an existing README.md.")
def card(file: Path, base: Path | None, text: Path | None, chunks: int, force: bool) -> None:
    """Write a model card, README.md, beside FILE: contents, hashes, recipe, and KL divergence from --base."""
    from moe2gguf.card import check_card, write_card
    from moe2gguf.evaluate import evaluate, held_out_text
    from moe2gguf.text import read_text

    if text is not None and base is None:
        raise click.UsageError("--text is what KL divergence is measured on, which needs --base")
    if base is None and _is_typed("chunks"):
        raise click.UsageError("--chunks are of the text that KL divergence is measured on, which needs --base")
    check_card(file, overwrite=force)
    evaluations: tuple = ()
    with progress_display() as progress:
        if base is not None:
            held_out = read_text(text) if text else held_out_text(chunks * 4000)
            evaluations = evaluate(
                base,
                [file],
                held_out,
                max_chunks=chunks,
                progress=lambda done, total, _: progress("KL divergence", done, total),
            )
        path = write_card(
            file,
            evaluations,
            text_name=text.name if text else "CPython's documentation and library",
            overwrite=force,
            progress=lambda done, total: progress("sha256", done, total),
        )
    click.echo(path)


@main.command(short_help="Convert the bundled model, compare with llama-quantize.")
@click.option("--bits", default=2.54, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-out"), show_default=True)
def demo(bits: float, folder: Path) -> None:
    """Convert the bundled model in both layouts and compare with llama-quantize."""
    from moe2gguf.demo import render_demo, run_demo

    with progress_display() as progress:
        result = run_demo(folder, bits=bits, progress=progress)
    console.print(render_demo(result))


class _Bits(click.ParamType):
    """2.1,2.5,3.0"""

    name = "bits,…"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            bits = tuple(float(part) for part in value.split(","))
        except ValueError:
            bits = ()
        if not bits or min(bits) <= 0:
            self.fail(f"{value!r} is not a list of numbers above 0 like 2.1,2.5,3", param, context)
        return bits


@main.command(short_help="Compare with llama-quantize and others at equal bytes.")
@click.argument("model")
@click.option("--bits", type=_Bits(), help="Budgets: the presets nearest to these  [default: 2.1,2.5,3,3.5,4.25].")
@click.option("--quick", is_flag=True, help="Two budgets, 2.5 and 3.5, and at the second fewer methods.")
@click.option("--text", type=_existing_file, help="Held-out text to measure on  [default: CPython's own].")
@click.option("--calibration-text", type=_existing_file, multiple=True, help="[default: the model writes its own]")
@click.option("--ctx", default=512, show_default=True, type=click.IntRange(min=16), help="Tokens of a chunk.")
@click.option("--chunks", default=64, show_default=True, type=click.IntRange(min=1), help="Chunks to measure on.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Of speed.")
@click.option("--sequences", default=128, show_default=True, type=click.IntRange(min=2), help="Of calibration text.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(min=16), help="Tokens of each.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all sampling.")
@click.option("--tasks", multiple=True, help="Of lm-evaluation-harness, a name or a YAML file; repeatable.")
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), default=Path("bench-out"), show_default=True
)
@threads_option
def bench(model: str, bits: tuple[float, ...] | None, quick: bool, folder: Path, **options: Any) -> None:
    """Compare MODEL's files with llama-quantize's and others' of the same bytes; see FOLDER/bench.html.

    What is in FOLDER already and unchanged is not made or measured anew.
    """
    from moe2gguf.bench import FULL_BITS, QUICK_BITS, QUICK_METHODS, BenchRequest, run_bench
    from moe2gguf.record import METHODS
    from moe2gguf.report import summary, to_markdown, write_report

    request = BenchRequest(
        model=model,
        bits=bits or (QUICK_BITS if quick else FULL_BITS),
        more_methods=QUICK_METHODS if quick else tuple(METHODS),
        text=options["text"],
        calibration_texts=options["calibration_text"],
        n_sequences=options["sequences"],
        sequence_tokens=options["length"],
        seed=options["seed"],
        n_ctx=options["ctx"],
        n_chunks=options["chunks"],
        n_rounds=options["rounds"],
        tasks=options["tasks"],
        n_threads=options["threads"] or available_cores(),
    )
    with progress_display() as progress:
        record, _ = run_bench(request, folder, command=shlex.join(["moe2gguf", *sys.argv[1:]]), progress=progress)
    paths = write_report(record, folder)
    click.echo(to_markdown(summary(record)))
    for path in paths:
        click.echo(path)


@main.command(short_help="Draw a benchmark's tables and pictures again.")
@click.argument("records", metavar="RECORD...", type=_existing_file, nargs=-1, required=True)
@click.option(
    "--into",
    type=_existing_file,
    multiple=True,
    help="README.md takes the short table, any other document the whole, between <!-- bench:begin --> and its end.",
)
def report(records: tuple[Path, ...], into: tuple[Path, ...]) -> None:
    """Tables and pictures of a benchmark's RECORD, beside it, without measuring anything.

    Of further records, documents have their part of a table of all models.
    """
    from moe2gguf.record import load_record
    from moe2gguf.report import document_blocks, write_into, write_report

    first, *others = (load_record(path) for path in records)
    for path in write_report(first, records[0].parent, records[0].stem):
        click.echo(path)
    for document in into:
        write_into(document, document_blocks(first, records[0], document, others))
        click.echo(document)


main.add_command(runtime)

if __name__ == "__main__":
    sys.exit(main())
