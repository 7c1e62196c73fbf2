"""The checkpoint as a stream of decoder layers: transformers' own forward pass with one layer in memory at a time.

The model is built on the meta device. Its decoder layers are swapped for stand-ins: run once, they record what the
model hands to each layer (masks, rotary tables), and replayed they let the model's own embedding, final norm and head
do their work around hidden states we keep ourselves. Real layers are filled from safetensors just before use and
emptied after, through transformers' weight conversion, which also fuses experts to one interface. So are embedding and
head, which lie in memory only where there is no layer. Of a model that sees pictures too there is the text's part.

Layers compute on a device, where their weights are, and so do embedding, last norm and head; hidden states come from
the CPU and go back there, logits stay. Hidden states are float32. Products of layers are, too, or they are in bfloat16,
as the model was trained and as torch's autocast has it: experts are held in that, which is most of a layer; routers,
whose scores decide between experts, norms and the head stay in float32.

Shapes: B sequences, L tokens of each, T = B·L tokens, D hidden, V vocabulary.
"""

import copy
import ctypes
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moe2gguf.errors import SourceError
from moe2gguf.experts import CPU, find_experts
from moe2gguf.source.checkpoint import read_json
from moe2gguf.source.stored import Stored, experts_dtype

# as transformers names them: of a module of experts, no module of their own
EXPERT_MATRICES = (".gate_up_proj", ".up_proj", ".down_proj")
# what GLM-5's layers hand on beside hidden states: which tokens each token attends to, all in sequences that are short
SPARSE_ATTENTION = "prev_topk_indices"
# what a layer is given of the tokens beside hidden states: another embedding, or themselves, to hash
TOKENS = ("per_layer_input", "input_ids", "ple_input_ids")


class _StandIn(nn.Module):
    """Takes a decoder layer's place: keeps the arguments it is called with, hands the hidden states on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        # a list, so that torch does not register the real layer as a child of its stand-in
        self._real = [layer]
        self.call_kwargs: dict[str, Any] = {}
        self.seen_BLD: torch.Tensor | None = None
        self.replacement_BLD: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # models ask their layers for facts such as attention_type
            return getattr(self._real[0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        _, *names = inspect.signature(self._real[0].forward).parameters
        kwargs |= zip(names, args, strict=False)
        if given := [name for name in TOKENS if name in names and kwargs.get(name) is not None]:
            raise SourceError(f"layers that are given the tokens again ({given[0]}) are not supported yet")
        self.call_kwargs, self.seen_BLD = kwargs, hidden_states
        after_BLD = hidden_states if self.replacement_BLD is None else self.replacement_BLD
        if SPARSE_ATTENTION not in names:
            return after_BLD
        n_sequences, n_tokens = hidden_states.shape[:2]
        return after_BLD, torch.arange(n_tokens, device=after_BLD.device).expand(n_sequences, n_tokens, n_tokens)


def model_config(folder: Path) -> transformers.PreTrainedConfig:
    """Raises SourceError for a model that transformers does not have."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # ValueError where it has no such type; and whatever it raises on a configuration
        names = read_json(folder / "config.json").get("architectures") or [None]
        # Kimi K2 is DeepSeek-V3 under a type of its own
        known = getattr(transformers, str(names[0]), None)
        if known is None:
            raise _not_known(folder, error) from error
        try:
            config = known.config_class.from_pretrained(folder, trust_remote_code=False)
        except Exception as other:
            raise _not_known(folder, other) from other
        config.model_type = known.config_class.model_type  # by which weights are converted
        return config


def _not_known(folder: Path, error: Exception) -> SourceError:
    return SourceError(
        f"transformers {transformers.__version__} cannot run {folder}, which calibration needs: "
        f"{type(error).__name__}: {' '.join(str(error).split())}"
    )


def _take_quant_method(config: transformers.PreTrainedConfig) -> str | None:
    """How the checkpoint is quantised, None if it is not. transformers is not told: it would want its own kernels."""
    method = None
    for part in (config, config.get_text_config()):
        if (found := getattr(part, "quantization_config", None)) is not None:
            method = str(dict(found).get("quant_method"))
            del part.quantization_config
    return method


def auto_class(config: transformers.PreTrainedConfig) -> Any:
    """transformers' that makes the model as published: with pictures, if it sees them."""
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def _config_to_run(folder: Path) -> tuple[transformers.PreTrainedConfig, str | None]:
    """And how the checkpoint is quantised."""
    config = model_config(folder)
    return config, _take_quant_method(config)


def _without_weights(config: transformers.PreTrainedConfig, folder: Path) -> Any:
    """The model, whose parameters are nowhere yet. Raises SourceError for what the stream cannot run."""
    with init_empty_weights(include_buffers=False):
        # ValueErrors, of models that it has not; and whatever a model's own code raises on such a configuration
        try:
            model = auto_class(config).from_config(config, dtype=torch.float32, experts_implementation="eager")
            layers = list(model.get_decoder().layers)
        except Exception as error:
            raise _not_known(folder, error) from error
    if not any(find_experts(layer) for layer in layers):
        raise SourceError(
            f"no experts in {folder}, or transformers holds {config.model_type}'s in a form that is not supported "
            "yet; please report the model"
        )
    return model.eval().requires_grad_(False)


