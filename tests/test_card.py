"""The model card says what the file is."""

import hashlib
import json
from pathlib import Path

import pytest

from moe2gguf.card import write_card
from moe2gguf.errors import OutputError
from moe2gguf.evaluate import Evaluation
from tests.gguf_files import MIXED, random_orders, random_weights, write_moe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    extra = {
        "moe2gguf.version": "0.1.0",
        "moe2gguf.source.name": "Some MoE",
        "moe2gguf.recipe": json.dumps({"budget": "2.54 bits per weight"}),
        "qwen3moe.expert_skip_ratio": [0.25, 0.125, 0.0],
    }
    path = tmp_path / "some.gguf"
    return write_moe(path, random_weights(), expert_types=MIXED, orders=random_orders(), extra_kv=extra)


def test_card_names_bytes_hash_recipe_and_how_to_run(file: Path) -> None:
    card = write_card(file).read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: gguf\n") and "# Some MoE, " in card
    assert f"| some.gguf | {file.stat().st_size:,} | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in card
    assert 'Llama(model_path="some.gguf")' in card and "moe2gguf runtime install" in card
    assert '{"qwen3moe.expert_skip_strength": 0.0}' in card
    assert 'moe2gguf.recipe = {"budget": "2.54 bits per weight"}' in card and "moe2gguf.version = 0.1.0" in card
    assert "](some-types.svg)" in card and (file.parent / "some-types.svg").stat().st_size > 0
    assert "KL divergence" not in card


def test_the_hub_is_told_what_it_is_made_of(tmp_path: Path) -> None:
    """In the front matter, by which the Hub lists a file under its model."""
    extra = {"moe2gguf.source.repository": "Qwen/Qwen3-30B-A3B", "general.license": "apache-2.0"}
    file = write_moe(tmp_path / "a.gguf", random_weights(), extra_kv=extra)
    front = write_card(file).read_text(encoding="utf-8").split("---\n")[1]
    assert "license: apache-2.0\nbase_model: Qwen/Qwen3-30B-A3B\nbase_model_relation: quantized\n" in front


def test_what_was_measured_is_in_the_table(file: Path) -> None:
    measured = Evaluation(
        file, 512, 4, 1020, 21.5, 0.3, 20.25, 0.25, 0.06, 0.01, 0.02822, 0.0004, 0.2, 0.5, 1.25, 0.89, 0.01, None
    )
    card = write_card(file, [measured], text_name="held-out.txt").read_text(encoding="utf-8")
    assert "1,020 predictions in 4 chunks of 512 tokens of held-out.txt" in card and "20.250 ± 0.250" in card
    assert "| some.gguf | 21.500 ± 0.300 | 0.02822 ± 0.00040 | 0.2000 | 1.250 | 89.00% |" in card


def test_a_readme_that_is_there_stays(file: Path) -> None:
    (file.parent / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"README\.md exists; pass --force"):
        write_card(file)
    assert (file.parent / "README.md").read_text() == "mine"
    assert write_card(file, overwrite=True).read_text(encoding="utf-8") != "mine"
