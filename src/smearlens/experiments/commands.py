"""What each command of the command line does, from its options to the text it prints.

Leaves out parsing (`cli`) and the studies themselves.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from typing import Any

import torch

from smearlens._extras import MissingExtraError
from smearlens._files import read_object
from smearlens.data.corpora import CorpusError
from smearlens.experiments.engines import use_engine
from smearlens.models.families import family, load_model
from smearlens.models.files import ModelFileError
from smearlens.training.checkpoint import CheckpointError
from smearlens.training.nonfinite import NonFiniteError
from smearlens.training.run import RunConflictError


def is_expected(error: Exception) -> bool:
    """Whether an error is one whose message is meant for the user."""
    known = (
        ValueError, TypeError, OSError, ModelFileError, CheckpointError, CorpusError,
        NonFiniteError, RunConflictError, MissingExtraError,
    )  # fmt: skip
    return isinstance(error, known)


def run(command: Any) -> str:
    """Run a parsed command and return what it has to say."""
    return {
        "Compare": compare,
        "Experiment": experiment,
        "Train": train,
        "Analyze": analyze,
        "Audit": audit,
        "Claims": claims,
    }[type(command).__name__](command)


def compare(options: Any) -> str:
    """The main job."""
    from smearlens.experiments.smeared_keys import short as smeared_keys

    config = smeared_keys.CompareConfig(
        seeds=options.seeds, steps=options.steps, text_steps=options.text_steps
    )
    if options.quick:
        config = config.quick()
    if options.force and (options.out / "study.json").exists():
        shutil.rmtree(options.out)
    line = shlex.join(["smearlens", *sys.argv[1:]])
    with use_engine(options.engine):
        result = smeared_keys.compare(config, options.out, jobs=options.jobs, command=line)
    lines = [_verdict_line(verdict.to_dict()) for verdict in result.verdicts]
    return "\n".join([*lines, f"\nreport: {result.report}"])


def experiment(options: Any) -> str:
    """A study by name."""
    from dataclasses import fields, replace
    from pathlib import Path

    from smearlens.experiments.study import study_named

    config_class, run_study = study_named(options.name)
    known = {field.name for field in fields(config_class)}
    given = {name: getattr(options, name) for name in ("seeds", "steps", "data")}
    chosen = {name: value for name, value in given.items() if value is not None}
    if missing := sorted(chosen.keys() - known):
        raise ValueError(
            f"{options.name} has no {missing[0]!r}; its sizes: {sorted(known)}, set from Python"
        )
    config = config_class()
    if options.quick:
        config = config.quick()
    config = replace(config, **chosen)
    out = options.out or Path("runs") / options.name
    if options.force and (out / "study.json").exists():
        shutil.rmtree(out)
    line = shlex.join(["smearlens", *sys.argv[1:]])
    with use_engine(options.engine):
        study = run_study(config, out, jobs=options.jobs, command=line)
    lines = [_verdict_line(v) for v in study["verdicts"]]
    return "\n".join([*lines, f"\nreport: {out / 'report.html'}"])


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

    cls = family(options.model)
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


def analyze(options: Any) -> str:
    """Scores of a saved model."""
    from smearlens.analysis.behaviour import induction_accuracy
    from smearlens.analysis.heads import duplicate_token_score, induction_score, prev_token_score
    from smearlens.analysis.kernels import kernel_profile
    from smearlens.data.synthetic import repeated_tokens

    model = load_model(options.checkpoint)
    generator = torch.Generator().manual_seed(options.seed)
    tokens = repeated_tokens(
        options.examples, options.period, options.length, model.config.d_vocab, generator=generator
    )
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    parts = [
        f"accuracy on repeats of period {options.period[0]} to {options.period[1]}: "
        f"{float(induction_accuracy(logits, tokens).mean()):.3f}",
        repr(induction_score(cache, tokens)),
        repr(prev_token_score(cache)),
        repr(duplicate_token_score(cache, tokens)),
    ]
    for name in model.hook_dict:
        if name.endswith("hook_kernel"):
            layer = name.removesuffix(".hook_kernel")
            parts.append(f"kernel of {layer}\n{kernel_profile(cache, layer=layer)!r}")
    return "\n\n".join(parts)


def audit(options: Any) -> str:
    """Audit of a saved model."""
    from smearlens.causal.audit import audit as audit_model

    report = audit_model(load_model(options.checkpoint), floor_steps=options.floor_steps)
    return json.dumps(report.to_dict(), indent=1) if options.json else repr(report)


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
    study = read_object(options.result, "name the result.json of a study", "verdicts")
    return "\n".join(
        f"{claim_name(v['claim']['number'])}: {v['outcome']}: {v['because']}"
        for v in study["verdicts"]
    )
