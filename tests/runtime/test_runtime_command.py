"""`moe2gguf runtime status` and `check`, with a stand-in for test-backend-ops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe2gguf import runtime as api
from moe2gguf.cli import main
from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime import Device, Runtime
from moe2gguf.runtime.build import Build, BuildInfo, describe
from moe2gguf.runtime.installation import Status
from moe2gguf.runtime.ops_check import check_op
from moe2gguf.runtime.toolchain import GpuBackend, Toolchain
from moe2gguf.runtime.upstream import read_upstream

GREEN_OK, RED_FAIL = "\\033[1;32mOK\\033[0m", "\\033[1;31mFAIL\\033[0m"


def put_test_backend_ops(folder: Path, *lines: str) -> Path:
    """Prints as llama.cpp's does. Its arguments are `test -b DEVICE -o OP`."""
    program = folder / "test-backend-ops"
    program.write_text("\n".join(["#!/bin/sh", 'device="$3" op="$5"', *lines, ""]))
    program.chmod(0o755)
    return program


def test_cases_are_counted(tmp_path) -> None:
    """Of the operation asked for; a failure says its numbers in the middle of its line."""
    program = put_test_backend_ops(
        tmp_path,
        "printf 'Testing 2 devices\\n\\nBackend 1/2: CPU\\n  Skipping\\n'",
        f"printf '  MUL_MAT_ID(type_a=f32,n=1): {GREEN_OK}\\n'",
        f"printf '  MUL_MAT_ID(type_a=q4_K,n=(2)): {GREEN_OK}\\n'",
        "printf '  MUL_MAT_ID(type_a=iq1_m): not supported [CUDA0] \\n'",
        f"printf '  MUL_MAT_ID(type_a=q8_0): [MUL_MAT_ID] NMSE = 0.5 > 0.0005 {RED_FAIL}\\n'",
        f"printf '  MUL_MAT(type_a=q8_0): {GREEN_OK}\\n'",
        f"printf '  2/3 tests passed\\n  Backend CUDA0: {RED_FAIL}\\n'",
        "exit 1",
    )
    seen: list[int] = []
    result = check_op(program, "CUDA0", "MUL_MAT_ID", on_case=seen.append)
    assert (result.n_passed, result.n_unsupported, result.failed) == (2, 1, ("type_a=q8_0",))
    assert seen == [1, 2, 3, 4]
    assert not result.ok


@pytest.mark.parametrize(
    ("lines", "ok"),
    [
        ([f"printf '  %s(n=1): {GREEN_OK}\\n' $op"], True),
        (["printf '  %s(n=1): not supported [X] \\n' $op"], True),
        ([f"printf '  %s(n=1): {GREEN_OK}\\n' $op", "kill -SEGV $$"], False),
        (["echo unknown operation"], False),  # no case at all: nothing was tested
    ],
)
def test_verdict(tmp_path, lines, ok) -> None:
    assert check_op(put_test_backend_ops(tmp_path, *lines), "X", "MUL_MAT_ID_GRP").ok is ok


@pytest.fixture
def installed(monkeypatch, tmp_path) -> Path:
    """A runtime with two devices, that passes its smoke test."""
    found = Runtime("0.0+moe2gguf.p1", tmp_path, tmp_path, tmp_path)
    devices = [Device("CPU", "a processor", 2**34), Device("CUDA0", "a card", 2**33)]
    monkeypatch.setattr(api, "find_runtime", lambda: found)
    monkeypatch.setattr(api, "check", lambda: "smoke")
    monkeypatch.setattr(api, "find_devices", lambda runtime: devices)
    return tmp_path


def test_check_runs_every_device(installed) -> None:
    put_test_backend_ops(installed, f"printf '  %s(n=1): {GREEN_OK}\\n' $op")
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == 0
    table = [line.split()[:4] for line in result.stdout.splitlines() if " 0 " in line]
    ops = ("MUL_MAT_ID_GRP", "MUL_MAT_ID")
    assert table == [[device, op, "1", "0"] for device in ("CPU", "CUDA0") for op in ops]
    assert result.stdout.endswith(f"works, {installed}\n")


def test_check_names_the_device_that_is_wrong(installed) -> None:
    wrong = f"printf '  %s(n=1): NMSE = 1 > 0 {RED_FAIL}\\n' $op; exit 1"
    put_test_backend_ops(installed, f"test $device = CUDA0 && {{ {wrong}; }}", f"printf '  %s(n=1): {GREEN_OK}\\n' $op")
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == 1
    assert "computes wrongly on CUDA0: " in result.stderr
    assert "failed: MUL_MAT_ID_GRP(n=1) on CUDA0" in result.stdout
    assert "works" not in result.stdout


