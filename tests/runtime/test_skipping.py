"""Experts skipped at run time, against transformers with the same rules written out as loops over tokens.

Shapes: T tokens, K experts per token, V vocabulary.
"""

import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from moe2gguf.experts import find_experts
from moe2gguf.pipeline import write_float
from tests.gguf_files import rewritten
from tests.logits import TABLE_NOISE
from tests.test_architectures import as_it_stands, in_checkpoint_order
from tests.tiny_moe import from_pretrained

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the runtime: moe2gguf runtime install")

TOP_K = 3
FLOAT_NOISE = 5e-5  # of the logits' spread; a slot more or less moves them by 1e-2
SEQUENCES = tuple(np.random.default_rng(s).integers(0, 300, n).tolist() for s, n in enumerate((40, 25, 1)))
LONG, OTHER = (np.random.default_rng(s).integers(0, 300, 40).tolist() for s in (3, 4))
# softmax, rescaled; softmax as it is; sigmoid with biased selection within groups; softmax of the selected, biases;
# a scale for each expert, after the choice
MODEL_TYPES = ("qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "gemma4")


@dataclasses.dataclass(frozen=True)
class Rule:
    ratio: float = 0.0
    protect_norm: float = 0.0
    frequency: float = 0.0

    def written(self, path: Path, out: Path) -> Path:
        """The file with the rule's thresholds in every layer."""
        fields = gguf.GGUFReader(path).fields
        n_layers = next(field.contents() for key, field in fields.items() if key.endswith(".block_count"))
        values = {
            "expert_skip_ratio": self.ratio,
            "expert_skip_protect_norm": self.protect_norm,
            "expert_skip_frequency": self.frequency,
        }
        return rewritten(path, out, arrays={key: [value] * n_layers for key, value in values.items()})

    def kept(
        self, x_TD: np.ndarray, ids_TK: np.ndarray, gates_TK: np.ndarray, windows: Sequence[tuple], n: int
    ) -> np.ndarray:
        """bool (T, K). A window is (prompt, ubatch), and what its prompt has so far judges it; n experts."""
        kept_TK = np.ones(gates_TK.shape, bool)
        for t, gates_K in enumerate(gates_TK):
            norm = np.abs(x_TD[t]).sum()
            protected = 0 < self.protect_norm <= norm
            frequent = set(ids_TK[t])
            if self.frequency:
                prompt, ubatch = windows[t]
                tokens = [other for other, window in enumerate(windows) if window[0] == prompt and window[1] <= ubatch]
                counts = np.bincount(ids_TK[tokens].ravel(), minlength=n)
                frequent = {e for e in range(n) if counts[e] >= self.frequency * len(tokens) * len(gates_K) / n}
            for k, gate in enumerate(gates_K):
                if gate < self.ratio * gates_K.max() and not protected:
                    kept_TK[t, k] = False
                if ids_TK[t, k] not in frequent and gate < gates_K.max():
                    kept_TK[t, k] = False
        return kept_TK


FREQUENCY = Rule(frequency=1.0)


@contextmanager
def skipping(
    model: torch.nn.Module,
    rule: Rule,
    windows: Sequence[tuple],
    last_windows: Sequence[tuple],
    seen: dict[int, np.ndarray],
    norms: dict[int, np.ndarray],
) -> Iterator[None]:
    """The rule applied to what each layer's experts are given. Fills in, per layer, what was kept and the norms."""
    handles = []
    layers = model.get_decoder().layers
    last = len(layers) - 1
    for index, layer in enumerate(layers):
        block = find_experts(layer)
        if block is None:
            continue

        def hook(_module, args, kwargs, index=index, block=block):
            values = [*args, *kwargs.values()]
            x_TD, ids_TK, gates_TK = (v.detach().reshape(-1, v.shape[-1]) for v in values[:3])
            chosen_TK = block.chosen_by(ids_TK, gates_TK)
            of_layer = last_windows if index == last else windows
            kept_TK = rule.kept(x_TD.numpy(), ids_TK.numpy(), chosen_TK.numpy(), of_layer, block.n_experts)
            seen[index] = kept_TK
            norms[index] = x_TD.abs().sum(-1).numpy()
            masked_TK = chosen_TK * torch.from_numpy(kept_TK)
            rescaled_T1 = chosen_TK.sum(-1, keepdim=True) / masked_TK.sum(-1, keepdim=True)
            masked_TK = gates_TK * torch.from_numpy(kept_TK) * rescaled_T1
            values[2] = masked_TK.reshape(values[2].shape)
            return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

        handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference(
    folder: Path,
    rule: Rule,
    sequence: Sequence[int],
    windows: Sequence[tuple],
    last_windows: Sequence[tuple] | None = None,
) -> tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Logits f32 (T, V), kept slots and norms per layer of one sequence by itself."""
    model = from_pretrained(folder, attn_implementation="eager")
    seen: dict[int, np.ndarray] = {}
    norms: dict[int, np.ndarray] = {}
    with torch.inference_mode(), skipping(model, rule, windows, last_windows or windows, seen, norms):
        return model(torch.tensor([sequence])).logits[0].numpy(), seen, norms


def alone(n: int) -> list[tuple]:
    """Windows of single tokens: generated, or left over in a ubatch. Each is its own prompt, and keeps its experts."""
    return [(object(), 0) for _ in range(n)]


def windows_of(place: int, n: int, n_ubatch: int) -> list[tuple]:
    """One prompt, n tokens from `place` on in a batch that is cut every n_ubatch tokens."""
    ubatches = [(place + t) // n_ubatch for t in range(n)]
    return [("prompt", u) if ubatches.count(u) > 1 else alone(1)[0] for u in ubatches]


@contextmanager
def opened(
    path: Path,
    n_sequences: int,
    *,
    n_ubatch: int = 128,
    unified: bool = True,
    overrides: dict[str, int | float] | None = None,
) -> Iterator[ctypes.c_void_p]:
    """A context. Unified: ubatches are cut from the batch in its order; else sequences have equal parts of them."""
    keys = overrides or {}
    params = llama_cpp.llama_model_default_params()
    array = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for i, (key, value) in enumerate(keys.items()):
        array[i].key = key.encode()
        is_int = isinstance(value, int)
        array[i].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT if is_int else llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT
        if is_int:
            array[i].value.val_i64 = value
        else:
            array[i].value.val_f64 = value
    params.kv_overrides = array
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 512, 256, n_ubatch
    settings.n_seq_max, settings.kv_unified = n_sequences, unified
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def evaluate(
    context, tokens: Sequence[tuple[int, int, int]], outputs: Sequence[int] | None = None, status: int = 0
) -> list[np.ndarray]:
    """One batch of (sequence, position, token): the logits f32 (V) of all, or of those in `outputs`."""
    outputs = range(len(tokens)) if outputs is None else outputs
    model = llama_cpp.llama_get_model(context)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (s, p, token) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, p, 1, i in outputs
        batch.seq_id[i][0] = s
    assert llama_cpp.llama_decode(context, batch) == status
    llama_cpp.llama_batch_free(batch)
    if status:
        return []
    pointers = [llama_cpp.llama_get_logits_ith(context, i) for i in outputs]
    return [np.ctypeslib.as_array(pointer, (n_vocab,)).copy() for pointer in pointers]


def part(sequence: list[int], start: int, stop: int, s: int = 0) -> list[tuple[int, int, int]]:
    """Sequence s from position start to stop, for `evaluate`."""
    return [(s, p, sequence[p]) for p in range(start, stop)]


def decoded(
    path: Path,
    sequences: Sequence[list[int]],
    *,
    n_ubatch: int = 128,
    one_by_one: bool = False,
    overrides: dict[str, int | float] | None = None,
) -> tuple[list[np.ndarray], dict[int, tuple[int, int]]]:
    """Logits f32 (T, V) of each sequence, all in one batch or token by token, and (computed, skipped) by MoE layer."""
    tokens = [token for s, sequence in enumerate(sequences) for token in part(sequence, 0, len(sequence), s)]
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    with opened(path, len(sequences), n_ubatch=n_ubatch, overrides=overrides) as context:
        for batch in [[t] for t in tokens] if one_by_one else [tokens]:
            for (s, _, _), logits_V in zip(batch, evaluate(context, batch), strict=True):
                found[s].append(logits_V)
        n_layers = llama_cpp.llama_model_n_layer(llama_cpp.llama_get_model(context))
        counts = {layer: slots(context, layer) for layer in range(n_layers)}
    return [np.array(rows) for rows in found], {layer: of for layer, of in counts.items() if any(of)}


def slots(context, layer: int) -> tuple[int, int]:
    function = llama_cpp.llama_cpp._lib.llama_perf_expert_slots
    function.restype = ctypes.c_bool
    function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    computed, skipped = ctypes.c_uint64(), ctypes.c_uint64()
    function(context, layer, ctypes.byref(computed), ctypes.byref(skipped))
    return computed.value, skipped.value


@pytest.fixture
def with_rule(tiny: Callable[..., Path], tmp_path: Path) -> Callable[[str, Rule], tuple[Path, Path]]:
    """(checkpoint, F32 file with the rule's thresholds)."""

    def make(model_type: str, rule: Rule) -> tuple[Path, Path]:
        folder = tiny(model_type, top_k=TOP_K)
        plain = tmp_path / f"{model_type}.gguf"
        if not plain.exists():
            write_float(folder, plain, ftype="f32")
        return folder, rule.written(plain, tmp_path / f"{model_type}-rule.gguf")

    return make


def same(logits_TV: np.ndarray, wanted_TV: np.ndarray, model_type: str = "") -> None:
    noise = TABLE_NOISE.get(model_type, FLOAT_NOISE)
    np.testing.assert_allclose(logits_TV, wanted_TV, rtol=0, atol=noise * wanted_TV.std())


@pytest.mark.parametrize("one_by_one", [False, True], ids=["prompt", "decode"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_by_router_weight(model_type: str, one_by_one: bool, with_rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token by its own weights, so that prompt and decoding skip the same. The library counts them."""
    monkeypatch.setenv("LLAMA_EXPERT_SKIP_COUNT", "1")
    rule = Rule(ratio=0.6)
    folder, path = with_rule(model_type, rule)
    sequence = SEQUENCES[0]
    wanted, seen, _ = reference(folder, rule, sequence, [(0, 0)] * len(sequence))
    (logits_TV,), counts = decoded(path, [sequence], one_by_one=one_by_one)
    same(logits_TV, wanted, model_type)
    assert counts == {layer: (kept_TK.sum(), (~kept_TK).sum()) for layer, kept_TK in seen.items()}
    assert all(skipped > 10 for _, skipped in counts.values())


def test_protected_tokens_keep_all(with_rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_EXPERT_SKIP_COUNT", "1")
    sequence = SEQUENCES[0]
    windows = [(0, 0)] * len(sequence)
    folder, _ = with_rule("qwen3_moe", Rule())
    _, _, norms = reference(folder, Rule(), sequence, windows)
    rule = Rule(ratio=0.9, protect_norm=float(np.median(norms[0])))
    folder, path = with_rule("qwen3_moe", rule)
    wanted, seen, _ = reference(folder, rule, sequence, windows)
    (logits_TV,), counts = decoded(path, [sequence])
    same(logits_TV, wanted)
    assert counts == {layer: (kept_TK.sum(), (~kept_TK).sum()) for layer, kept_TK in seen.items()}
    _, unprotected = decoded(with_rule("qwen3_moe", Rule(ratio=0.9))[1], [sequence])
    assert 0 < counts[0][1] < unprotected[0][1]


@pytest.mark.parametrize("n_ubatch", [128, 16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_by_frequency(model_type: str, n_ubatch: int, with_rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in one ubatch, one of them of a single token; and prompts over several ubatches."""
    monkeypatch.setenv("LLAMA_EXPERT_SKIP_COUNT", "1")
    rule = Rule(frequency=1.0)
    folder, path = with_rule(model_type, rule)
    logits, counts = decoded(path, SEQUENCES, n_ubatch=n_ubatch)
    place, kept = 0, dict.fromkeys(counts, (0, 0))
    for sequence, logits_TV in zip(SEQUENCES, logits, strict=True):
        windows = windows_of(place, len(sequence), n_ubatch)
        place += len(sequence)
        wanted, seen, _ = reference(folder, rule, sequence, windows)
        same(logits_TV, wanted, model_type)
        kept = {
            layer: (kept[layer][0] + kept_TK.sum(), kept[layer][1] + (~kept_TK).sum())
            for layer, kept_TK in seen.items()
        }
    assert counts == kept
    assert all(skipped > 10 for _, skipped in counts.values())


@dataclasses.dataclass
class Prompts:
    """LONG in sequence 0 and OTHER in sequence 1, of a file that is judged by frequency alone."""

    folder: Path
    path: Path

    def agree(self, sequence: list[int], logits: list[np.ndarray], *windows: Sequence[tuple]) -> None:
        wanted_TV, seen, _ = reference(self.folder, FREQUENCY, sequence, *windows)
        same(np.array(logits), wanted_TV[len(sequence) - len(logits) :])
        assert all((~kept_TK).sum() >= 5 for kept_TK in seen.values())


@pytest.fixture
def prompts(with_rule) -> Prompts:
    return Prompts(*with_rule("qwen3_moe", FREQUENCY))


@pytest.mark.parametrize(
    ("n_batch", "n_ubatch"),
    [
        (15, 128),  # 15, 15, 10
        (10, 128),  # four alike, the graph is used again
        (17, 16),  # 16, 1, 16, 1, 6: a single token in between is not the end of the prompt
        (39, 16),  # 16, 16, 7; 1: one at the end
    ],
)
def test_a_prompt_over_several_batches(n_batch: int, n_ubatch: int, prompts: Prompts) -> None:
    """What has been evaluated judges the rest. Programs drop what may lie behind, as here, before each batch."""
    windows, logits = [], []
    with opened(prompts.path, 1, n_ubatch=n_ubatch) as context:
        for start in range(0, len(LONG), n_batch):
            stop = min(start + n_batch, len(LONG))
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, start, -1)
            logits += evaluate(context, part(LONG, start, stop))
            windows += [
                (prompt, 1000 * start + u if prompt == "prompt" else 0)
                for prompt, u in windows_of(0, stop - start, n_ubatch)
            ]
    prompts.agree(LONG, logits, windows)


def test_a_sequence_that_goes_on_beside_a_new_one(prompts: Prompts) -> None:
    with opened(prompts.path, 2) as context:
        logits = evaluate(context, part(LONG, 0, 20))
        both = evaluate(context, [*part(OTHER, 0, 30, s=1), *part(LONG, 20, 40)])
        rest = evaluate(context, part(OTHER, 30, 40, s=1))
    prompts.agree(LONG, [*logits, *both[30:]], [("prompt", 0)] * 20 + [("prompt", 1)] * 20)
    prompts.agree(OTHER, [*both[:30], *rest], [("prompt", 0)] * 30 + [("prompt", 1)] * 10)


@pytest.mark.parametrize("beside", [False, True], ids=["by itself", "beside a prompt"])
def test_each_turn_is_a_prompt(beside: bool, prompts: Prompts) -> None:
    """A generated token ends a prompt, also where it shares a ubatch with another sequence's prompt."""
    with opened(prompts.path, 2) as context:
        logits = evaluate(context, part(LONG, 0, 20))
        generated = [*part(LONG, 20, 21), *(part(OTHER, 0, 30, s=1) if beside else [])]
        logits += evaluate(context, generated, outputs=[0])
        logits += evaluate(context, part(LONG, 21, 40))
    prompts.agree(LONG, logits, [("first", 0)] * 20 + alone(1) + [("second", 0)] * 19)


def test_a_prompt_beside_generation_in_equal_parts(prompts: Prompts) -> None:
    """One token of each sequence, then the rest of the prompt: the first of them is a token of the prompt."""
    with opened(prompts.path, 2, unified=False) as context:
        logits = evaluate(context, part(LONG, 0, 20))
        evaluate(context, part(OTHER, 0, 30, s=1))
        both = evaluate(context, [*part(LONG, 20, 40), *part(OTHER, 30, 31, s=1)])
        rest = evaluate(context, part(OTHER, 31, 40, s=1))
    prompts.agree(LONG, [*logits, *both[:20]], [("prompt", 0)] * 20 + alone(1) + [("prompt", 1)] * 19)
    prompts.agree(OTHER, rest, [("first", 0)] * 30 + alone(1) + [("second", 0)] * 9)


@pytest.mark.parametrize("change", ["cleared", "removed", "copied", "restored", "shifted"])
def test_other_tokens_start_a_prompt_anew(change: str, prompts: Prompts) -> None:
    """Even at the position behind the last prompt: what was counted has left the sequence."""
    s = 0 if change == "shifted" else 1
    windows = [("first", 0)] * 20
    with opened(prompts.path, 2) as context:
        memory = llama_cpp.llama_get_memory(context)
        logits = evaluate(context, part(LONG, 0, 20))
        evaluate(context, part(OTHER, 0, 20, s=1))
        state = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(context, 0))()
        assert llama_cpp.llama_state_seq_get_data(context, state, len(state), 0)
        if change == "shifted":  # there and back
            llama_cpp.llama_memory_seq_add(memory, 0, 0, -1, 5)
            llama_cpp.llama_memory_seq_add(memory, 0, 5, -1, -5)
        elif change == "cleared":
            llama_cpp.llama_memory_clear(memory, True)
        else:
            llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)
        if change == "copied":
            llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        elif change == "restored":
            assert llama_cpp.llama_state_seq_set_data(context, state, len(state), 1)
        elif change != "shifted":
            logits = [evaluate(context, [token])[0] for token in part(LONG, 0, 20, s)]
            windows = alone(20)
        logits += evaluate(context, part(LONG, 20, 40, s))
    prompts.agree(LONG, logits, windows + [("second", 0)] * 20)


def test_the_last_layer_counts_where_all_have_outputs(prompts: Prompts) -> None:
    """Elsewhere it has a few of the tokens only, and judges none of them."""
    with opened(prompts.path, 1) as context:
        logits = evaluate(context, part(LONG, 0, 10), outputs=[9])
        evaluate(context, part(LONG, 10, 20), outputs=[])
        for start in (20, 30):
            logits += evaluate(context, part(LONG, start, start + 10))
    windows = [("prompt", t // 10) for t in range(40)]
    wanted_TV, _, _ = reference(prompts.folder, FREQUENCY, LONG, windows, alone(20) + windows[20:])
    same(np.array(logits), wanted_TV[[9, *range(20, 40)]])


def test_a_failed_batch_is_not_counted(prompts: Prompts) -> None:
    """Stopped in its second ubatch; the first one stays in memory."""
    calls, limit = 0, 1 << 30

    def stop(_data) -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    callback = llama_cpp.ggml_abort_callback(stop)
    with opened(prompts.path, 1, n_ubatch=10) as context:
        llama_cpp.llama_set_abort_callback(context, callback, None)
        evaluate(context, part(LONG, 0, 10))
        limit = 2 * calls + calls // 2
        evaluate(context, part(LONG, 10, 30), status=2)
        limit = 1 << 30
        assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(context), 0) == 19
        logits = evaluate(context, part(LONG, 20, 40))
    prompts.agree(LONG, logits, [("prompt", t // 10) for t in range(40)])


def test_both_rules(with_rule) -> None:
    rule = Rule(ratio=0.4, frequency=0.9)
    folder, path = with_rule("olmoe", rule)
    sequence = SEQUENCES[0]
    wanted, _, _ = reference(folder, rule, sequence, [(0, 0)] * len(sequence))
    same(decoded(path, [sequence])[0][0], wanted)


def test_both_rules_in_many_layers(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that skipping does in Mixtral's 32 layers has room in the graph: 2,822 nodes, where llama.cpp reckons with
    2,584, eight for each tensor."""
    monkeypatch.setenv("LLAMA_EXPERT_SKIP_COUNT", "1")
    plain = write_float(tiny("mixtral", top_k=TOP_K, num_hidden_layers=32), tmp_path / "plain.gguf", ftype="f32")
    skips = Rule(ratio=0.4, protect_norm=1e9, frequency=0.9).written(plain, tmp_path / "skips.gguf")
    (logits,), counts = decoded(skips, [SEQUENCES[0]])
    assert np.isfinite(logits).all() and len(counts) == 32 and sum(skipped for _, skipped in counts.values())


@pytest.mark.parametrize("n_ubatch", [128, 16])
@pytest.mark.parametrize("off", ["integer", "float", "environment", "override before environment"])
def test_strength_zero_is_off(off: str, n_ubatch: int, with_rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the file without thresholds gives."""
    _, path = with_rule("qwen3_moe", Rule(ratio=0.6, frequency=0.9))
    (plain_TV,), _ = decoded(path.with_name("qwen3_moe.gguf"), [SEQUENCES[0]], n_ubatch=n_ubatch)
    overrides: dict[str, int | float] = {}
    if off == "environment":
        monkeypatch.setenv("LLAMA_EXPERT_SKIP", "0")
    else:
        overrides["qwen3moe.expert_skip_strength"] = 0 if off == "integer" else 0.0
    if off == "override before environment":
        monkeypatch.setenv("LLAMA_EXPERT_SKIP", "1")
    (logits_TV,), _ = decoded(path, [SEQUENCES[0]], n_ubatch=n_ubatch, overrides=overrides)
    assert np.array_equal(logits_TV, plain_TV)
    (skipping_TV,), _ = decoded(path, [SEQUENCES[0]], n_ubatch=n_ubatch)
    assert not np.array_equal(skipping_TV, plain_TV) or off == "environment"


def test_strength_scales_the_thresholds(with_rule) -> None:
    sequence = SEQUENCES[0]
    folder, path = with_rule("qwen3_moe", Rule(ratio=0.3))
    wanted, _, _ = reference(folder, Rule(ratio=0.6), sequence, [(0, 0)] * len(sequence))
    same(decoded(path, [sequence], overrides={"qwen3moe.expert_skip_strength": 2.0})[0][0], wanted)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["prompt", "decode"])
def test_all_but_the_top_is_one_expert_per_token(one_by_one: bool, with_rule) -> None:
    _, path = with_rule("qwen3_moe", Rule(ratio=0.01))
    sequence = SEQUENCES[0]
    (logits_TV,), _ = decoded(
        path, [sequence], one_by_one=one_by_one, overrides={"qwen3moe.expert_skip_strength": 1000.0}
    )
    (wanted_TV,), _ = decoded(
        path.with_name("qwen3_moe.gguf"),
        [sequence],
        one_by_one=one_by_one,
        overrides={"qwen3moe.expert_used_count": 1},
    )
    same(logits_TV, wanted_TV)


@pytest.mark.parametrize("model_type", MODEL_TYPES[:2])
def test_grouped_files_skip_alike(model_type: str, converted, tmp_path: Path) -> None:
    """Several tensors in one operation, experts in another order: as one tensor in the checkpoint's order."""
    path = converted(model_type).results["grouped"].path
    rule = Rule(ratio=0.7, frequency=0.9)
    grouped = rule.written(as_it_stands(path, tmp_path / "groups.gguf"), tmp_path / "rule.gguf")
    plain = rule.written(in_checkpoint_order(path, tmp_path / "one.gguf"), tmp_path / "plain.gguf")
    everything = decoded(plain, SEQUENCES, overrides={f"{model_type.replace('_', '')}.expert_skip_strength": 0})[0]
    for one_by_one in (False, True):
        logits, wanted = (decoded(file, SEQUENCES, one_by_one=one_by_one)[0] for file in (grouped, plain))
        for logits_TV, wanted_TV in zip(logits, wanted, strict=True):
            same(logits_TV, wanted_TV)
        assert np.abs(wanted[0] - everything[0]).max() > 1e-2 * everything[0].std()
    # and the quantised file itself, whose kernels leave out the same slots
    assert all(np.isfinite(l).all() for l in decoded(rule.written(path, tmp_path / "q.gguf"), SEQUENCES)[0])


@pytest.mark.parametrize("value", ["much", "", "-1", "nan", "inf"])
def test_a_strength_that_is_none(value: str, with_rule, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = with_rule("qwen3_moe", Rule(ratio=0.6))
    monkeypatch.setenv("LLAMA_EXPERT_SKIP", value)
    assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