def check_runs(folder: Path) -> None:
    """Raises SourceError for a checkpoint whose layers the stream cannot run. Reads no weights."""
    _without_weights(_config_to_run(folder)[0], folder)


class LayerStream:
    """A causal language model whose decoder layers are loaded one at a time. `dtype`: of products."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU):
        self.dtype, self.device = dtype, device
        self.config, quant_method = _config_to_run(folder)
        self._stored = Stored(folder, quant_method)
        self.model = _without_weights(self.config, folder)
        self.text_model: Any = self.model.get_decoder()
        _drop_all_but(self.text_model, self.model)
        self.layers: list[nn.Module] = list(self.text_model.layers)
        path = next(name for name, module in self.model.named_modules() if module is self.text_model)
        self._layers_prefix = f"{path}.layers."
        self._mapping = get_model_conversion_mapping(self.model)
        self._names_by_layer, self._expert_names, self._end_names, self._other_names = self._group_names()
        self._stand_ins = [_StandIn(layer) for layer in self.layers]
        self.text_model.layers = nn.ModuleList(self._stand_ins)
        self._call_kwargs: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._load(self._other_names)
        self._load_ends()
        _check("", self.model)
        # loading makes parameters that ask for gradients
        self.model.requires_grad_(False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def embedding_VD(self) -> torch.Tensor:
        """Of the stream until the next layer is loaded, as `head`'s weights are."""
        self._load_ends()
        return cast(torch.Tensor, self.model.get_input_embeddings().weight)

    @property
    def head(self) -> nn.Linear:
        self._load_ends()
        return self.model.get_output_embeddings()

    def _load_ends(self) -> None:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not embedding.weight.is_meta:
            return
        self._load(self._end_names)
        # a head of its own stays untied, whatever the configuration says; transformers does the same
        if head.weight.is_meta:
            self.model.tie_weights()
        for module in (embedding, head):
            module.requires_grad_(False)

    def _drop_ends(self) -> None:
        """With a large vocabulary they take more than a layer."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)

    def _group_names(self) -> tuple[list[list[str]], set[str], list[str], list[str]]:
        """Of the layers; of those the experts' matrices; of embedding and head; of what is left."""
        ends = {
            name
            for name, weight in self.model.named_parameters()
            if weight is self.model.get_input_embeddings().weight or weight is self.model.get_output_embeddings().weight
        }
        renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        meta = self.model.state_dict()
        by_layer: list[list[str]] = [[] for _ in self.layers]
        of_experts: set[str] = set()
        of_ends: list[str] = []
        others: list[str] = []
        for name in self._stored.names:
            target = rename_source_key(name, renamings, converters, self.model.base_model_prefix, meta)[0]
            if target.startswith(self._layers_prefix):
                # layers beyond the last are multi-token prediction heads, which the forward pass does not use
                if (layer := int(target.removeprefix(self._layers_prefix).split(".")[0])) < len(by_layer):
                    by_layer[layer].append(name)
                    if target.endswith(EXPERT_MATRICES):
                        of_experts.add(name)
            elif target in meta:
                (of_ends if target in ends else others).append(name)
        return by_layer, of_experts, of_ends, others

    def _load(self, names: list[str]) -> None:
        with self._stored.state(names) as state:
            # the mapping collects tensors while it works, so each load gets a fresh copy
            load_config = LoadStateDictConfig(
                dtype=torch.float32,
                dtype_plan={r"\.experts\.": experts_dtype(state)},
                weight_mapping=cast(Any, copy.deepcopy(self._mapping)),
            )
            transformers.utils.logging.disable_progress_bar()
            convert_and_load_state_dict_in_model(self.model, state, load_config)
        for module in self.model.modules():
            for name, weight in module._parameters.items():
                if weight is None or weight.is_meta:
                    continue
                if (weight.dtype, weight.device) != (held := self._held(name), self.device):
                    module._parameters[name] = nn.Parameter(weight.to(self.device, held), requires_grad=False)
            # they stay, for gradients too
            with torch.inference_mode(False):
                for name, values in module._buffers.items():
                    module._buffers[name] = None if values is None else values.to(self.device)

    def _held(self, name: str) -> torch.dtype:
        """What a parameter is in, by its own name."""
        return self.dtype if f".{name}" in EXPERT_MATRICES else torch.float32

    @contextmanager
    def layer(self, index: int, *, without_experts: bool = False) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, emptied again on leaving. `without_experts`: theirs are zeros, for
        others to be put in their place, which is most of the loading."""
        self._drop_ends()
        layer = self.layers[index]
        self.text_model.layers[index] = layer
        left_out = self._expert_names if without_experts else set()
        self._load([name for name in self._names_by_layer[index] if name not in left_out])
        self.text_model.layers[index] = self._stand_ins[index]
        for name, missing in list(layer.named_parameters()) if without_experts else ():
            if missing.is_meta and name.endswith(EXPERT_MATRICES):
                path, _, own = name.rpartition(".")
                zeros = torch.zeros(missing.shape, dtype=self._held(own), device=self.device)
                layer.get_submodule(path).register_parameter(own, nn.Parameter(zeros, requires_grad=False))
        _check(f"{self._layers_prefix}{index}.", layer)
        layer.requires_grad_(False)
        try:
            with self._own_forwards(layer):
                yield layer
        finally:
            for module in layer.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        module._parameters[name] = nn.Parameter(
                            torch.empty_like(weight, device="meta"), requires_grad=False
                        )
            _return_freed_memory()

    @contextmanager
    def _own_forwards(self, layer: nn.Module) -> Iterator[None]:
        """The layer's router computes in float32 whatever the layer does, its experts' gradients take less time."""
        block = find_experts(layer)
        if block is None:
            yield
            return
        route, pass_experts = block.router.forward, block.module.forward

        def in_f32(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.device.type, enabled=False):
                return route(*map(_in_f32, args), **{name: _in_f32(x) for name, x in kwargs.items()})

        def with_gradients(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return pass_experts(*args, **kwargs)
            return block.forward(*(*args, *kwargs.values())[:3])

        block.router.forward, block.module.forward = in_f32, with_gradients
        try:
            yield
        finally:
            del block.router.forward, block.module.forward

    def embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """i64 (B, L) token ids -> f32 (B, L, D), what the first decoder layer is given."""
        self._load_ends()
        self._call((tokens_BL.shape[0], tokens_BL.shape[1]), input_ids=tokens_BL.to(self.device))
        hidden_BLD = self._stand_ins[0].seen_BLD
        assert hidden_BLD is not None
        return hidden_BLD.to(CPU)

    # what is kept for later calls may meet gradients there, which inference mode's tensors cannot
    @torch.inference_mode(False)
    @torch.no_grad()
    def _call(self, shape: tuple[int, int], **given: torch.Tensor) -> None:
        """What each layer is called with beside hidden states of this shape."""
        try:
            self.text_model(**given, use_cache=False)
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"the layers of {self.config.model_type} cannot be run one by one yet ({error}); "
                "please report the model"
            ) from error
        sparse = SPARSE_ATTENTION in self._stand_ins[-1].call_kwargs
        if sparse and shape[1] > (n_attended := self.config.get_text_config().index_topk):
            raise SourceError(
                f"{self.config.model_type} attends to {n_attended} tokens of {shape[1]}; calibrate with "
                f"--length {n_attended}"
            )
        self._call_kwargs[shape] = [s.call_kwargs for s in self._stand_ins]

    @torch.inference_mode()
    def run(self, index: int, layer: nn.Module, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Decoder layer `index` on f32 (B, L, D)."""
        return self.apply(index, layer, hidden_BLD)

    def apply(self, index: int, layer: nn.Module, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """As `run`, with gradients where they are asked for."""
        shape = (hidden_BLD.shape[0], hidden_BLD.shape[1])
        if shape not in self._call_kwargs:
            # no tokens: that would load the embedding beside a layer
            self._call(shape, inputs_embeds=torch.zeros(*shape, hidden_BLD.shape[-1], device=self.device))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = layer(hidden_BLD.to(self.device), **self._call_kwargs[shape][index])
        return (out[0] if isinstance(out, tuple) else out).to(CPU, torch.float32)

    @torch.inference_mode()
    def logits(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """f32 (B, L, D) after the last decoder layer -> f32 (B, L, V), on the device."""
        return self.apply_head(hidden_BLD)

    def apply_head(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """As `logits`, with gradients where they are asked for."""
        self._load_ends()
        last = self._stand_ins[-1]
        last.replacement_BLD = hidden_BLD.to(self.device)
        try:
            placeholder_BL = torch.zeros(hidden_BLD.shape[:2], dtype=torch.int64, device=self.device)
            return self.model(input_ids=placeholder_BL, use_cache=False).logits
        finally:
            last.replacement_BLD = None


def _in_f32(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _drop_all_but(text_model: nn.Module, model: nn.Module) -> None:
    """What looks and listens, beside the model of text in one that does."""
    for holder in [module for module in model.modules() if text_model in module.children() and module is not model]:
        for name in [name for name, module in holder.named_children() if module is not text_model]:
            delattr(holder, name)


def _return_freed_memory() -> None:
    """glibc keeps what is freed in pieces of a few MiB, as experts are before they are fused: a layer's size of it."""
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


def _check(prefix: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise SourceError(f"the checkpoint lacks {prefix}{name}")
        # one reduction, no array of flags: a sum is finite only if all of it is
        if not torch.isfinite(parameter.sum()):
            raise SourceError(f"{prefix}{name} holds NaN or infinite weights; the checkpoint is damaged")
