"""lm-evaluation-harness on a GGUF file, through llama-cpp-python, as any of its users would run it.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import yaml
from llama_cpp import Llama
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from moe2gguf.errors import Moe2ggufError
from moe2gguf.record import TaskScore


def run_tasks(file: Path, tasks: Sequence[str], *, n_ctx: int, n_threads: int) -> list[TaskScore]:
    """A task is a name that the harness knows, or a YAML file of one."""
    given = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task for task in tasks if Path(task) not in given]
    folders = sorted({str(path.resolve().parent) for path in given})
    # reading all of the harness's own takes longer than a small task
    manager = TaskManager(include_path=folders, include_defaults=bool(names))
    names += [yaml.safe_load(path.read_text(encoding="utf-8"))["task"] for path in given]
    model = GgufModel(file, n_ctx, n_threads)
    try:
        results = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, log_samples=False)
    finally:
        model.close()
    if not results:
        raise Moe2ggufError(f"lm-evaluation-harness returns nothing for {', '.join(tasks)}")
    scores = []
    for task, found in sorted(results["results"].items()):
        for key, value in sorted(found.items()):
            metric, _, which = key.partition(",")
            # "acc,none": 0.5, "acc_stderr,none": 0.01 or "N/A"
            if which and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr,{which}")
                scores.append(
                    TaskScore(file.name, task, metric, float(value), float(error) if isinstance(error, float) else None)
                )
    return scores


class GgufModel(TemplateLM):
    """What the harness asks of a model, one request after the other."""

    def __init__(self, file: Path, n_ctx: int, n_threads: int):
        super().__init__()
        self._n_ctx = n_ctx  # llama.cpp rounds its own up, and llama-cpp-python's buffers do not follow
        self._llama = Llama(str(file), n_ctx=n_ctx, n_threads=n_threads, n_batch=n_ctx, logits_all=True, verbose=False)

    def close(self) -> None:
        self._llama.close()

    @property
    def eot_token_id(self) -> int:
        return self._llama.token_eos()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        return self._llama.tokenize(string.encode("utf-8"), add_bos=bool(add_special_tokens), special=False)

    def _loglikelihood_tokens(self, requests: list, **options: Any) -> list[tuple[float, bool]]:
        return [self._continuation(context, continuation) for _, context, continuation in requests]

    def _continuation(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Its log-probability, and whether greedy decoding writes it."""
        tokens = [*context, *continuation][-self._n_ctx :]
        n_scored = min(len(continuation), len(tokens) - 1)
        targets_T = np.array(tokens[-n_scored:])
        self._llama.reset()
        self._llama.eval(tokens[:-1])
        logits_TV = self._llama.scores[len(tokens) - 1 - n_scored : len(tokens) - 1].astype(np.float64)
        logits_TV -= logits_TV.max(axis=1, keepdims=True)
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        logp_T = logp_TV[np.arange(n_scored), targets_T]
        return float(logp_T.sum()), bool((logp_TV.argmax(axis=1) == targets_T).all())

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Texts longer than the context are cut into parts, each after the token that ends a text."""
        n_part = self._n_ctx - 1
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            parts = [tokens[i : i + n_part] for i in range(0, len(tokens), n_part)]
            found.append(sum(self._continuation([self.prefix_token_id], part)[0] for part in parts))
        return found

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        written = []
        for request in requests:
            prompt, options = request.args
            until = options.get("until", [])
            done = self._llama(
                prompt,
                max_tokens=options.get("max_gen_toks", 256),
                stop=[until] if isinstance(until, str) else until,
                temperature=0.0,
            )
            assert isinstance(done, dict)  # not a stream
            written.append(done["choices"][0]["text"])
        return written
