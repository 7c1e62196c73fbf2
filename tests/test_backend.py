"""Which device a name stands for, and what is said where it cannot be had; no GPU is needed."""

import re
import sys

import pytest
import torch

from moe2gguf import backend
from moe2gguf.errors import DeviceError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())


def test_the_cpu_is_always_there() -> None:
    assert backend.device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_by_name(name: str, index: int, two_gpus: None) -> None:
    said: list[str] = []
    assert backend.device(name, said.append) == torch.device("cuda", index)
    assert [note.startswith("computing on cuda:0, which no test has run on yet") for note in said] == [True] * (
        name == "auto"  # which nobody asked for
    )


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "cpu:0"])
def test_other_names_are_errors(name: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(repr(name))):
        backend.device(name)


def test_a_gpu_that_is_not_there_is_an_error(two_gpus: None) -> None:
    with pytest.raises(DeviceError, match="2 GPUs"):
        backend.device("cuda:2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("torch.version.cuda", None), "has no CUDA"),
        (("torch.cuda.is_available", lambda: False), "no GPU"),
        (("torch.cuda.get_device_capability", lambda _: (7, 5)), "capability is 7.5, the kernels need 8.0"),
        (("importlib.util.find_spec", lambda _: None), "pip install 'moe2gguf[gpu]'"),
    ],
    ids=["torch without CUDA", "no GPU", "an old GPU", "no triton"],
)
def test_what_is_missing_is_named(
    change: tuple, says: str, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """An error where the GPU was asked for by name, else a note and the CPU."""
    monkeypatch.setattr(*change)
    with pytest.raises(DeviceError, match=re.escape(says)):
        backend.device("cuda")
    said: list[str] = []
    assert backend.device("auto", said.append) == torch.device("cpu")
    assert len(said) == 1 and says in said[0]


def test_products_on_a_gpu_are_exact(two_gpus: None) -> None:
    """Whatever a container has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        backend.device("cpu")
        assert torch.get_float32_matmul_precision() == "high"
        backend.device("auto")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tensors_on_the_cpu_take_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they need triton."""
    monkeypatch.setitem(sys.modules, "moe2gguf_kernels", None)
    x_TK = torch.eye(3)
    assert not backend.has_kernels(x_TK)
    one = torch.ones(3)
    assert torch.equal(backend.moments(x_TK, torch.arange(3), torch.tensor([0, 3]), one)[0], x_TK)
