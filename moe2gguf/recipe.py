"""All that decided a conversion, as a file: replayed on the same checkpoint and text it gives the same GGUF.

JSON: how the text was made and its digest, how codes and routers are found, thresholds, pruning, and the type of every
expert and matrix. What is computed from those (codes, routers, thresholds) is computed again.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from moe2gguf import __version__
from moe2gguf.allocate import Allocation, from_json, to_json
from moe2gguf.errors import Moe2ggufError, OutputError
from moe2gguf.settings import Calibration, Quantizer
from moe2gguf.skip import Skipping
from moe2gguf.stats import CalibrationStats

FORMAT_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What was asked for, and what came of it."""

    model: str  # its name; the allocation has the checkpoint's digest
    calibration: Calibration  # its files by name alone
    text_digest: str  # sha256 of the token ids
    quantizer: Quantizer
    skipping: Skipping
    prune_share: float
    allocation: Allocation

    def calibration_on(self, text_paths: tuple[Path, ...]) -> Calibration:
        """With its files where they lie here. Raises Moe2ggufError unless there are as many."""
        names = " ".join(f"--text {path}" for path in self.calibration.text_paths)
        if len(text_paths) != len(self.calibration.text_paths):
            wanted = f"give {names}" if names else "which the model wrote; leave --text out"
            raise Moe2ggufError(
                f"the recipe has {len(self.calibration.text_paths)} files of text, {len(text_paths)} given: {wanted}"
            )
        return dataclasses.replace(self.calibration, text_paths=text_paths)

    def check_text(self, stats: CalibrationStats) -> str | None:
        """What there is to say if the text is not the recipe's. Raises Moe2ggufError if the files are others."""
        if stats.digest == self.text_digest:
            return None
        digests = f"(digest {stats.digest[:12]}, the recipe's {self.text_digest[:12]})"
        if self.calibration.text_paths:
            names = ", ".join(str(path) for path in self.calibration.text_paths)
            raise Moe2ggufError(
                f"{stats.text} is another text than the recipe's {digests}; give the files it was made with, in their "
                f"order: {names}"
            )
        return (
            f"the model wrote another calibration text here {digests}, as it may on another processor: types are the "
            "recipe's, codes will differ"
        )


def save_recipe(recipe: Recipe, path: Path) -> None:
    """JSON, written aside and renamed."""
    calibration = vars(recipe.calibration).copy()
    calibration["text_paths"] = [path.name for path in recipe.calibration.text_paths]
    content = {
        "format": FORMAT_VERSION,
        "moe2gguf": __version__,
        "model": recipe.model,
        "calibration": calibration,
        "text_digest": recipe.text_digest,
        "quantizer": vars(recipe.quantizer),
        "skipping": vars(recipe.skipping),
        "prune_share": recipe.prune_share,
        "allocation": to_json(recipe.allocation),
    }
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another --recipe") from error


def load_recipe(path: Path) -> Recipe:
    """Raises Moe2ggufError for a file that is not one of ours, or of another version."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT_VERSION:
            calibration = content["calibration"]
            calibration["text_paths"] = tuple(Path(name) for name in calibration["text_paths"])
            return Recipe(
                content["model"],
                Calibration(**calibration),
                content["text_digest"],
                Quantizer(**content["quantizer"]),
                Skipping(**content["skipping"]),
                content["prune_share"],
                from_json(content["allocation"]),
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Moe2ggufError(f"{path} is not a recipe of `moe2gguf convert --recipe` ({error})") from error
    raise Moe2ggufError(f"{path} has format {content['format']}, this version reads {FORMAT_VERSION}; convert anew")