def test_check_of_a_runtime_without_the_tool(installed) -> None:
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == 0
    assert "test-backend-ops is not in" in result.stderr


def described(*names: str) -> BuildInfo:
    gpus = [GpuBackend(name, name, ()) for name in names]
    return describe(read_upstream(), Toolchain("cc", "c++", ("cc 12", "c++ 12"), ""), {}, amx=True, gpus=gpus)


@pytest.mark.parametrize("device", [Device("CPU", "a processor", 2**34), Device("Vulkan0", "a card", 2**33)])
def test_check_of_a_backend_without_a_card(installed, monkeypatch, device: Device) -> None:
    """As where the driver is older than CUDA, or a container is given no GPU: the library works, but not on one."""
    info = described("vulkan")
    monkeypatch.setattr(api, "status", lambda: Status("1", "0" * 64, "1", "0.1", info, Path("/package"), ()))
    monkeypatch.setattr(api, "find_devices", lambda runtime: [device])
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == (device.name == "CPU")
    if device.name == "CPU":
        assert "is built for CPU, Vulkan and finds no graphics card: check the driver" in result.stderr


@pytest.mark.parametrize(
    ("present", "options", "wanted"),
    [((), [], []), (("cuda",), [], ["cuda"]), (("cuda",), ["--vulkan"], ["vulkan"]), (("cuda",), ["--cpu"], [])],
)
def test_backends_that_are_installed_stay(
    monkeypatch, tmp_path, present: tuple[str, ...], options: list[str], wanted: list[str]
) -> None:
    """Whoever does what an error says, `moe2gguf runtime install`, loses none."""
    info = described(*present)
    monkeypatch.setattr(api, "status", lambda: Status("1", "0" * 64, "1", "0.1", info, Path("/package"), ()))
    asked: list[list[str]] = []

    def install(*, gpus: list[str], **_: object) -> Runtime:
        asked.append(gpus)
        return Runtime("1", tmp_path, tmp_path, tmp_path)

    monkeypatch.setattr(api, "install", install)
    assert CliRunner().invoke(main, ["runtime", "install", *options]).exit_code == 0 and asked == [wanted]


def test_status_says_what_matches(monkeypatch, installed) -> None:
    upstream = read_upstream()
    gpu = GpuBackend("vulkan", "shaderc 2023", ("-DGGML_VULKAN=ON",))
    info = describe(upstream, Toolchain("cc", "c++", ("cc 12", "c++ 12"), ""), {}, amx=True, gpus=[gpu])
    older = replace(info, key="older", patches_sha256="0" * 64, gpu_backends=())
    builds = (Build(info, Path("/cache/new")), Build(older, Path("/cache/older")))
    monkeypatch.setattr(
        api,
        "status",
        lambda: Status(info.version, upstream.patches_digest, info.version, "0.1", info, Path("/package"), builds),
    )
    lines = [line.strip() for line in CliRunner().invoke(main, ["runtime", "status"]).stdout.splitlines()]
    digest = upstream.patches_digest[:12]
    assert lines.count(f"patches {digest}, those of this moe2gguf") == 2  # installed, and in the cache
    assert lines.count("patches 000000000000, not those of this moe2gguf") == 1
    assert lines.count("backends CPU, Vulkan") == 2
    assert "device   CUDA0: a card, 8.0 GiB" in lines
    assert any(line.startswith("cached") and line.endswith("/cache/new (installed)") for line in lines)


def test_status_of_a_library_that_cannot_be_loaded(monkeypatch, installed) -> None:
    def fail(runtime: Runtime) -> list[Device]:
        raise RuntimeMissing("there is no libcuda.so.1")

    info = describe(read_upstream(), Toolchain("cc", "c++", ("cc 12", "c++ 12"), ""), {}, amx=True)
    monkeypatch.setattr(api, "find_devices", fail)
    monkeypatch.setattr(api, "status", lambda: Status("1", "0" * 64, "1", "0.1", info, Path("/package"), ()))
    result = CliRunner().invoke(main, ["runtime", "status"])
    assert result.exit_code == 0
    assert "devices  - (there is no libcuda.so.1)" in result.stdout
