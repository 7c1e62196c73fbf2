"""Key-values of ours in a file: where it comes from, how to make it again, and what the patched runtime is to skip."""

from collections.abc import Collection

from moe2gguf import __version__
from moe2gguf.allocate import Allocation
from moe2gguf.gguf_file import KeyValues, ValueType
from moe2gguf.prune import RECORD
from moe2gguf.settings import AFFINITIES, DEFAULT_QUANTIZER, NO_SKIPPING, Quantizer
from moe2gguf.skip import Skipping, Thresholds, frequency_thresholds, ratio_thresholds
from moe2gguf.source import Source, layer_of
from moe2gguf.source.checkpoint import repository_of
from moe2gguf.stats import CalibrationStats

# bool per layer: whether the file has another router than the checkpoint; another norm, in the end the last one of all
ROUTER_KEY = "moe2gguf.router_calibrated"
NORMS_KEY = "moe2gguf.norms_calibrated"


def skip_values(source: Source, stats: CalibrationStats, skipping: Skipping) -> KeyValues:
    """What the patched runtime reads: a threshold per layer; 0 where there is none."""
    values: KeyValues = {}

    def put(name: str, by_layer: dict[int, float]) -> None:
        numbers = [by_layer.get(layer, 0.0) for layer in range(source.n_layer)]
        values[f"{source.arch}.expert_skip_{name}"] = (numbers, ValueType.ARRAY, ValueType.FLOAT32)

    def said(name: str, thresholds: Thresholds) -> None:
        values[f"moe2gguf.{name}.share"] = (thresholds.share, ValueType.FLOAT32, None)
        values[f"moe2gguf.{name}.kld.predicted"] = (thresholds.kl, ValueType.FLOAT32, None)

    ratio = ratio_thresholds(stats, skipping.share)
    if skipping.share:
        put("ratio", ratio.limit_L)
        put("protect_norm", ratio.protect_norm_L)
        said("skip", ratio)
    if skipping.prompt_share:
        # of those that transformers runs: some converters count heads that predict further tokens
        n_layers = source.hparams.get("num_hidden_layers", source.n_layer)
        frequency = frequency_thresholds(stats, skipping.prompt_share, ratio, n_layers)
        put("frequency", frequency.limit_L)
        said("skip_prompt", frequency)
    return values


def changed_values(source: Source, quantizer: Quantizer, tensors: Collection[str]) -> KeyValues:
    """Of which layers the routers and norms are not the checkpoint's; tensors: their names."""
    routers = {layer_of(name) for name in tensors if "ffn_gate_inp" in name}
    norms = {layer_of(name) for name in tensors if "norm" in name}
    by_layer = [layer in routers for layer in range(source.n_layer)]
    with_last = [layer in norms for layer in [*range(source.n_layer), None]]
    values: KeyValues = {}
    if quantizer.router != "none" or quantizer.tuning:
        values[ROUTER_KEY] = (by_layer, ValueType.ARRAY, ValueType.BOOL)
    if quantizer.tuning:
        values[NORMS_KEY] = (with_last, ValueType.ARRAY, ValueType.BOOL)
    return values


def provenance(
    source: Source,
    stats: CalibrationStats,
    allocation: Allocation,
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    skipping: Skipping = NO_SKIPPING,
) -> KeyValues:
    """Key-values that say where the file comes from and how to make it again."""
    string, uint, real = ValueType.STRING, ValueType.UINT32, ValueType.FLOAT32
    values: KeyValues = {
        "general.quantized_by": ("moe2gguf", string, None),
        "moe2gguf.version": (__version__, string, None),
        "moe2gguf.layout": (allocation.layout, string, None),
        "moe2gguf.source.name": (source.name, string, None),
        "moe2gguf.source.sha256": (stats.source_sha256, string, None),
        "moe2gguf.recipe": (allocation.recipe, string, None),
        # of one length whatever they say: the size is planned before
        "moe2gguf.feedback": (quantizer.feedback, ValueType.BOOL, None),
        "moe2gguf.affinity": (AFFINITIES.index(quantizer.affinity), uint, None),
        "moe2gguf.seed": (stats.seed, uint, None),
        "moe2gguf.calibration.digest": (stats.digest, string, None),
        "moe2gguf.calibration.tokens": (stats.n_tokens, uint, None),
        "moe2gguf.kld.predicted": (allocation.predicted_kl, real, None),
        "quantize.imatrix.dataset": (stats.text, string, None),
        "quantize.imatrix.entries_count": (len(stats.importance) + 2 * len(stats.layers), uint, None),
    }
    if quantizer.feedback:
        # known when all is quantised
        values |= changed_values(source, quantizer, ())
    values |= skip_values(source, stats, skipping)
    if pruning := source.hparams.get(RECORD):
        values["moe2gguf.pruned_from.sha256"] = (pruning["source_sha256"], string, None)
        for layer, experts in pruning["kept_experts"].items():
            values[f"moe2gguf.kept_experts.{layer}"] = (experts, ValueType.ARRAY, ValueType.INT32)
    # the Hub's cache keeps a snapshot under its commit
    if (repository := repository_of(source.path)) is not None:
        values["moe2gguf.source.repository"] = (repository, string, None)
        values["moe2gguf.source.commit"] = (source.path.name, string, None)
    return values
