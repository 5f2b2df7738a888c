"""A right call of every public name and of every method that takes input: what wrong ones are
made from.

Each entry gives a function and the arguments of a call that works; `stress_input` spoils them one
by one. Sizes that a call may confuse differ. Leaves out the spoiling and the judgement.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smearlens as sl
from smearlens.analysis.mixing.kinds import DenseMixing

Call = tuple[Callable[..., Any], dict[str, Any]]

SIZES = {"d_vocab": 11, "d_model": 12, "n_heads": 3, "n_ctx": 13}
FAMILIES = ("ConvAttn", "AttnAttn", "Mamba", "CharGPT", "Seq2Seq")
CONFIGS: dict[str, dict[str, Any]] = {
    "ConvAttn": {**SIZES, "kernel_size": 5, "dropout": 0.1, "conv_on": "k", "causal": True},
    "AttnAttn": {**SIZES, "n_layers": 2, "dropout": 0.1, "mlp": True, "positions": "rotary"},
    "Mamba": {
        "d_vocab": 11, "d_model": 6, "d_state": 5, "n_ctx": 13, "n_layers": 1, "kernel_size": 4,
        "expand": 2, "rule": "zoh", "delta": "selective", "a": "learned", "scan": "fused",
        "dropout": 0.1,
    },
    "CharGPT": {**SIZES, "n_layers": 2, "dropout": 0.1, "gelu": "exact"},
    "Seq2Seq": {
        **SIZES, "d_mlp": 10, "n_layers": 1, "start": 9, "end": 10, "norm": "pre", "dropout": 0.1,
    },
}  # fmt: skip
TEXTS = ["to be or not", "that is the que", "stion and more"]
SERIES = [0.3, 0.1, 0.8, 0.5, 0.9, 0.2, 0.4, 0.7]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(batch: int = 2, length: int = 7, d_vocab: int = 11) -> Tensor:
    return torch.randint(d_vocab, (batch, length), generator=seeded(batch + length))


def model(name: str, **changes: Any) -> Any:
    config = getattr(sl, f"{name}Config")(**{**CONFIGS[name], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(sl, name)(config).eval()


def cached(name: str) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model, repeated tokens and all it caches on them, as a plain dictionary."""
    given = model(name)
    row = sl.repeated_tokens(2, 3, 7, 11, generator=seeded())
    inputs = (tokens(2, 5), row) if name == "Seq2Seq" else (row,)
    _, cache = given.run_with_cache(*inputs)
    return given, row, dict(cache.items())


def pattern(batch: int = 2, heads: int = 3, length: int = 7) -> Tensor:
    scores = torch.randn(batch, heads, length, length, generator=seeded())
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def one_number(logits: Tensor, given: Tensor) -> Tensor:
    """A behaviour metric that every family's logits have."""
    return logits.float().nan_to_num().mean((1, 2))


@cache
def folder() -> Path:
    """A folder with a saved model, a text, a file of pairs; kept until the process ends."""
    path = Path(tempfile.mkdtemp(prefix="stress-"))
    model("ConvAttn").save_pretrained(path / "model")
    (path / "text.txt").write_text("to be or not to be\n" * 20)
    (path / "pairs.txt").write_text("team eamtay\neat eatway\ntry ytray\nby ybay\nsix ixsay\n")
    return path


class Rows:
    """Batches of tokens by number."""

    def batch(self, step: int) -> dict[str, Tensor]:
        return {"tokens": torch.randint(11, (2, 7), generator=seeded(step))}


