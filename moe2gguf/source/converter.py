"""llama.cpp's converter out of the runtime's tree, as a library: its model classes run up to the writing.

With no path, gguf's writer only records: key-values, and tensors that are still lazy. Nothing here calls its
methods that write, so no intermediate file exists.
"""

import difflib
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import gguf
import torch
import transformers

from moe2gguf.errors import SourceError
from moe2gguf.runtime import find_runtime
from moe2gguf.source.checkpoint import published_name, read_json
from moe2gguf.source.pre_tokenizer import pre_tokenizer_name

CONVERTER_LOGGERS = ("hf-to-gguf", "gguf", "transformers")
# whose converters want config.json as it is published: transformers gives some of it other names, or none
CONFIGURED_AS_PUBLISHED = ("MimoV2Model", "MiniMaxM3Model", "Step35Model")
# dots.llm1 calls the sigmoid of its scores by how experts are then chosen
GATING_NAMES = {"noaux_tc": "sigmoid"}
# whose converters insist on add_bos_token, which transformers does not tell of a tokenizer.json; gguf reads it there
WITHOUT_BOS_CHECK = ("DeepseekV32Model",)


def convert_lazily(
    folder: Path,
    *,
    pre_tokenizer: str | None,
    model_name: str | None,
    metadata_file: Path | None,
) -> Any:
    """A ModelBase of the converter whose gguf_writer has recorded everything that it would write.

    Raises SourceError if architecture or tokenizer are unknown or the converter rejects the checkpoint.
    """
    with _quiet(), torch.inference_mode():
        conversion = _import_conversion()
        model_class = _model_class(conversion, folder)
        if pre_tokenizer is not None and pre_tokenizer not in known_pre_tokenizers(model_class):
            raise _unknown_pre_tokenizer(f"{pre_tokenizer} is not a pre-tokenizer of llama.cpp", model_class)
        # heads that predict further tokens: transformers does not run them, so nothing could be measured of theirs
        model_class.no_mtp = True
        as_published = model_class.__name__ in CONFIGURED_AS_PUBLISHED
        # until metadata are read
        stack = ExitStack()
        try:
            # ALL_F32 because it loses nothing: the type each tensor gets is decided later, by us
            model = model_class(
                folder,
                gguf.LlamaFileType.ALL_F32,
                folder,
                model_name=model_name,
                metadata_override=metadata_file,
                hparams=read_json(folder / "config.json") if as_published else None,
            )
            if model_class.__name__ in WITHOUT_BOS_CHECK:
                model.set_vocab = model._set_vocab_gpt2
            if model.hparams.get("scoring_func") in GATING_NAMES:
                model.hparams["scoring_func"] = GATING_NAMES[model.hparams["scoring_func"]]
            # Mistral's hands everything on to one of two
            model = getattr(model, "impl", model)
            if (name := published_name(folder)) is not None:
                model.dir_model_card = stack.enter_context(_named_folder(folder, name))
            _refuse_nvfp4(folder, model.hparams)
            by_hash = model.get_vocab_base_pre
            model.get_vocab_base_pre = lambda tokenizer: _pre_tokenizer(
                tokenizer, folder, pre_tokenizer, by_hash, model_class
            )
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
        except SourceError:
            raise
        # assertions, and whatever the libraries underneath raise: all of it means "not this checkpoint"
        except Exception as error:
            raise _not_read(folder, error) from error
        finally:
            stack.close()
    return model


@contextmanager
def _named_folder(folder: Path, name: str) -> Iterator[Path]:
    """What gguf reads names and metadata out of: the checkpoint's card and configuration, in a folder of the model's
    name."""
    with TemporaryDirectory() as parent:
        (named := Path(parent) / name).mkdir()
        for file in ("README.md", "config.json", "generation_config.json"):
            if (folder / file).is_file():
                (named / file).symlink_to((folder / file).resolve())
        yield named


