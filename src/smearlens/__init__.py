"""smearlens: hook, measure and test how sequence models look back.

Every public name can be imported from here and is loaded on first use, so that a metric does not
pull in TransformerLens and `import smearlens` itself takes milliseconds.

| folder | what lives there | may import |
|---|---|---|
| `nn` | hooked layers: attention, convolution, state space, scans | itself |
| `models` | one file per model, saving and loading | `nn` |
| `analysis` | from activations to numbers; `analysis.mixing`: the matrices behind them | itself |
| `causal` | interventions: audit, ablation, patches, states | `models.base`, `analysis`, `data` |
| `data` | tokens and where they come from | itself |
| `training` | a loop that resumes, tracking, evaluation | `models.base`, `analysis`, `data` |
| `adapters` | other libraries' models and caches | `models`, `analysis` |
| `viz` | plots, widgets, pages, the frame of a report | `analysis` |
| `experiments` | one folder per study, the claims, the grid of runs | all of the above |
| `cli.py` | parses, calls, prints | `experiments` |

A test reads the imports of every file and holds them to this table.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "smearlens.models.conv_attn": ("ConvAttn", "ConvAttnConfig"),
    "smearlens.models.attn_attn": ("AttnAttn", "AttnAttnConfig"),
    "smearlens.models.mamba": ("Mamba", "MambaConfig"),
    "smearlens.models.char_gpt": ("CharGPT", "CharGPTConfig"),
    "smearlens.models.seq2seq": ("Seq2Seq", "Seq2SeqConfig"),
    "smearlens._hooks": ("HookPoint",),
    "smearlens.models.base": ("HookedModel",),
    "smearlens.models.cached": ("CacheMemoryError", "cache_bytes"),
    "smearlens.models.families": ("load_model",),
    "smearlens.models.files": ("ModelFileError",),
    "smearlens.nn.attention": ("Attention",),
    "smearlens.causal.audit": ("Audit", "audit"),
    "smearlens.causal.ablate": ("ablate",),
    "smearlens.causal.component": ("Component",),
    "smearlens.causal.lags": ("keep_lags", "role_without_lags"),
    "smearlens.causal.patch": ("attribution", "patch_activation", "patch_path"),
    "smearlens.causal.states": (
        "cut_convolution", "freeze_delta", "hold_states", "read_states", "set_states",
        "state_patch",
    ),
    "smearlens.data.batches": ("PaddedBatches", "RepeatBatches", "TokenBatches"),
    "smearlens.data.pig_latin": (
        "PairBatches", "PigLatinVocabulary", "pig_latin_pairs", "read_pairs", "split_pairs",
        "to_pig_latin",
    ),
    "smearlens.data.shards": ("ShardedTokens", "open_shards", "write_shards"),
    "smearlens.data.synthetic": ("iid_tokens", "repeated_tokens"),
    "smearlens.data.corpora": ("load_corpus",),
    "smearlens.data.tokenizers": ("ByteTokenizer", "CharTokenizer", "gpt2_tokenizer"),
    "smearlens.training.config": ("TrainConfig",),
    "smearlens.training.loop": ("train",),
    "smearlens.training.tracking": ("GradientNorms", "Tracker"),
    "smearlens.training.attention_tracking": ("AttentionTracking", "GenerationTracking"),
    "smearlens.training.words": ("WordScores", "score_words"),
    "smearlens.training.evaluation": ("TextLoss", "text_loss"),
    "smearlens.nn.conv": ("DepthwiseConv", "KeySmear"),
    "smearlens.adapters.bridge": ("bridge_cache", "bridge_mixings"),
    "smearlens.adapters.hugging_face": ("attention_cache", "from_hugging_face"),
    "smearlens.analysis.mixing.layers": ("mixings",),
    "smearlens.analysis.mixing.kinds": ("Mixing",),
    "smearlens.analysis.scores": ("Scores",),
    "smearlens.analysis.heads": (
        "duplicate_token_score", "induction_score", "prefix_matching_score", "prev_token_score",
    ),
    "smearlens.analysis.detection": ("alignment_mass", "stripe_score"),
    "smearlens.analysis.patterns": (
        "attention_entropy", "attention_span", "future_mass", "head_diversity", "lag_profile",
        "self_mass", "sink_mass",
    ),
    "smearlens.analysis.kernels": ("kernel_profile",),
    "smearlens.analysis.smearing": ("score_by_lag", "smear_coefficient", "smear_evidence"),
    "smearlens.analysis.similarity": ("layer_similarity", "linear_cka"),
    "smearlens.analysis.text": (
        "distinct_n", "diversity", "rep_n", "repetition", "self_bleu",
    ),
    "smearlens.analysis.coherence": ("coherence", "segment_coherence"),
    "smearlens.analysis.association": (
        "association", "association_within_run", "partial_correlation",
    ),
    "smearlens.analysis.loss_paths": ("loss_paths",),
    "smearlens.analysis.phase_change": ("phase_change",),
    "smearlens.analysis.stats": ("holm", "mcnemar"),
    "smearlens.analysis.mixing.implicit": ("implicit_mixings",),
    "smearlens.analysis.behaviour": (
        "ar_split", "icl_score", "induction_accuracy", "induction_loss", "per_token_loss",
    ),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'smearlens' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