def _family(name: str) -> dict[str, Callable[[], Call]]:
    """Calls of one model class; of the shared methods too, since inputs differ."""
    config, cls = CONFIGS[name], getattr(sl, name)
    coded = name == "Seq2Seq"
    first = {"source": tokens(2, 5), "target": tokens()} if coded else {"tokens": tokens()}
    hook = next(iter(model(name).hook_dict))

    def run_with_cache(**options: Any) -> Any:
        return model(name).run_with_cache(*first.values(), **options)

    def run_with_hooks(**options: Any) -> Any:
        return model(name).run_with_hooks(*first.values(), **options)

    calls: dict[str, Callable[[], Call]] = {
        f"{name}Config": lambda: (getattr(sl, f"{name}Config"), dict(config)),
        name: lambda: (cls, {"config": model(name).config}),
        f"{name}.forward": lambda: (
            model(name),
            {**first, "return_type": "loss", "loss_mask": torch.ones(2, 7).bool()},
        ),
        f"{name}.from_preset": lambda: (
            cls.from_preset,
            {"name": sorted(cls.presets)[0], "d_vocab": 32, "d_model": 32, "n_ctx": 13},
        ),
        f"{name}.run_with_cache": lambda: (
            run_with_cache,
            {"names_filter": [hook], "return_type": "loss", "incl_bwd": True, "pos_slice": 2},
        ),
        f"{name}.run_with_hooks": lambda: (
            run_with_hooks, {"fwd_hooks": [(hook, lambda t, hook: t)]},
        ),
        f"{name}.save_pretrained": lambda: (
            model(name).save_pretrained, {"folder": folder() / "another"},
        ),
        f"{name}.to_tokens": lambda: (_with_tokenizer(model(name)).to_tokens, {"text": "to be"}),
        f"cache_bytes of {name}": lambda: (
            lambda names_filter: sl.cache_bytes(
                model(name), *first.values(), names_filter=names_filter
            ),
            {"names_filter": [hook]},
        ),
    }  # fmt: skip
    if not coded:
        calls[f"{name}.generate"] = lambda: (
            model(name).generate,
            {"tokens": tokens(), "max_new_tokens": 3, "temperature": 1.0, "top_k": 4,
             "generator": seeded()},
        )  # fmt: skip
    return calls


def _models() -> dict[str, Callable[[], Call]]:
    calls = {call: made for name in FAMILIES for call, made in _family(name).items()}
    return calls | {
        "Seq2Seq.translate": lambda: (
            model("Seq2Seq").translate,
            {"source": tokens(2, 5), "source_mask": torch.ones(2, 5).bool(), "max_new_tokens": 4},
        ),
        "Seq2Seq.decoder_given": lambda: (
            model("Seq2Seq").decoder_given, {"source": tokens(1, 5)},
        ),
        "HookedModel.from_pretrained": lambda: (
            sl.ConvAttn.from_pretrained, {"name": folder() / "model"},
        ),
        "HookedModel.add_hook": lambda: (
            model("ConvAttn").add_hook,
            {"name": "hook_embed", "hook": lambda t, hook: t, "dir": "fwd"},
        ),
        "load_model": lambda: (sl.load_model, {"path": folder() / "model"}),
    }  # fmt: skip


def _with_tokenizer(given: Any) -> Any:
    given.tokenizer = sl.CharTokenizer("to be or not")
    return given


def _layers() -> dict[str, Callable[[], Call]]:
    x = torch.randn(2, 7, 12, generator=seeded())
    return {
        "Attention": lambda: (
            sl.Attention,
            {"d_model": 12, "n_heads": 3, "conv_on": ["k"], "kernel_size": 3},
        ),
        "Attention.forward": lambda: (
            sl.Attention(12, 3, causal=False),
            {"x": x, "source": x[:, :5], "key_mask": torch.ones(2, 5).bool()},
        ),
        "DepthwiseConv": lambda: (sl.DepthwiseConv, {"channels": 5, "kernel_size": 3}),
        "DepthwiseConv.forward": lambda: (sl.DepthwiseConv(12, 3), {"x": x}),
        "KeySmear": lambda: (sl.KeySmear, {"n_heads": 3, "alpha": 0.5}),
        "KeySmear.forward": lambda: (sl.KeySmear(3), {"k": x.view(2, 7, 3, 4)}),
    }


