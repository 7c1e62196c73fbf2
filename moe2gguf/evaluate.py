"""Perplexity and KL divergence against a full-precision file, in the way llama-perplexity measures them.

The text is cut into chunks of n_ctx tokens; the first token of a chunk becomes BOS where the vocabulary wants
one, and the predictions from the chunk's second half are scored. Chunk by chunk every model runs on the same
tokens, so no logits are stored and none are rounded. llama-perplexity's file of base log-probabilities holds
16 bits of each and ends 16 nats below the likeliest token.

Shapes: T scored predictions of one chunk, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from moe2gguf.errors import Moe2ggufError
from moe2gguf.llama import OpenModel, available_cores, captured_log, open_model

Progress = Callable[[int, int, str], None]  # chunks done, chunks in all, name of the base file

_HELD_OUT_PERCENT = 3  # the bundled model was trained on modules whose hash falls at 5 or above
_BLOCK_BYTES = 8192
_ROWS_AT_ONCE = 32  # rows of V log-probabilities held in double precision


@dataclass(frozen=True)
class Evaluation:
    """One file against the base on the same tokens, in nats. Errors are standard errors of the mean."""

    path: Path
    n_ctx: int
    n_chunks: int
    n_tokens: int  # scored predictions
    perplexity: float
    perplexity_error: float
    base_perplexity: float
    base_perplexity_error: float
    delta_nll: float  # mean ln(PPL / base PPL), paired by token
    delta_nll_error: float
    kld_mean: float
    kld_error: float
    kld_99: float
    kld_999: float
    kld_max: float
    same_top: float  # share of predictions whose likeliest token is the base's
    same_top_error: float
    skipped: float | None  # share of expert activations left out, where llama.cpp counts them


def evaluate(
    base_path: str | Path,
    candidate_paths: Sequence[str | Path],
    text: str,
    *,
    n_ctx: int = 512,
    max_chunks: int | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]:
    """One Evaluation per candidate, in order. All models are open at once, memory-mapped.

    Raises Moe2ggufError where a file does not load, vocabularies differ, or the text is shorter than a chunk.
    """
    n_threads = n_threads or available_cores()
    paths = [Path(path) for path in (base_path, *candidate_paths)]
    # models side by side, each on its share of the cores: threads of one small model mostly wait
    n_side_by_side = min(n_threads, len(paths))
    with ExitStack() as stack:
        errors = stack.enter_context(captured_log())
        models = []
        for path in paths:
            opened = open_model(
                path,
                errors,
                sequence_tokens=n_ctx,
                n_batch=n_ctx,
                n_sequences=1,
                n_threads=n_threads // n_side_by_side,
            )
            models.append(_Model(path, stack.enter_context(opened), n_ctx))
        base, *candidates = models
        for candidate in candidates:
            if candidate.n_vocab != base.n_vocab:
                raise Moe2ggufError(
                    f"{candidate.path} has a vocabulary of {candidate.n_vocab} tokens, {base.path} one of "
                    f"{base.n_vocab}; only files of the same model can be compared"
                )
        chunks = base.chunks(text, n_ctx)[:max_chunks]
        if not len(chunks):
            raise Moe2ggufError(
                f"the text has {base.n_tokens(text)} tokens, one chunk needs {n_ctx}; give a longer text"
            )
        base_nll: list[np.ndarray] = []
        scores: list[list[_Scores]] = [[] for _ in candidates]
        pool = stack.enter_context(ThreadPoolExecutor(n_side_by_side))
        for number, tokens in enumerate(chunks):
            if progress:
                progress(number, len(chunks), base.path.name)
            targets_T = tokens[n_ctx // 2 + 1 :]
            base_logp_TV, *logps = pool.map(lambda model, tokens=tokens: _log_softmax(model.logits(tokens)), models)
            base_nll.append(_nll(base_logp_TV, targets_T))
            for candidate_scores, logp_TV in zip(scores, logps, strict=True):
                candidate_scores.append(_compare(base_logp_TV, logp_TV, targets_T))
        if progress:
            progress(len(chunks), len(chunks), base.path.name)
        base_nll_all = np.concatenate(base_nll)
        return tuple(
            _summarise(candidate, len(chunks), base_nll_all, candidate_scores)
            for candidate, candidate_scores in zip(candidates, scores, strict=True)
        )


@dataclass(frozen=True)
class _Scores:
    """Of one chunk."""

    nll_T: np.ndarray
    kld_T: np.ndarray
    same_top_T: np.ndarray


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """f32 (T, V) -> f32 (T, V); the sums run in double precision."""
    logp_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    logp_TV -= np.log(np.exp(logp_TV).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logp_TV


def _nll(logp_TV: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
    return -logp_TV[np.arange(len(targets_T)), targets_T].astype(np.float64)


def _compare(base_logp_TV: np.ndarray, logp_TV: np.ndarray, targets_T: np.ndarray) -> _Scores:
    kld_T = np.empty(len(targets_T))
    for start in range(0, len(targets_T), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        base_logp = base_logp_TV[rows].astype(np.float64)
        kld_T[rows] = (np.exp(base_logp) * (base_logp - logp_TV[rows])).sum(axis=1)
    same_top_T = base_logp_TV.argmax(axis=1) == logp_TV.argmax(axis=1)
    return _Scores(_nll(logp_TV, targets_T), kld_T, same_top_T)


def _summarise(model: _Model, n_chunks: int, base_nll: np.ndarray, chunks: list[_Scores]) -> Evaluation:
    nll = np.concatenate([c.nll_T for c in chunks])
    kld = np.concatenate([c.kld_T for c in chunks])
    perplexity, base_perplexity = math.exp(nll.mean()), math.exp(base_nll.mean())
    same_top = float(np.concatenate([c.same_top_T for c in chunks]).mean())
    return Evaluation(
        path=model.path,
        n_ctx=model.n_ctx,
        n_chunks=n_chunks,
        n_tokens=len(nll),
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(nll),
        base_perplexity=base_perplexity,
        base_perplexity_error=base_perplexity * _standard_error(base_nll),
        delta_nll=float((nll - base_nll).mean()),
        delta_nll_error=_standard_error(nll - base_nll),
        kld_mean=float(kld.mean()),
        kld_error=_standard_error(kld),
        kld_99=float(np.quantile(kld, 0.99)),
        kld_999=float(np.quantile(kld, 0.999)),
        kld_max=float(kld.max()),
        same_top=same_top,
        same_top_error=math.sqrt(same_top * (1 - same_top) / (len(nll) - 1)),
        skipped=model.skipped_share,
    )


def _standard_error(values: np.ndarray) -> float:
    return float(values.std() / math.sqrt(len(values) - 1))


class _Model:
    """A model and a context of n_ctx tokens, through llama.cpp's C interface.

    The high-level `Llama` keeps the logits of every token; here they are asked for where they are scored.
    """

    def __init__(self, path: Path, opened: OpenModel, n_ctx: int):
        self.path = path
        self.n_ctx = n_ctx
        self._opened = opened
        self._llama, self._context, self._vocab = opened.lib, opened.context, opened.vocab
        self.n_vocab = opened.n_vocab

    @property
    def skipped_share(self) -> float | None:
        return self._opened.skipped_share()

    def _tokenize(self, text: str) -> np.ndarray:
        # special tokens as llama-perplexity has them: added if the model wants them, never parsed out
        data = text.encode("utf-8")
        n_max = len(data) + 2
        buffer = (self._llama.llama_token * n_max)()
        n_tokens = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, n_max, True, False)
        assert 0 <= n_tokens <= n_max  # no token is shorter than a byte
        return np.ctypeslib.as_array(buffer)[:n_tokens]

    def n_tokens(self, text: str) -> int:
        return len(self._tokenize(text))

    def chunks(self, text: str, n_ctx: int) -> np.ndarray:
        """i32 (chunks, n_ctx); a rest that fills no chunk is dropped."""
        tokens = self._tokenize(text)
        n_chunks = len(tokens) // n_ctx
        chunks = tokens[: n_chunks * n_ctx].reshape(n_chunks, n_ctx).copy()
        if self._llama.llama_vocab_get_add_bos(self._vocab):
            chunks[:, 0] = self._llama.llama_vocab_bos(self._vocab)
        return chunks

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """i32 (n_ctx,) -> f32 (T, V), predictions of positions n_ctx/2 + 1 and up, until the next call."""
        llama, n_ctx = self._llama, self.n_ctx
        first = n_ctx // 2
        self._opened.forget()
        batch = llama.llama_batch_init(n_ctx, 0, 1)
        try:
            batch.n_tokens = n_ctx
            for position, token in enumerate(tokens.tolist()):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = first <= position < n_ctx - 1
            status = llama.llama_decode(self._context, batch)
        finally:
            llama.llama_batch_free(batch)
        if status != 0:
            raise Moe2ggufError(f"{self.path}: llama.cpp failed to run a chunk of {n_ctx} tokens (status {status})")
        n_scored = n_ctx - 1 - first
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), (n_scored, self.n_vocab))


def held_out_text(max_bytes: int) -> str:
    """At most max_bytes (UTF-8) of text that every CPython has and the bundled model never saw.

    Half English documentation (`pydoc_data.topics`), half library modules, in alternating blocks of up to
    8 KiB and in a fixed order.
    """
    prose, code = _blocks(_documentation()), _blocks(_held_out_modules())
    parts: list[str] = []
    n_bytes = 0
    for pair in zip(prose, code, strict=False):  # ends with the shorter of the two, so that the halves stay halves
        for block in pair:
            data = block.encode("utf-8")[: max_bytes - n_bytes]
            parts.append(data.decode("utf-8", "ignore"))
            n_bytes += len(data)
        if n_bytes >= max_bytes:
            break
    return "".join(parts)


def _blocks(pieces: Iterator[str]) -> Iterator[str]:
    """Whole lines, _BLOCK_BYTES or a little less at a time: equal blocks make equal halves."""
    block: list[str] = []
    n_bytes = 0
    for piece in pieces:
        for line in piece.splitlines(keepends=True):
            n_line_bytes = len(line.encode("utf-8"))
            if n_bytes + n_line_bytes > _BLOCK_BYTES and block:
                yield "".join(block)
                block, n_bytes = [], 0
            block.append(line)
            n_bytes += n_line_bytes


def _documentation() -> Iterator[str]:
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text.strip() + "\n\n"


def _held_out_modules() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if relative.parts[0] in installed:
            continue
        if int(hashlib.md5(relative.as_posix().encode()).hexdigest(), 16) % 100 >= _HELD_OUT_PERCENT:
            continue
        try:
            yield path.read_text(encoding="utf-8").strip() + "\n\n"
        except UnicodeDecodeError:
            continue  # a few test modules are in other encodings on purpose


def render_evaluations(evaluations: Sequence[Evaluation]) -> RenderableType:
    first = evaluations[0]
    table = Table(
        title=f"{first.n_tokens:,} predictions in {first.n_chunks} chunks of {first.n_ctx} tokens; base "
        f"perplexity {first.base_perplexity:.4f} ± {first.base_perplexity_error:.4f}",
        title_justify="left",
        box=None,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    table.add_column("file")
    for header in ("perplexity", "Δ ln PPL", "mean KLD", "99 %", "99.9 %", "max KLD", "same top"):
        table.add_column(header, justify="right")
    for e in evaluations:
        table.add_row(
            e.path.name,
            f"{e.perplexity:.4f} ± {e.perplexity_error:.4f}",
            f"{e.delta_nll:.5f} ± {e.delta_nll_error:.5f}",
            f"{e.kld_mean:.5f} ± {e.kld_error:.5f}",
            f"{e.kld_99:.4f}",
            f"{e.kld_999:.4f}",
            f"{e.kld_max:.4f}",
            f"{e.same_top:.2%} ± {e.same_top_error:.2%}",
        )
    return table
