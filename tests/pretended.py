"""A device that torch takes for one of its own, whose memory and arithmetic are the CPU's.

As with a GPU, no operation takes tensors of both, but for copies from one to the other. So what runs with a stream on
it, and gives what it gives without, has every tensor where it belongs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
torch.pretended.get_amp_supported_dtype = lambda: [torch.float32]  # type: ignore[attr-defined]
DEVICE, CPU = torch.device("pretended", 0), torch.device("cpu")
# which index tensors may be the CPU's on a GPU, too
INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")


class Pretended(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    held: torch.Tensor

    @staticmethod
    @torch.inference_mode(False)  # torch cannot detach what wraps another and has no version
    def __new__(cls, held: torch.Tensor) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(op, *args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list:
        return self.held.tolist()


def computed(op: Any, *args: Any, **kwargs: Any) -> Any:
    name, given = op._schema.name, []

    def real(x: Any) -> Any:
        if isinstance(x, Pretended):
            given.append(x)
            return x.held
        if isinstance(x, torch.Tensor) and x.dim() and name not in (*COPIES, *INDEXING):
            raise RuntimeError(f"{op} is given tensors on the CPU and on the device")
        return CPU if isinstance(x, torch.device) and x.type == DEVICE.type else x

    def pretended(x: Any) -> Any:
        same = [known for known in given if known.held is x]  # it was changed in place
        return same[0] if same else Pretended(x) if isinstance(x, torch.Tensor) else x

    if name == "aten::_fused_sdp_choice":
        return 0  # attention in plain operations
    wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)] or [DEVICE]
    found = op(*tree_map(real, args), **tree_map(real, kwargs))
    if name == "aten::copy_":
        return args[0]
    return tree_map(pretended, found) if wanted[0].type == DEVICE.type else found


# what makes tensors there without being given one
_library = torch.library.Library("_", "IMPL")
_fallback: Callable[..., Any] = computed
_library.fallback(_fallback, "PrivateUse1")