def _data() -> dict[str, Callable[[], Call]]:
    chars = sl.CharTokenizer("to be or not")
    words = sl.PigLatinVocabulary()
    pairs = [(w, sl.to_pig_latin(w)) for w in ("team", "eat", "try", "by", "six")]
    repeat = {"batch_size": 2, "period": (2, 3), "length": 9, "d_vocab": 11, "seed": 0, "bos": 0}
    calls: dict[str, Callable[[], Call]] = {
        "TokenBatches": lambda: (
            sl.TokenBatches,
            {"tokens": tokens(1, 50)[0], "batch_size": 2, "length": 7, "seed": 0,
             "order": "shuffled"},
        ),
        "TokenBatches.batch": lambda: (sl.TokenBatches(tokens(1, 50)[0], 2, 7, 0).batch,
                                       {"step": 3}),
        "RepeatBatches": lambda: (sl.RepeatBatches, dict(repeat)),
        "RepeatBatches.batch": lambda: (sl.RepeatBatches(**repeat).batch, {"step": 3}),
        "PaddedBatches": lambda: (
            sl.PaddedBatches,
            {"lines": [tokens(1, n)[0] for n in (5, 3, 6)], "batch_size": 2, "length": 7,
             "pad": 10, "seed": 0},
        ),
        "PairBatches": lambda: (
            sl.PairBatches,
            {"pairs": list(pairs), "batch_size": 2, "seed": 0, "layout": "pair"},
        ),
        "PairBatches.batch": lambda: (sl.PairBatches(pairs, 2, 0).batch, {"step": 3}),
        "to_pig_latin": lambda: (sl.to_pig_latin, {"word": "team"}),
        "pig_latin_pairs": lambda: (sl.pig_latin_pairs, {"min_letters": 3, "max_letters": 4}),
        "read_pairs": lambda: (sl.read_pairs, {"path": folder() / "pairs.txt"}),
        "split_pairs": lambda: (
            sl.split_pairs, {"pairs": list(pairs), "validation": 0.4, "generator": seeded()},
        ),
        "repeated_tokens": lambda: (
            sl.repeated_tokens,
            {"batch": 2, "period": 3, "length": 7, "d_vocab": 11, "generator": seeded(), "bos": 0},
        ),
        "iid_tokens": lambda: (
            sl.iid_tokens, {"batch": 2, "length": 7, "d_vocab": 11, "generator": seeded()},
        ),
        "load_corpus": lambda: (
            sl.load_corpus,
            {"name_or_path": folder() / "text.txt", "split": "train", "max_chars": 100},
        ),
        "gpt2_tokenizer": lambda: (sl.gpt2_tokenizer, {}),
        "PigLatinVocabulary": lambda: (sl.PigLatinVocabulary, {}),
        "CharTokenizer": lambda: (sl.CharTokenizer, {"text": "to be"}),
        "ByteTokenizer": lambda: (sl.ByteTokenizer, {}),
    }  # fmt: skip
    kinds = {
        "CharTokenizer": (chars, "to be"),
        "ByteTokenizer": (sl.ByteTokenizer(), "to be"),
        "gpt2_tokenizer": (sl.gpt2_tokenizer(), "to be"),
        "PigLatinVocabulary": (words, "team"),
    }
    for name, (tokenizer, text) in kinds.items():
        calls |= {
            f"{name}.encode": lambda t=tokenizer, x=text: (t.encode, {"text": x}),
            f"{name}.decode": lambda t=tokenizer, x=text: (t.decode, {"tokens": t.encode(x)}),
            f"{name}.tokens": lambda t=tokenizer, x=text: (t.tokens, {"tokens": t.encode(x)}),
        }
    return calls


