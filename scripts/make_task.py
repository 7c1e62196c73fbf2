#!/usr/bin/env python3
"""A small task for lm-evaluation-harness, from CPython's documentation: which of four sentences comes next?

    python scripts/make_task.py bench-out/next_sentence.yaml
    moe2gguf bench demo --quick --tasks bench-out/next_sentence.yaml

The questions go beside it. Wrong answers are sentences of other topics, each about as long as the right one.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import click
import yaml

CONTEXT_SENTENCES = 3
CHOICES = 4
SENTENCE_CHARACTERS = range(60, 200)


def sentences(topic: str) -> Iterator[str]:
    """Of its paragraphs of prose."""
    for paragraph in topic.split("\n\n"):
        if re.match(r"[A-Z]", paragraph):
            yield from re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))


def questions(n: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    by_topic = {name: list(sentences(text)) for name, text in sorted(topics.items())}
    answers = [(name, s) for name, own in by_topic.items() for s in own if len(s) in SENTENCE_CHARACTERS]
    found = []
    for name, own in by_topic.items():
        for i in range(CONTEXT_SENTENCES, len(own), CONTEXT_SENTENCES + 1):
            if len(own[i]) in SENTENCE_CHARACTERS:
                others = sorted(
                    (abs(len(s) - len(own[i])), s) for other, s in answers if other != name and s not in own
                )
                choices = [own[i], *(s for _, s in rng.sample(others[:40], CHOICES - 1))]
                rng.shuffle(choices)
                context = " ".join(own[i - CONTEXT_SENTENCES : i])
                found.append({"context": context, "choices": choices, "label": choices.index(own[i])})
    return sorted(rng.sample(found, n), key=lambda question: question["context"])


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--questions", "n", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(path: Path, n: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = path.with_suffix(".jsonl").resolve()
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions(n, seed)), encoding="utf-8")
    task = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(rows)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    click.echo(f"{path}: {n} questions")


if __name__ == "__main__":
    main()
