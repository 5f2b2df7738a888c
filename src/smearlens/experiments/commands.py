"""What each command of the command line does, from its options to the text it prints.

Leaves out parsing (`cli`) and the studies themselves.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from smearlens._extras import MissingExtraError
from smearlens._files import read_object
from smearlens.data.corpora import CorpusError
from smearlens.experiments.engines import use_engine
from smearlens.experiments.study import as_json, starting_over, study_named
from smearlens.models.base import HookedModel
from smearlens.models.families import FAMILIES, family, load_model
from smearlens.models.files import ModelFileError
from smearlens.models.seq2seq import Seq2Seq
from smearlens.training.checkpoint import CheckpointError
from smearlens.training.nonfinite import NonFiniteError
from smearlens.training.run import RunConflictError

TRAINED = sorted(FAMILIES.keys() - {"Seq2Seq"})  # by `train`; that one reads pairs


def explanation(error: Exception) -> str | None:
    """What an error tells the user in a line; None if its message is not meant for one."""
    known = (
        ValueError, TypeError, OSError, ModelFileError, CheckpointError, CorpusError,
        NonFiniteError, RunConflictError, MissingExtraError,
    )  # fmt: skip
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}" if isinstance(error, known) else None


def run(command: Any) -> tuple[str, int]:
    """Run a parsed command; returns what it has to say, and the exit code."""
    if getattr(command, "jobs", 1) < 1:
        raise ValueError(f"--jobs must be at least 1, got {command.jobs}")
    if (out := getattr(command, "out", None)) is not None:
        _require_folder(out)
    said = {
        "Compare": compare,
        "Experiment": experiment,
        "Train": train,
        "Analyze": analyze,
        "Audit": audit,
        "Claims": claims,
    }[type(command).__name__](command)
    return said if isinstance(said, tuple) else (said, 0)


def _require_folder(out: Path) -> None:
    """Raise unless `out` is a folder or can become one."""
    there = next((path for path in (out, *out.parents) if path.exists()), Path())
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file; name a folder, new or of the same run")


def compare(options: Any) -> str:
    """The main job."""
    from smearlens.experiments.smeared_keys import short as smeared_keys

    config = _sized(smeared_keys.CompareConfig, options, ("seeds", "steps", "text_steps"))
    with use_engine(options.engine), starting_over(options.force):
        result = smeared_keys.compare(
            config, options.out, jobs=options.jobs, command=_command_line()
        )
    lines = [_verdict_line(verdict.to_dict()) for verdict in result.verdicts]
    return "\n".join([*lines, f"\nreport: {result.report}"])


def experiment(options: Any) -> str:
    """A study by name."""
    config_class, run_study = study_named(options.name)
    config = _sized(config_class, options, ("seeds", "steps", "data"))
    out = options.out or Path("runs") / options.name
    with use_engine(options.engine), starting_over(options.force):
        study = run_study(config, out, jobs=options.jobs, command=_command_line())
    lines = [_verdict_line(v) for v in study["verdicts"]]
    return "\n".join([*lines, f"\nreport: {out / 'report.html'}"])


def _sized(config_class: Any, options: Any, names: Sequence[str]) -> Any:
    """The configuration of a study, quick if asked for; the sizes that were given win."""
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    known = sorted(field.name for field in fields(config_class))
    if missing := sorted(given.keys() - set(known)):
        raise ValueError(
            f"{options.name} has no {missing[0]!r}; its sizes: {known}, set from Python"
        )
    config = config_class()
    return replace(config.quick() if options.quick else config, **given)


def _command_line() -> str:
    return shlex.join(["smearlens", *sys.argv[1:]])


def _verdict_line(verdict: dict[str, Any]) -> str:
    from smearlens.viz.page import claim_name

    claim, seeds = verdict["claim"], verdict["n_seeds"]
    return (
        f"{claim_name(claim['number'])}: {verdict['outcome'].upper()} ({seeds} seeds)\n"
        f"  “{claim['statement']}”\n  {verdict['because']}"
    )


def train(options: Any) -> str:
    """One training run; only the first of several processes has something to say."""
    from accelerate import PartialState

    from smearlens.data.batches import RepeatBatches, TokenBatches
    from smearlens.training.config import TrainConfig
    from smearlens.training.loop import train as train_model

    cls = _trained_class(options.model)
    changes: dict[str, Any] = {}
    tokens = None
    if options.data != "repeats":
        from smearlens.data.corpora import load_corpus
        from smearlens.data.tokenizers import CharTokenizer

        text = load_corpus(options.data).text
        tokenizer = CharTokenizer(text)
        tokens, changes["d_vocab"] = tokenizer.encode(text), tokenizer.d_vocab
    torch.manual_seed(options.seed)
    model = cls.from_preset(options.preset, **changes)
    length, d_vocab = min(48, model.config.n_ctx), model.config.d_vocab
    data: Any = (
        RepeatBatches(options.batch_size, (8, 20), length, d_vocab, options.seed)
        if tokens is None
        else TokenBatches(tokens, options.batch_size, model.config.n_ctx, options.seed)
    )
    config = TrainConfig(
        steps=options.steps, lr=options.lr, warmup=min(100, options.steps // 4),
        seed=options.seed, checkpoint_every=options.checkpoint_every,
    )  # fmt: skip
    result = train_model(model, data, config, out=options.out)
    if not PartialState().is_main_process:
        return ""
    model.save_pretrained(options.out / "model")
    loss = result.log("metrics")[-1]["loss"]
    return (
        f"{options.model}, {model.n_parameters:,} parameters, loss {loss:.4f} nats per token: "
        + str(options.out / "model")
    )


def _trained_class(name: str) -> type[HookedModel]:
    if name not in TRAINED:
        more = "; the study pig-latin trains Seq2Seq, on pairs" if name == "Seq2Seq" else ""
        raise ValueError(f"--model {name} cannot be trained on tokens; known: {TRAINED}{more}")
    return family(name)


def analyze(options: Any) -> str:
    """Scores of a saved model."""
    from smearlens.analysis.behaviour import induction_accuracy
    from smearlens.analysis.heads import duplicate_token_score, induction_score, prev_token_score
    from smearlens.analysis.kernels import kernel_profile
    from smearlens.data.synthetic import repeated_tokens

    model = load_model(options.checkpoint)
    if isinstance(model, Seq2Seq):
        raise ValueError(
            f"{options.checkpoint} is an encoder-decoder, and analyze scores models of one "
            "sequence; model.run_with_cache(source, target) caches its attention, which "
            "alignment_mass and the heads' scores read (examples/04_pig_latin.py)"
        )
    generator = torch.Generator().manual_seed(options.seed)
    tokens = repeated_tokens(
        options.examples, options.period, options.length, model.config.d_vocab, generator=generator
    )
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    accuracy = float(induction_accuracy(logits, tokens).mean())
    scores = [
        induction_score(cache, tokens),
        prev_token_score(cache),
        duplicate_token_score(cache, tokens),
    ]
    kernels = {
        name.removesuffix(".hook_kernel"): kernel_profile(cache, layer=name.rpartition(".")[0])
        for name in model.hook_dict
        if name.endswith(".hook_kernel")
    }
    if options.json:
        return as_json({
            "accuracy": accuracy,
            "scores": {score.name: score.records() for score in scores},
            "kernels": {layer: profile.records() for layer, profile in kernels.items()},
        }, indent=1)  # fmt: skip
    low, high = options.period
    parts = [f"accuracy on repeats of period {low} to {high}: {accuracy:.3f}", *map(repr, scores)]
    parts += [f"kernel of {layer}\n{profile!r}" for layer, profile in kernels.items()]
    return "\n\n".join(parts)


def audit(options: Any) -> tuple[str, int]:
    """Audit of a saved model, and whether it failed."""
    from smearlens.causal.audit import audit as audit_model
    from smearlens.data.synthetic import iid_tokens

    model, given = load_model(options.checkpoint), ""
    if isinstance(model, Seq2Seq):
        n_ctx, generator = model.config.n_ctx, torch.Generator().manual_seed(0)
        source = iid_tokens(1, n_ctx, model.config.d_vocab, generator=generator)
        model, given = model.decoder_given(source), f", given a source of {n_ctx} random tokens"
    report = audit_model(model, floor_steps=options.floor_steps)
    report = replace(report, model=report.model + given)
    return as_json(report.to_dict(), indent=1) if options.json else repr(report), int(
        not report.passed
    )


def claims(options: Any) -> str:
    """The registry, or a study's verdicts."""
    from smearlens.experiments.claims import CLAIMS, WRITEUPS
    from smearlens.viz.page import claim_name

    if options.result is None:
        return "\n\n".join(
            f"claim {c.number} ({WRITEUPS[c.source]})\n  “{c.statement}”\n"
            f"  suspicion: {c.suspicion}\n  test: {c.test}"
            for c in CLAIMS
        )
    remedy = "name the result.json of a study"
    study = read_object(options.result, remedy, "verdicts")
    try:
        return "\n".join(
            f"{claim_name(v['claim']['number'])}: {v['outcome']}: {v['because']}"
            for v in study["verdicts"]
        )
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{options.result}: its 'verdicts' are not those of a study ({error!r}); {remedy}"
        ) from error