def _training() -> dict[str, Callable[[], Call]]:
    pairs = [(w, sl.to_pig_latin(w)) for w in ("team", "eat")]
    config = sl.TrainConfig(steps=2, warmup=1)
    wide = {"d_vocab": 29, "start": 27, "end": 28, "n_ctx": 20}
    return {
        "TrainConfig": lambda: (
            sl.TrainConfig,
            {"steps": 10, "lr": 1e-3, "schedule": "cosine", "warmup": 2, "final_lr_fraction": 0.1,
             "weight_decay": 0.01, "betas": (0.9, 0.99), "clip": 1.0, "accumulation": 2,
             "precision": "float32", "seed": 0, "checkpoint_every": 5, "keep_checkpoints": 2,
             "eval_every": 3, "skip_nonfinite": 1},
        ),
        "train": lambda: (
            sl.train,
            {"model": model("ConvAttn"), "data": Rows(), "config": config, "callbacks": [],
             "evaluate": None},
        ),
        "Tracker": lambda: (
            lambda metric, at: sl.Tracker(metric, at=at),
            {"metric": lambda m: {"loss": 1.0}, "at": 2},
        ),
        "GradientNorms": lambda: (sl.GradientNorms, {"every": 2}),
        "AttentionTracking": lambda: (
            sl.AttentionTracking,
            {"text": tokens(3, 7), "generator": seeded(), "repeats": tokens(2, 7), "windows": 2},
        ),
        "AttentionTracking.call": lambda: (
            sl.AttentionTracking(tokens(3, 7), generator=seeded(), windows=2),
            {"model": model("AttnAttn")},
        ),
        "GenerationTracking": lambda: (
            sl.GenerationTracking,
            {"prompts": tokens(2, 3), "new_tokens": 3, "generator": seeded(), "temperature": 1.0,
             "top_k": 3},
        ),
        "score_words": lambda: (
            sl.score_words,
            {"model": model("Seq2Seq", **wide), "pairs": pairs, "layout": "pair", "batch_size": 2},
        ),
        "WordScores.interval": lambda: (
            sl.WordScores(tuple(pairs), ("eamtay", "x"), 3.0, 9).interval, {"level": 0.9},
        ),
        "text_loss": lambda: (
            sl.text_loss,
            {"model": model("ConvAttn"), "tokens": tokens(1, 40)[0], "length": 9, "batch_size": 2,
             "n_characters": 40},
        ),
    }  # fmt: skip


