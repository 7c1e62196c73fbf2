"""A recipe gives the same file again, and says so where it cannot."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe2gguf.cli import main
from moe2gguf.errors import Moe2ggufError
from moe2gguf.pipeline import ConvertResult, convert
from moe2gguf.recipe import load_recipe, save_recipe
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.skip import Skipping
from moe2gguf.stats import CalibrationStats
from tests.conftest import cheap_measurements


@pytest.fixture(scope="module")
def made(tiny, small_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> ConvertResult:
    """Every setting another than the default; the budget reached exactly by no accident of rounding."""
    with cheap_measurements():
        return convert(
            tiny("mixtral"), tmp_path_factory.mktemp("recipe") / "a.gguf", bits=3.9, layout="stock", max_groups=3,
            calibration=dataclasses.replace(small_calibration, seed=5), prune_share=1 / 3,
            quantizer=Quantizer(affinity="none", router="none"), skipping=Skipping(0.1, 0.05),
        )  # fmt: skip


def test_what_is_saved_is_what_is_loaded(made: ConvertResult, tmp_path: Path) -> None:
    save_recipe(made.recipe, tmp_path / "recipe.json")
    found = load_recipe(tmp_path / "recipe.json")
    names = tuple(Path(path.name) for path in made.recipe.calibration.text_paths)
    assert names and found == dataclasses.replace(
        made.recipe, calibration=dataclasses.replace(made.recipe.calibration, text_paths=names)
    )
    # another machine's device, or paths, are nobody's business
    text = (tmp_path / "recipe.json").read_text()
    assert "device" not in text and str(made.recipe.calibration.text_paths[0].parent) not in text


def test_a_replay_is_the_same_file(
    made: ConvertResult, tiny, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, in another folder, and without the solver."""
    save_recipe(made.recipe, tmp_path / "recipe.json")
    monkeypatch.setattr("moe2gguf.pipeline.fit_budget", None)
    arguments = ["convert", str(tiny("mixtral")), "--recipe", str(tmp_path / "recipe.json"), "--text", str(small_text)]
    with cheap_measurements():
        result = CliRunner().invoke(main, [*arguments, "--outfile", str(tmp_path / "b.gguf")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b.gguf").read_bytes() == made.path.read_bytes()


@pytest.mark.parametrize("option", [["--bits", "3"], ["--skip", "0"], ["--no-feedback"], ["--calib", "ebss"]])
def test_a_recipe_decides(option: list[str], made: ConvertResult, tmp_path: Path) -> None:
    save_recipe(made.recipe, tmp_path / "recipe.json")
    result = CliRunner().invoke(main, ["convert", "demo", "--recipe", str(tmp_path / "recipe.json"), *option])
    assert result.exit_code == 2 and "is decided by" in result.output


def test_without_a_recipe_it_is_saved(tiny, small_text: Path, tmp_path: Path) -> None:
    arguments = [
        "convert", str(tiny("mixtral")), "--bits", "3.9", "--no-feedback", "--text", str(small_text),
        "--sequences", "4", "--length", "32", "--probe-tokens", "64", "--outfile", str(tmp_path / "a.gguf"),
    ]  # fmt: skip
    with cheap_measurements():
        result = CliRunner().invoke(main, [*arguments, "--recipe", str(tmp_path / "recipe.json")])
    assert result.exit_code == 0, result.output
    recipe = load_recipe(tmp_path / "recipe.json")
    assert recipe.calibration.n_sequences == 4 and not recipe.quantizer.feedback
    assert recipe.allocation.tensor_bytes <= 3.9 * recipe.allocation.n_params / 8


def test_it_is_saved_while_the_file_could_be_made_again(
    tiny, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the file is written and before the recipe is, the same command has the layers still."""
    calibration = Calibration((small_text,), n_sequences=4, sequence_tokens=32, n_probe_tokens=64)

    def converted(path: Path) -> ConvertResult:
        with cheap_measurements():
            return convert(
                tiny("mixtral"), tmp_path / "a.gguf", bits=3.9, calibration=calibration, recipe_path=path,
                quantizer=Quantizer(router="none", tuning=False), overwrite=True,
            )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr("moe2gguf.pipeline.save_recipe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            converted(tmp_path / "recipe.json")
    written = (tmp_path / "a.gguf").read_bytes()
    monkeypatch.setattr("moe2gguf.encode_experts._LayerWork", None)  # no layer is quantised again
    result = converted(tmp_path / "recipe.json")
    assert result.path.read_bytes() == written and load_recipe(tmp_path / "recipe.json") is not None


def test_another_text(made: ConvertResult, tiny, stats: CalibrationStats, small_text: Path, tmp_path: Path) -> None:
    with pytest.raises(Moe2ggufError, match="is another text than the recipe's"):
        made.recipe.check_text(dataclasses.replace(stats, digest="0" * 64))
    with pytest.raises(Moe2ggufError, match="the recipe has 1 files of text, 0 given: give --text "):
        convert(tiny("mixtral"), tmp_path / "a.gguf", recipe=made.recipe)
    itself = dataclasses.replace(made.recipe.calibration, text_paths=())
    written = dataclasses.replace(made.recipe, calibration=itself)
    with pytest.raises(Moe2ggufError, match="which the model wrote; leave --text out"):
        written.calibration_on((small_text,))
    assert "codes will differ" in str(written.check_text(dataclasses.replace(stats, digest="0" * 64)))
    assert written.check_text(dataclasses.replace(stats, digest=written.text_digest)) is None


def test_another_model(made: ConvertResult, tiny, small_text: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(made.recipe, prune_share=0.0)
    with pytest.raises(Moe2ggufError, match="belongs to another model"):
        convert(tiny("qwen3_moe"), tmp_path / "a.gguf", recipe=recipe, calibration=Calibration((small_text,)))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 3}'])
def test_no_recipe(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(Moe2ggufError, match="is not a recipe"):
        load_recipe(tmp_path / "recipe.json")


def test_a_later_format(made: ConvertResult, tmp_path: Path) -> None:
    save_recipe(made.recipe, tmp_path / "recipe.json")
    content = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(Moe2ggufError, match="has format 99, this version reads 3"):
        load_recipe(tmp_path / "recipe.json")
