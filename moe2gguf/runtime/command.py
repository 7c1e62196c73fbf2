"""`moe2gguf runtime`: the patched llama.cpp, from sources to installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from moe2gguf import runtime as api
from moe2gguf.runtime import build as build_module

_jobs = click.option("--jobs", type=click.IntRange(min=1), help="Compilers at a time [default: one per core].")


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


@click.group()
def runtime() -> None:
    """Build, install and check the patched llama.cpp that reads grouped files."""


@runtime.command()
def status() -> None:
    """Say what is needed, installed and cached."""
    found = api.status()
    click.echo(f"needed      llama_cpp_python {found.wanted_version}")
    click.echo(f"installed   llama_cpp_python {found.installed_version or '-'}, gguf {found.gguf_version or '-'}")
    if found.package is not None:
        click.echo(f"            {found.package}{'' if found.installed else ' (not built by moe2gguf)'}")
    for built in found.builds:
        in_use = " (installed)" if built.info == found.installed else ""
        click.echo(f"cached      {built.info.version} {built.folder}{in_use}")
        click.echo(f"            {', '.join(built.info.compilers)}")
        click.echo(f"            {' '.join(built.info.cmake_args)}")
        for variable, value in sorted(built.info.environment.items()):
            click.echo(f"            {variable}={value}")
    if not found.builds:
        click.echo(f"cached      - ({build_module.cache_folder()})")


@runtime.command()
@_jobs
def build(jobs: int | None) -> None:
    """Build the wheels and the tools into the cache, without installing them."""
    with _progress() as progress:
        built = build_module.build(jobs=jobs, progress=progress)
    click.echo(built.folder)


@runtime.command()
@_jobs
def install(jobs: int | None) -> None:
    """Build unless cached, and install into this Python environment."""
    with _progress() as progress:
        installed = api.install(jobs=jobs, progress=progress)
    click.echo(f"llama_cpp_python {installed.version} is installed; `moe2gguf runtime check` tests it")


@runtime.command()
def check() -> None:
    """Load the installed library in a child process and compute with it."""
    found = api.find_runtime()
    for line in api.check().splitlines():
        click.echo(line)
    click.echo(f"llama_cpp_python {found.version} works, {found.libraries}")