def _analysis() -> dict[str, Callable[[], Call]]:
    calls: dict[str, Callable[[], Call]] = {}
    plain = ("prev_token_score", "attention_entropy", "attention_span", "sink_mass", "self_mass",
             "future_mass", "lag_profile", "head_diversity")  # fmt: skip
    options = {
        "attention_entropy": {"base": 2.0, "normalised": True},
        "attention_span": {"kind": "mass", "mass": 0.5},
        "lag_profile": {"max_lag": 3},
        "head_diversity": {"kind": "js"},
    }
    for name in plain:
        score, more = getattr(sl, name), options.get(name, {})
        mask = {"key_mask": torch.ones(7).bool()}
        calls |= {
            name: lambda s=score, o=more, m=mask: (s, {"source": pattern(), **o, **m}),
            f"{name} of a cache": lambda s=score, o=more: (
                s, {"source": cached("AttnAttn")[2], "kind_of_layer": None, **o},
            ),
        }  # fmt: skip
    for name in ("duplicate_token_score", "induction_score", "prefix_matching_score"):
        score = getattr(sl, name)
        calls |= {
            name: lambda s=score: (s, {"source": pattern(), "tokens": cached("AttnAttn")[1]}),
            f"{name} of a cache": lambda s=score: (
                s, dict(zip(("source", "tokens"), cached("Mamba")[2:0:-1], strict=True)),
            ),
        }  # fmt: skip
    calls |= {
        "induction_score kind": lambda: (
            sl.induction_score,
            {"source": pattern(), "tokens": cached("AttnAttn")[1], "kind": "diagonal"},
        ),
        "prefix_matching_score offset": lambda: (
            sl.prefix_matching_score,
            {"source": pattern(), "tokens": cached("AttnAttn")[1], "offset": (1, 2),
             "aggregate": "mean"},
        ),
        "stripe_score": lambda: (
            sl.stripe_score,
            {"source": pattern(), "detection": torch.eye(7).bool(), "normalise_by": "row"},
        ),
        "alignment_mass": lambda: (
            sl.alignment_mass,
            {"source": pattern(), "alignment": torch.arange(7).expand(2, 7).clone(), "shift": 0},
        ),
        "mixings": lambda: (sl.mixings, {"cache": cached("AttnAttn")[2], "kind": "attention"}),
        "Mixing": lambda: (DenseMixing, {"pattern": pattern()}),
        "Mixing.rows": lambda: (DenseMixing(pattern()).rows, {"start": 1, "stop": 3}),
        "Mixing.blocks": lambda: (
            lambda size: list(DenseMixing(pattern()).blocks(size)), {"size": 3},
        ),
        "Mixing.diagonal": lambda: (DenseMixing(pattern()).diagonal, {"lag": 2}),
        "Scores.mean": lambda: (_scores().mean, {"reduce": "macro"}),
        "Scores.interval": lambda: (_scores().interval, {"level": 0.9}),
        "Scores.top": lambda: (_scores().top, {"k": 2}),
        "implicit_mixings": lambda: (
            sl.implicit_mixings,
            {"cache": cached("Mamba")[2], "skips": {"blocks.0": torch.ones(12)}},
        ),
        "kernel_profile": lambda: (
            sl.kernel_profile, {"source": torch.rand(5, 3), "lags": [0, 1, 2]},
        ),
        "kernel_profile of a cache": lambda: (
            sl.kernel_profile,
            {"source": cached("ConvAttn")[2], "layer": "blocks.0.attn.conv_k"},
        ),
        "smear_coefficient": lambda: (
            sl.smear_coefficient,
            {"smeared": torch.randn(2, 7, 3, 4), "plain": torch.randn(2, 7, 3, 4)},
        ),
        "score_by_lag": lambda: (
            sl.score_by_lag,
            {"cache": _stream_cache(), "w_k": _stream_model().blocks[0].attn.W_K.detach(),
             "conv": "blocks.0.conv", "attn": "blocks.0.attn",
             "carried": float(_stream_model().config.residual)},
        ),
        "smear_evidence": lambda: (
            sl.smear_evidence,
            {"by_lag": {lag: torch.randn(2, 3, 7, 7) for lag in (0, 1)},
             "tokens": cached("AttnAttn")[1]},
        ),
        "layer_similarity": lambda: (
            sl.layer_similarity,
            {"source": cached("AttnAttn")[2], "kind": "js", "heads": "match"},
        ),
        "layer_similarity cka": lambda: (
            sl.layer_similarity,
            {"source": cached("AttnAttn")[2], "kind": "cka", "point": "hook_resid_post"},
        ),
        "linear_cka": lambda: (
            sl.linear_cka, {"x": torch.randn(9, 3), "y": torch.randn(9, 5)},
        ),
    }  # fmt: skip
    for name in ("per_token_loss", "induction_loss", "induction_accuracy", "icl_score", "ar_split"):
        more = {"early": 1, "late": 5} if name == "icl_score" else {}
        calls[name] = lambda n=name, o=more: (
            getattr(sl, n),
            {"logits": torch.randn(2, 7, 11), "tokens": cached("AttnAttn")[1], **o},
        )
    for call in list(calls):
        if call.endswith("of a cache"):
            calls[call] = _without("kind_of_layer", calls[call])
    return calls


def _scores() -> Any:
    return sl.prev_token_score(cached("AttnAttn")[2])


