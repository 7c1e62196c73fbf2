"""lm-evaluation-harness sees the probabilities of the model, where it is installed (pip install 'moe2gguf[tasks]')."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from moe2gguf.pipeline import write_float
from tests.tiny_moe import CORPUS, load_whole

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def checkpoint(needs_runtime: None, tiny) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory) -> Path:
    return write_float(checkpoint, tmp_path_factory.mktemp("tasks") / "tiny.gguf", ftype="f32")


def log_probability(checkpoint: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        logits_TV = load_whole(checkpoint)(torch.tensor([[*context, *continuation]])).logits[0]
    targets_T = torch.tensor(continuation)
    logp_TV = logits_TV[len(context) - 1 : -1].log_softmax(-1)
    greedy = bool((logp_TV.argmax(-1) == targets_T).all())
    return float(logp_TV[torch.arange(len(continuation)), targets_T].sum()), greedy


def test_log_probabilities_are_transformers(checkpoint: Path, file: Path) -> None:
    from moe2gguf.tasks import GgufModel

    model = GgufModel(file, 128, 1)
    try:
        context, continuation = model.tok_encode(CORPUS[0]), model.tok_encode(CORPUS[1])
        ours = model._loglikelihood_tokens([(("", ""), context, continuation)])[0]
        theirs = log_probability(checkpoint, context, continuation)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3) and ours[1] == theirs[1]
        # a text longer than the context is cut, each part after the token that ends a text
        (rolled,) = model.loglikelihood_rolling([SimpleNamespace(args=(CORPUS[0] * 4,))])
        tokens = model.tok_encode(CORPUS[0] * 4)
        assert len(tokens) > 127
        parts = [tokens[i : i + 127] for i in range(0, len(tokens), 127)]
        expected = sum(log_probability(checkpoint, [model.prefix_token_id], part)[0] for part in parts)
        assert rolled == pytest.approx(expected, rel=1e-3)
        (written,) = model.generate_until([SimpleNamespace(args=(CORPUS[0], {"max_gen_toks": 4, "until": []}))])
        assert isinstance(written, str)
    finally:
        model.close()


def test_a_local_task(file: Path, tmp_path: Path) -> None:
    from moe2gguf.tasks import GgufModel, run_tasks

    questions = [(CORPUS[i % 4][:40], [CORPUS[0][40:60], CORPUS[1][40:60]]) for i in range(6)]
    model = GgufModel(file, 128, 1)
    try:
        scores = [[model._encode_pair(text, choice) for choice in choices] for text, choices in questions]
        sums = [[model._continuation(*pair)[0] for pair in pairs] for pairs in scores]
    finally:
        model.close()
    best = [row.index(max(row)) for row in sums]
    labels = [best[0], best[1], best[2], 1 - best[3], 1 - best[4], best[5]]  # four of six as the model answers
    rows = [{"text": t, "choices": c, "label": l} for (t, c), l in zip(questions, labels, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "endings.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    (score,) = run_tasks(file, [str(tmp_path / "endings.yaml")], n_ctx=128, n_threads=1)
    assert (score.file, score.task, score.metric) == ("tiny.gguf", "endings", "acc")
    assert score.value == pytest.approx(4 / 6) and score.error is not None
