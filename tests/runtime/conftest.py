"""The installed runtime: its operations, loaded once, and its graphics cards."""

import pytest

from moe2gguf.runtime import Device, find_devices, find_runtime
from tests.runtime.ops import Ops


@pytest.fixture(scope="session")
def ops(needs_runtime) -> Ops:
    return Ops()


@pytest.fixture
def cards(needs_runtime, monkeypatch) -> list[Device]:
    """Mesa's lavapipe (mesa-vulkan-drivers) stands in for a card; ggml passes over it unless it is named."""
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    devices = [device for device in find_devices(find_runtime()) if device.name != "CPU"]
    if not devices:
        pytest.skip("the installed runtime finds no graphics card: `make test RUNTIME_FLAGS=--vulkan`")
    return devices