def _without(key: str, call: Callable[[], Call]) -> Callable[[], Call]:
    def made() -> Call:
        function, arguments = call()
        return function, {k: v for k, v in arguments.items() if k != key}

    return made


def _stream_model() -> Any:
    return model("ConvAttn", conv_on="stream")


def _stream_cache() -> dict[str, Tensor]:
    return dict(_stream_model().run_with_cache(tokens())[1].items())


def _text() -> dict[str, Callable[[], Call]]:
    calls: dict[str, Callable[[], Call]] = {
        "coherence": lambda: (
            sl.coherence, {"prompts": list(TEXTS), "continuations": list(TEXTS[::-1])},
        ),
        "segment_coherence": lambda: (
            sl.segment_coherence, {"samples": list(TEXTS), "segment": 4},
        ),
        "diversity": lambda: (sl.diversity, {"samples": list(TEXTS), "unit": "char"}),
        "association": lambda: (
            sl.association, {"metric": list(SERIES), "loss": SERIES[::-1], "level": 0.9},
        ),
        "association_within_run": lambda: (
            sl.association_within_run,
            {"metric": list(SERIES), "loss": SERIES[::-1], "steps": list(range(8))},
        ),
        "partial_correlation": lambda: (
            sl.partial_correlation,
            {"x": list(SERIES), "y": SERIES[::-1], "groups": [0, 0, 0, 0, 1, 1, 1, 1],
             "kind": "pearson", "level": 0.9},
        ),
        "phase_change": lambda: (
            sl.phase_change, {"series": list(SERIES), "steps": list(range(8))},
        ),
        "holm": lambda: (sl.holm, {"p_values": [0.01, 0.2, 0.5]}),
        "mcnemar": lambda: (sl.mcnemar, {"a": [True, False, True], "b": [True, True, False]}),
    }  # fmt: skip
    for name in ("distinct_n", "rep_n", "repetition", "self_bleu"):
        calls[name] = lambda n=name: (
            getattr(sl, n), {"samples": list(TEXTS), "n": 2, "unit": "char"},
        )  # fmt: skip
    return calls


def _causal() -> dict[str, Callable[[], Call]]:
    part = "blocks.0.attn.hook_z"
    states = {"layers": "blocks.0.ssm"}
    pair = {"clean": tokens(2, 7), "corrupt": tokens(2, 6)}
    return {
        "audit": lambda: (
            sl.audit,
            {"model": model("ConvAttn"), "tokens": tokens(2, 13), "length": 7, "floor_steps": 0,
             "generator": seeded()},
        ),
        "Component": lambda: (sl.Component, {"name": part, "units": (0, 1)}),
        "ablate": lambda: (
            sl.ablate,
            {"model": model("AttnAttn"), "tokens": tokens(2, 7), "component": part, "how": "zero",
             "metric": one_number, "n_controls": 2, "generator": seeded()},
        ),
        "ablate units": lambda: (
            lambda units: sl.ablate(
                model("AttnAttn"), tokens(), sl.Component(part, units), how="zero",
                metric=one_number, n_controls=1, generator=seeded(),
            ),
            {"units": (1,)},
        ),
        "keep_lags": lambda: (
            sl.keep_lags,
            {"model": model("ConvAttn"), "layer": "blocks.0.attn.conv_k", "keep": [0, 1]},
        ),
        "role_without_lags": lambda: (
            sl.role_without_lags,
            {"model": model("ConvAttn", conv_on="stream"), "tokens": tokens(), "roles": ["k"],
             "block": "blocks.0", "metric": one_number, "n_controls": 1, "generator": seeded()},
        ),
        "patch_activation": lambda: (
            sl.patch_activation,
            {"model": model("AttnAttn"), "clean": tokens(2, 7), "corrupt": tokens(2, 7) // 2,
             "component": part, "metric": one_number, "positions": [1, 2]},
        ),
        "patch_path": lambda: (
            sl.patch_path,
            {"model": model("AttnAttn"), "clean": tokens(2, 7), "corrupt": tokens(2, 7) // 2,
             "sender": part, "receiver": "blocks.1.attn.hook_q", "metric": one_number},
        ),
        "attribution": lambda: (
            sl.attribution,
            {"model": model("AttnAttn"), "clean": tokens(2, 7), "corrupt": tokens(2, 7) // 2,
             "names": [part], "metric": one_number},
        ),
        "state_patch": lambda: (
            sl.state_patch,
            {"model": model("Mamba"), **pair, **states, "donor": 3, "recipient": 2,
             "channels": [0, 3], "metric": one_number},
        ),
        "read_states": lambda: (
            sl.read_states,
            {"model": model("Mamba"), "tokens": tokens(), "position": 3, **states},
        ),
        "set_states": lambda: (
            sl.set_states,
            {"model": model("Mamba"), "states": sl.read_states(model("Mamba"), tokens(), 3),
             "position": 2, "channels": [0, 3]},
        ),
        "hold_states": lambda: (
            sl.hold_states, {"model": model("Mamba"), "start": 3, **states},
        ),
        "freeze_delta": lambda: (
            sl.freeze_delta,
            {"model": model("Mamba"), "tokens": tokens(), **states,
             "mask": torch.ones(2, 7).bool()},
        ),
        "cut_convolution": lambda: (
            sl.cut_convolution,
            {"model": model("Mamba"), "position": 3, "layers": "blocks.0.conv"},
        ),
        "Audit": lambda: (lambda: sl.audit(model("ConvAttn"), tokens(2, 13)).to_dict(), {}),
    }  # fmt: skip


