"""The compilers found, and the probe for an AMX unit that traps."""

from __future__ import annotations

import platform

import pytest

from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime import toolchain as module
from moe2gguf.runtime.build import _smoke_test, _Trapped
from moe2gguf.runtime.toolchain import amx_works, find_toolchain


@pytest.fixture
def toolchain():
    try:
        return find_toolchain({})
    except RuntimeMissing as error:
        pytest.skip(str(error))


def test_this_machine_has_a_name(toolchain) -> None:
    assert all(toolchain.versions)
    assert toolchain.native_digest == find_toolchain({}).native_digest


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86")
@pytest.mark.parametrize(
    ("program", "works"),
    [
        pytest.param("int main(void) { return 0; }", True, id="runs"),
        pytest.param("int main(void) { __builtin_trap(); }", False, id="illegal instruction"),
        pytest.param("int main(void) { volatile int *p = 0; return *p; }", False, id="segmentation fault"),
        pytest.param("int main(void) { return 1; }", False, id="refused by the kernel"),
        pytest.param("not C", False, id="unknown to the compiler"),
    ],
)
def test_amx_probe(monkeypatch, toolchain, program, works) -> None:
    monkeypatch.setattr(module, "_AMX_PROGRAM", program)
    assert amx_works(toolchain) is works


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86")
def test_amx_program_compiles(toolchain, tmp_path) -> None:
    """Whether it runs is the machine's business."""
    source = tmp_path / "amx.c"
    source.write_text(module._AMX_PROGRAM)
    command = [toolchain.cc, "-Wall", "-Werror", "-mamx-tile", "-mamx-int8", "-c", source, "-o", tmp_path / "o"]
    assert module._run(*command).returncode == 0, module._run(*command).stderr


def test_a_library_that_does_not_work_is_noticed(tmp_path) -> None:
    """The smoke test runs in a child process; whatever happens there, the parent gets a reason and the log."""
    log = tmp_path / "log"
    with pytest.raises(_Trapped, match=f"does not work here .*log: {log}"):
        _smoke_test(tmp_path, log)
    assert "libggml-base" in log.read_text()
