"""`moe2gguf runtime`: the patched llama.cpp, from sources to installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from moe2gguf import runtime as api
from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime import build as build_module
from moe2gguf.runtime.ops_check import OPS, OpResult, check_op
from moe2gguf.runtime.toolchain import GPU_BACKENDS

_jobs = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Compilers at a time  [default: one per core, and per 2 GiB of memory].",
)
_BACKEND_NAMES = {"cuda": "CUDA", "vulkan": "Vulkan"}


def _gpus(command: Callable[..., Any]) -> Callable[..., Any]:
    helps = {
        "cuda": "For NVIDIA cards: those in this machine, or $CUDAARCHS.",
        "vulkan": "For any card with a Vulkan driver.",
    }
    for name in reversed(GPU_BACKENDS):
        command = click.option(f"--{name}", is_flag=True, help=helps[name])(command)
    return command


def _chosen(flags: dict[str, bool]) -> list[str]:
    return [name for name in GPU_BACKENDS if flags[name]]


@contextmanager
def _progress() -> Iterator[build_module.Progress]:
    """A live bar on a terminal; elsewhere one line per stage, and per tenth of a stage that counts its steps."""
    if not sys.stderr.isatty():
        said: set[tuple[str, int]] = set()

        def say(stage: str, done: int, total: int) -> None:
            tenth = 10 * done // total if total else 0
            if (stage, tenth) not in said:
                said.add((stage, tenth))
                click.echo(f"{stage}: {10 * tenth} %" if tenth else stage, err=True)

        yield say
        return

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            for other, task in tasks.items():
                if other != stage:
                    bars.update(task, total=1, completed=1)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield show
        for task in tasks.values():
            bars.update(task, total=1, completed=1)


@click.group(short_help="Build, install and check the patched llama.cpp.")
def runtime() -> None:
    """Build, install and check the patched llama.cpp that reads grouped files."""


@runtime.command()
def status() -> None:
    """Say what is needed, installed and cached."""
    found = api.status()
    click.echo(f"needed      llama_cpp_python {found.wanted_version}, patches {found.wanted_patches[:12]}")
    click.echo(f"installed   llama_cpp_python {found.installed_version or '-'}, gguf {found.gguf_version or '-'}")
    if found.package is not None:
        click.echo(f"            {found.package}")
        click.echo(f"            {_match(found.installed, found.wanted_patches)}")
    if found.installed is not None:
        click.echo(f"            backends {_backends(found.installed)}")
        for line in _found_lines():
            click.echo(f"            {line}")
    for built in found.builds:
        in_use = " (installed)" if built.info == found.installed else ""
        click.echo(f"cached      {built.info.version} {built.folder}{in_use}")
        click.echo(f"            {_match(built.info, found.wanted_patches)}")
        click.echo(f"            backends {_backends(built.info)}")
        click.echo(f"            {', '.join(built.info.compilers)}")
        click.echo(f"            {' '.join(built.info.cmake_args)}")
        for variable, value in sorted(built.info.environment.items()):
            click.echo(f"            {variable}={value}")
    if not found.builds:
        click.echo(f"cached      - ({build_module.cache_folder()})")


def _match(info: build_module.BuildInfo | None, wanted_patches: str) -> str:
    if info is None:
        return "not built by moe2gguf"
    same = info.patches_sha256 == wanted_patches
    return f"patches {info.patches_sha256[:12]}, {'those' if same else 'not those'} of this moe2gguf"


def _backends(info: build_module.BuildInfo) -> str:
    return ", ".join(["CPU", *(_BACKEND_NAMES.get(name, name) for name in info.gpu_backends)])


def _found_lines() -> list[str]:
    try:
        found = api.find_runtime()
        devices = api.find_devices(found)
    except RuntimeMissing as error:
        return [f"devices  - ({error})"]
    return [f"tools    {found.tools}", f"sources  {found.tree}"] + [
        f"device   {device.name}: {device.description}, {device.memory_bytes / 2**30:.1f} GiB" for device in devices
    ]


@runtime.command(short_help="Build into the cache, without installing.")
@_gpus
@_jobs
def build(jobs: int | None, **flags: bool) -> None:
    """Build the wheels and the tools into the cache, without installing them, and print the folder."""
    with _progress() as progress:
        built = build_module.build(gpus=_chosen(flags), jobs=jobs, progress=progress)
    click.echo(built.folder)


@runtime.command(short_help="Build unless cached, and install.")
@_gpus
@click.option("--cpu", is_flag=True, help="Without the backends that the installed library has for graphics cards.")
@_jobs
def install(jobs: int | None, cpu: bool, **flags: bool) -> None:
    """Build unless cached, and install into this Python environment, with the backends that are installed already where
    none is named."""
    gpus = _chosen(flags)
    if gpus and cpu:
        raise click.UsageError(f"--cpu is without --{gpus[0]}; leave one of them out")
    if not gpus and not cpu and (present := api.status().installed) is not None:
        gpus = [name for name in present.gpu_backends if name in GPU_BACKENDS]
        if gpus:
            click.echo(f"note: for {_backends(present)} again, as installed; --cpu leaves the cards out", err=True)
    with _progress() as progress:
        installed = api.install(gpus=gpus, jobs=jobs, progress=progress)
    click.echo(f"llama_cpp_python {installed.version} is installed; `moe2gguf runtime check` tests it")


@runtime.command(short_help="Compute on every device, compare with the CPU.")
def check() -> None:
    """Compute with the installed library on every device, and compare each with the CPU's reference."""
    found = api.find_runtime()
    for line in api.check().splitlines():
        click.echo(line)
    present, devices = api.status().installed, api.find_devices(found)
    if present is not None and present.gpu_backends and all(device.name.startswith("CPU") for device in devices):
        raise RuntimeMissing(
            f"llama_cpp_python {found.version} is built for {_backends(present)} and finds no graphics card: check the "
            "driver (nvidia-smi, vulkaninfo), and what a container is given (--gpus all)"
        )
    program = found.tools / "test-backend-ops"
    results = []
    if program.is_file():
        with _progress() as progress:
            for device in devices:
                for op in OPS:
                    results.append(_check_op(program, device.name, op, progress))
        _print_results(results)
    else:
        click.echo(f"test-backend-ops is not in {found.tools}: built by an earlier moe2gguf", err=True)
    if not all(result.ok for result in results):
        raise RuntimeMissing(
            f"llama_cpp_python {found.version} computes wrongly on "
            f"{', '.join(dict.fromkeys(r.device for r in results if not r.ok))}: "
            "run without that device, or report the cases above"
        )
    click.echo(f"llama_cpp_python {found.version} works, {found.libraries}")


def _check_op(program: Path, device: str, op: str, progress: build_module.Progress) -> OpResult:
    stage = f"{op} on {device}"
    progress(stage, 0, 0)
    return check_op(program, device, op, on_case=lambda n_done: progress(stage, n_done, 0))


def _print_results(results: list[OpResult]) -> None:
    click.echo(f"{'device':12} {'operation':16} {'passed':>7} {'failed':>7} {'left to the CPU':>16}")
    for r in results:
        click.echo(f"{r.device:12} {r.op:16} {r.n_passed:7} {len(r.failed):7} {r.n_unsupported:16}")
    for r in results:
        for case in r.failed[:5]:
            click.echo(f"failed: {r.op}({case}) on {r.device}")
        if len(r.failed) > 5:
            click.echo(f"failed: {len(r.failed) - 5} more of {r.op} on {r.device}")
        if not r.ok and not r.failed and r.exit_code == 0:
            click.echo(f"failed: test-backend-ops has no case of {r.op}")
        elif not r.ok and not r.failed:
            click.echo(f"failed: {r.op} on {r.device}: test-backend-ops ended with exit code {r.exit_code}")