def _adapters() -> dict[str, Callable[[], Call]]:
    theirs = {
        "blocks.0.attn.hook_pattern": pattern(),
        "blocks.0.hook_resid_pre": torch.ones(2, 7, 12),
    }
    return {
        "bridge_cache": lambda: (sl.bridge_cache, {"cache": dict(theirs)}),
        "bridge_mixings": lambda: (sl.bridge_mixings, {"cache": dict(theirs)}),
        "attention_cache": lambda: (
            sl.attention_cache, {"attentions": [pattern(), pattern()], "part": "encoder"},
        ),
    }  # fmt: skip


def _viewing() -> dict[str, Callable[[], Call]]:
    from smearlens.viz import widgets

    names = [f"t{i}" for i in range(7)]
    return {
        "attention_heads": lambda: (
            widgets.attention_heads, {"pattern": pattern(1)[0], "query_tokens": list(names)},
        ),
        "attention_pattern": lambda: (
            widgets.attention_pattern, {"pattern": pattern(1)[0, 0], "query_tokens": list(names)},
        ),
        "evolution": lambda: (
            widgets.evolution,
            {"pattern": pattern(), "steps": [0, 5], "query_tokens": list(names)},
        ),
        "state_map": lambda: (
            widgets.state_map, {"state": torch.ones(3, 7, 5), "tokens": list(names)},
        ),
        "tokens widget": lambda: (
            widgets.tokens, {"tokens": list(names), "values": list(SERIES[:7])},
        ),
        "delta_strip": lambda: (
            widgets.delta_strip, {"delta": list(SERIES[:7]), "tokens": list(names)},
        ),
        "kernel_profile widget": lambda: (
            widgets.kernel_profile, {"profile": [0.1, 0.7, 0.3], "lags": [0, 1, 2]},
        ),
        "layer_similarity widget": lambda: (
            widgets.layer_similarity, {"similarity": torch.eye(3), "labels": ["a", "b", "c"]},
        ),
    }  # fmt: skip


def right_calls() -> dict[str, Callable[[], Call]]:
    """Name of a call to what makes it: a function and its arguments."""
    return {
        **_models(), **_layers(), **_data(), **_training(), **_analysis(), **_text(), **_causal(),
        **_adapters(), **_viewing(),
    }  # fmt: skip
