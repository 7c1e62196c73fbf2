import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from moe2gguf.errors import Moe2ggufError
from moe2gguf.text import CalibrationText, text_from_files


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("qwen3_moe")


@pytest.fixture(scope="module")
def ids_of(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


WORDS = " ".join(f"the {i}th keeper counted ships" for i in range(60))


def written(tmp_path, name: str, text: str):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_sequences_are_cut_from_the_text(tmp_path, folder, ids_of):
    """All whole sequences, in order, when no fewer are asked for; the rest at the end is dropped."""
    path, ids = written(tmp_path, "a.txt", WORDS), ids_of(WORDS)
    n_whole = len(ids) // 16
    assert len(ids) % 16 and n_whole > 10
    for wanted in (n_whole, 10 * n_whole):
        text = text_from_files((path,), folder, wanted, 16)
        assert text.tokens_SL.tolist() == [ids[i * 16 : i * 16 + 16] for i in range(n_whole)]
    assert text.tokens_SL.dtype == np.int64 and text.origin == "a.txt"


@pytest.mark.parametrize("n_sequences", [1, 2, 3, 7])
def test_few_sequences_span_the_text(tmp_path, folder, n_sequences):
    path = written(tmp_path, "a.txt", WORDS)
    every = text_from_files((path,), folder, 10**6, 16).tokens_SL
    some = text_from_files((path,), folder, n_sequences, 16).tokens_SL
    assert some.shape == (n_sequences, 16)
    found = [next(i for i, row in enumerate(every) if np.array_equal(row, s)) for s in some]
    assert found == sorted({*found})  # none twice
    assert found[0] == 0 and (n_sequences == 1 or found[-1] == len(every) - 1)


def test_files_are_joined_in_the_order_given(tmp_path, folder, ids_of):
    """Sequences run across the border of two files, so that short files count too."""
    a, b = written(tmp_path, "a.txt", WORDS[:200]), written(tmp_path, "b.txt", WORDS[200:500])
    ids = ids_of(WORDS[200:500]) + ids_of(WORDS[:200])
    text = text_from_files((b, a), folder, 1000, 16)
    assert text.tokens_SL.ravel().tolist() == ids[: text.tokens_SL.size] and len(ids) - text.tokens_SL.size < 16
    assert text.origin == "b.txt, a.txt"


def test_exactly_one_sequence(tmp_path, folder, ids_of):
    n = len(ids_of(WORDS))
    assert text_from_files((written(tmp_path, "a.txt", WORDS),), folder, 5, n).tokens_SL.shape == (1, n)
    with pytest.raises(Moe2ggufError, match=f"has {n} tokens, one sequence needs {n + 1}; give more --text"):
        text_from_files((tmp_path / "a.txt",), folder, 5, n + 1)


def test_sequences_begin_as_the_models_text_does(tmp_path, folder, ids_of):
    """BOS in place of the first token where the tokenizer puts it before all text, and only there."""
    path, ids = written(tmp_path, "a.txt", WORDS), np.array(ids_of(WORDS))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|end|>")
    for has_it in (False, True):
        if has_it:
            tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", bos)])
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>").save_pretrained(tmp_path)
        found_SL, n = text_from_files((path,), tmp_path, 1000, 16).tokens_SL, len(ids) // 16
        assert (found_SL[:, 1:] == ids[: n * 16].reshape(n, 16)[:, 1:]).all()
        assert (found_SL[:, 0] == (bos if has_it else ids[: n * 16 : 16])).all()


@pytest.mark.parametrize("content", [b"", b"short"])
def test_too_short(tmp_path, folder, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(Moe2ggufError, match=r"the calibration text has \d+ tokens, one sequence needs 16"):
        text_from_files((tmp_path / "a.txt",), folder, 5, 16)


def test_unreadable(tmp_path, folder):
    (tmp_path / "latin.txt").write_bytes("Prüfung ".encode("latin-1") * 100)
    for name in ("latin.txt", "missing.txt"):
        with pytest.raises(Moe2ggufError, match=rf"cannot read the text .*{name}"):
            text_from_files((tmp_path / name,), folder, 5, 16)


def test_digest_is_of_the_tokens():
    tokens_SL = np.arange(12).reshape(3, 4)
    digest = CalibrationText(tokens_SL, "a").digest
    assert CalibrationText(tokens_SL.astype(np.int64), "b").digest == digest
    assert CalibrationText(np.asfortranarray(tokens_SL), "a").digest == digest
    assert CalibrationText(tokens_SL + 1, "a").digest != digest