def dequantised(folder: Path, read: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, Callable[[], torch.Tensor]]:
    """Of the tensors of a quantised checkpoint, by name, those that they stand for, decoded as the converter does.

    Raises SourceError for a way of quantising that it does not know.
    """
    conversion = _import_conversion()
    hparams = conversion.ModelBase.load_hparams(folder, False)
    hparams |= hparams.get("text_config", {})
    _refuse_nvfp4(folder, hparams)
    # what this one method needs: the class itself would look for tensors under names of its own
    model = object.__new__(_model_class(conversion, folder))
    model.hparams, model.model_tensors = hparams, dict(read)
    model.lazy = model._is_nvfp4 = model._is_mxfp4 = model._fp8_as_q8 = False
    try:
        model.dequant_model()
    except Exception as error:
        raise _not_read(folder, error) from error
    return model.model_tensors


def known_pre_tokenizers(model_class: Any) -> list[str]:
    """The names its hash table can give, sorted."""
    return sorted(set(re.findall(r'res = "([^"]+)"', inspect.getsource(model_class.get_vocab_base_pre))))


def _import_conversion() -> ModuleType:
    if "conversion" in sys.modules:
        return sys.modules["conversion"]
    package = find_runtime().tree / "conversion"
    spec = importlib.util.spec_from_file_location(
        "conversion", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conversion"] = module
    # without it the converter puts the tree's gguf-py on sys.path; the runtime has installed that one already
    os.environ["NO_LOCAL_GGUF"] = "1"
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["conversion"]
        raise
    finally:
        del os.environ["NO_LOCAL_GGUF"]
    return module


def _model_class(conversion: ModuleType, folder: Path) -> Any:
    config = read_json(folder / "config.json")
    try:
        hf_architecture = conversion.get_model_architecture(config, conversion.ModelType.TEXT)
    except ValueError as error:
        raise SourceError(f"{folder / 'config.json'} names no architecture; add it as the original has it") from error
    try:
        return conversion.get_model_class(hf_architecture)
    except NotImplementedError as error:
        close = difflib.get_close_matches(hf_architecture, conversion.TEXT_MODEL_MAP, n=3)
        raise SourceError(
            f"{folder} is a {hf_architecture}, which llama.cpp's converter does not know"
            + (f" (close: {', '.join(close)})" if close else "")
            + f"; `python {find_runtime().tree / 'convert_hf_to_gguf.py'} --print-supported-models` lists all"
        ) from error


def _not_read(folder: Path, error: Exception) -> SourceError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, AssertionError) and not str(error):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason += f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"
    return SourceError(f"llama.cpp's converter cannot read {folder}: {reason}")


def _refuse_nvfp4(folder: Path, hparams: dict[str, Any]) -> None:
    """The converter repacks it while it opens a checkpoint: the whole model would be in memory."""
    if "NVFP4" in json.dumps(hparams.get("quantization_config") or {}).upper():
        raise SourceError(f"{folder} is quantised to NVFP4, which cannot be read lazily; give the original")


def _pre_tokenizer(tokenizer: Any, folder: Path, override: str | None, by_hash: Any, model_class: Any) -> str:
    if override is not None:
        return override
    try:
        return by_hash(tokenizer)
    except NotImplementedError:
        pass
    file = folder / "tokenizer.json"
    if not file.is_file() and any(folder.glob("*tiktoken*")):
        raise NotImplementedError  # converters that read it themselves take it from here
    text = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.backend_tokenizer.to_str()
    name = pre_tokenizer_name(json.loads(text))
    if name is None:
        raise _unknown_pre_tokenizer(f"the BPE pre-tokenizer of {folder} is not one that llama.cpp has", model_class)
    return name


def _unknown_pre_tokenizer(problem: str, model_class: Any) -> SourceError:
    names = ", ".join(known_pre_tokenizers(model_class))
    return SourceError(f"{problem}; name the one that splits text alike with --pre-tokenizer NAME, out of {names}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the converter and transformers from logging a line per tensor, unless that is asked for."""
    if logging.getLogger().isEnabledFor(logging.INFO):
        yield
        return
    loggers = [logging.getLogger(name) for name in CONVERTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars_shown = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars_shown:
            transformers.utils.logging.enable_progress_bar()
