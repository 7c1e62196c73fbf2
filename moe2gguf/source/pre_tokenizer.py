"""Which of llama.cpp's BPE pre-tokenizers a tokenizer.json describes.

llama.cpp's converter recognises a pre-tokenizer by a hash over token ids, so a newly trained or fine-tuned
vocabulary is unknown to it although its splitting regexes are a known family's. Here the regexes themselves
are compared, exactly. The names are those that llama-vocab.cpp takes in tokenizer.ggml.pre.
"""

from typing import Any

# Pieces of the regexes below, as the families write them in tokenizer.json.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END_OF_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
CAPITALISED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
SYMBOLS_AND_LINES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{END_OF_LINES}"

# what `tokenizers` applies for ByteLevel(use_regex=True).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END_OF_LINES}"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END_OF_LINES}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{END_OF_LINES}"
)
GPT4O = rf"{CASED_WORD}{CONTRACTIONS}?|{CAPITALISED_WORD}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SYMBOLS_AND_LINES}"
TEKKEN = rf"{CASED_WORD}|{CAPITALISED_WORD}|\p{{N}}|{SYMBOLS_AND_LINES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{END_OF_LINES}"
    ),
)
# cased letters, as ranges
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-"
    "\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57"
    "\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124"
    "\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-"
    "\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0"
    "-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
DEEPSEEK_SYMBOLS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
NEWLINE, TRAILING_SPACE = r"[\r\n]", r"\s+$"
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", "[0-9][0-9][0-9]"
PUNCTUATION = r"\p{P}+"

# splitting steps -> name where merges decide, name where they are ignored for words that are tokens
NAMES: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (GPT2,): ("gpt-2", None),
    (DIGIT, GPT2): ("starcoder", None),
    (PUNCTUATION, GPT2, DIGITS, THREE_DIGITS): ("falcon", None),
    (LLAMA3,): ("dbrx", "llama-bpe"),
    (QWEN2,): ("qwen2", None),
    (QWEN35,): ("qwen35", None),
    (GPT4O,): ("gpt-4o", None),
    (TEKKEN,): (None, "tekken"),
    DEEPSEEK3: ("deepseek-v3", None),
    (NEWLINE, r"\s?\p{L}+", r"\s?\p{P}+", HAN_HANGUL, DIGIT): ("deepseek-coder", None),
    (
        NEWLINE,
        rf"\s?[{DEEPSEEK_LETTERS}]+",
        rf"\s?[{DEEPSEEK_SYMBOLS}]+",
        TRAILING_SPACE,
        HAN_HANGUL,
        DIGIT,
    ): ("deepseek-llm", None),
}


def pre_tokenizer_name(tokenizer_json: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.json, None if unknown."""
    model = tokenizer_json.get("model") or {}
    if model.get("type") != "BPE" or not _keeps_text(tokenizer_json.get("normalizer")):
        return None
    steps = _steps(tokenizer_json.get("pre_tokenizer"))
    if steps is None or steps not in NAMES:
        return None
    by_merges, whole_words = NAMES[steps]
    preferred, other = (whole_words, by_merges) if model.get("ignore_merges") else (by_merges, whole_words)
    # the flag matters only to tokens that no sequence of merges reaches, and training by merges makes none
    return preferred or other


def _keeps_text(normalizer: dict[str, Any] | None) -> bool:
    """Whether a normalizer may be left out, as llama.cpp does for BPE: NFC does nothing to ordinary text."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(_keeps_text(part) for part in normalizer["normalizers"])


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The splitting regexes in order, None where a step has no counterpart."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": parts}:
            steps_of_parts = [_steps(part) for part in parts]
            if any(steps is None for steps in steps_of_parts):
                return None
            return tuple(step for steps in steps_of_parts for step in steps or ())
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return ()
        case {"type": "ByteLevel", "add_prefix_space": False}:  # older files leave use_regex out
            return (GPT2,)
        case {"type": "Digits", "individual_digits": individual}:
            return (DIGIT if individual else DIGITS,)
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            return (PUNCTUATION,)
        # "removed, inverted" drops what lies between the matches: nothing, where the regex covers all text
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} | {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Removed",
            "invert": True,
        }:
            # some files hold line breaks themselves where others write escapes
            return (regex.replace("\r", r"\r").replace("\n", r"\n"),)
    return None
