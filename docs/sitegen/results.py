"""What the committed results say: studies, verdicts, reports; for the pages and the site.

Reads `results/NAME/result.json` and the registries of studies and claims. Leaves out running
anything: a claim that no committed result judges is shown with the command that would.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitegen.reference import Markdown, table
from smearlens.experiments.claims import CLAIMS, WRITEUPS, Claim
from smearlens.experiments.study import STUDIES
from smearlens.viz.page import spoken, stored_estimate
from smearlens.viz.report import write_report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
MAIN_JOB = {"compare": ("smearlens.experiments.smeared_keys.short", "smearlens compare")}


@dataclass(frozen=True)
class Study:
    """A study as the pages show it.

    Attributes:
        name: on the command line, and of its folder below `results`
        command: that runs it
        question: first line of its module's docstring
        claims: numbers of the claims that it judges
        result: contents of its committed `result.json`, if there is one
    """

    name: str
    command: str
    question: str
    claims: tuple[int, ...]
    result: dict[str, Any] | None


def results() -> dict[str, dict[str, Any]]:
    """Name of a study to its committed result; results without verdicts are not of studies."""
    files = sorted(RESULTS.glob("*/result.json"))
    found = {file.parent.name: _read(file) for file in files}
    return {name: result for name, result in found.items() if "verdicts" in result}


def _read(file: Path) -> dict[str, Any]:
    """A result as anyone would get it: where its data lay is `FOLDER`."""
    result = json.loads(file.read_text("utf-8"))
    if result.get("config", {}).get("data"):
        result["config"]["data"] = "FOLDER"
        result["command"] = re.sub(r"(--data)[ =]\S+", r"\1 FOLDER", result["command"])
    return result


def result_files() -> list[Path]:
    """The files of `results`."""
    return [RESULTS / name / "result.json" for name in results()]


def studies() -> list[Study]:
    """The main job and every registered study."""
    committed = results()
    found = []
    for name, (module, command) in _modules().items():
        tree = _source(module)
        question = (ast.get_docstring(tree) or "").splitlines()[0]
        result = committed.get(name)
        judged = (
            _judged(tree) if result is None else {v["claim"]["number"] for v in result["verdicts"]}
        )
        claims = tuple(sorted(number for number in judged if number))
        made = command if result is None else result["command"]  # as the results were made
        made = re.sub(r" --out \S+", "", made)  # where `command` writes without being told
        found.append(Study(name, made, question, claims, result))
    return found


def studies_in_full() -> Markdown:
    """Every study: what it asks, how to run it, what it cost, what it found."""
    parts = []
    for s in studies():
        parts += [f"## {s.name}", s.question, f"```sh\n{s.command}\n```", _outcome(s)]
    return Markdown("\n\n".join(parts))


def verdicts() -> dict[int, list[tuple[Study, dict[str, Any]]]]:
    """Number of a claim to the committed verdicts on it; 0 is what studies state themselves."""
    found: dict[int, list[tuple[Study, dict[str, Any]]]] = {}
    for study in studies():
        for verdict in study.result["verdicts"] if study.result else ():
            found.setdefault(verdict["claim"]["number"], []).append((study, verdict))
    return found


def claims_overview() -> Markdown:
    """Every claim on a line."""
    known = verdicts()
    rows = []
    for c in CLAIMS:
        judged = [f"{_mark(v)} ({study.name})" for study, v in known.get(c.number, ())]
        rows.append(
            (f"[{c.number}](#claim-{c.number})", _cell(c.statement), "<br>".join(judged) or "open")
        )
    return table(("claim", "statement", "verdict"), rows)


def claims_in_full() -> Markdown:
    """Every claim with its suspicion, its test, and what the committed results say."""
    known, every = verdicts(), studies()
    parts = []
    for c in CLAIMS:
        parts += [f"## Claim {c.number}", _stated(c, f"the write-up “{WRITEUPS[c.source]}”")]
        parts += [_judgement(study, verdict) for study, verdict in known.get(c.number, ())]
        if c.number not in known:
            by = [f"`{s.command}`" for s in every if c.number in s.claims]
            parts.append(f"No committed verdict. {_judges(by)}")
    for study, verdict in known.get(0, ()):
        fields = verdict["claim"]
        parts += [
            f"## From the literature: {study.name}",
            _stated(Claim(**fields), fields["source"]),
        ]
        parts.append(_judgement(study, verdict))
    return Markdown("\n\n".join(parts))


def write_report_of(source: Path, target: Path) -> None:
    """The page that a study makes of its `result.json`.

    Its writer is the `write_…_report(result, folder)` that the module of the study imports. Where
    there is none, or (with a warning) where it does not fit a result of an older version, the page
    holds the verdicts and how to run it again.
    """
    name, result = source.parent.name, _read(source)
    module, command = _modules().get(name, ("", ""))
    with tempfile.TemporaryDirectory() as folder:
        try:
            page = _writer(module)(result, Path(folder))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            warnings.warn(
                f"the report of {name} cannot show results/{name}/result.json ({error!r}): it is "
                f"of another version; run `{command}` and commit its result",
                stacklevel=2,
            )
            page = _verdicts_only(result, Path(folder))
        shutil.copyfile(page, target)


def _verdicts_only(result: dict[str, Any], out: Path) -> Path:
    return write_report(result, out, [], title=result["study"].capitalize())


def _writer(module: str) -> Callable[[dict[str, Any], Path], Path]:
    for node in ast.walk(_source(module)) if module else ():
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name.startswith("write_") and alias.name.endswith("_report"):
                    return getattr(importlib.import_module(str(node.module)), alias.name)
    return _verdicts_only


def _modules() -> dict[str, tuple[str, str]]:
    """Name of a study to its module and its command."""
    registered = {name: (home[0], f"smearlens experiment {name}") for name, home in STUDIES.items()}
    return MAIN_JOB | registered


def _outcome(study: Study) -> str:
    """Claims or verdicts, seeds, computing time, and where the results are."""
    linked = {n: f"[claim {n}](claims.md#claim-{n})" for n in study.claims}
    if study.result is None:
        return f"Judges {', '.join(linked.values()) or 'no claim'}. No results are committed yet."
    said = ", ".join(
        f"{linked.get(v['claim']['number'], v['claim']['statement'])} {_mark(v)}"
        for v in study.result["verdicts"]
    )
    cost = [f"{study.result['config']['seeds']} seeds"] if "seeds" in study.result["config"] else []
    if seconds := study.result.get("cpu_seconds"):
        cost.append(f"{seconds / 60:.0f} minutes of processor time")
    where = f"[report](reports/{study.name}/report.html), numbers in `results/{study.name}`"
    return f"{said}.\n\n{', '.join([*cost, where]).capitalize()}."


def _mark(verdict: dict[str, Any]) -> str:
    return f'<b class="verdict {verdict["outcome"]}">{verdict["outcome"]}</b>'


def _stated(claim: Claim, source: str) -> str:
    return (
        f"> {claim.statement}\n\n*Source*: {source}.<br>*Why it may be an artefact*: "
        f"{claim.suspicion}.<br>*The test*: {claim.test}."
    )


def _judgement(study: Study, verdict: dict[str, Any]) -> str:
    """Outcome, reason, command and the numbers behind it."""
    command = (study.result or {}).get("command") or study.command
    rows = [
        (_cell(f["label"]), spoken(stored_estimate(f["estimate"])),
         "intervention" if f["causal"] else "observation")
        for f in verdict["findings"]
    ]  # fmt: skip
    return (
        f"{_mark(verdict)} by `{command}`, {verdict['n_seeds']} seeds "
        f"([report](reports/{study.name}/report.html)). {verdict['because']}\n\n"
        f'<details markdown="1"><summary>{len(rows)} numbers behind it</summary>\n\n'
        f"{table(('number', 'mean [95 % interval]', 'from an'), rows)}\n\n</details>"
    )


def _cell(text: str) -> str:
    """Text for a cell of a table, where a bar would start another."""
    return text.replace("|", "&#124;")


def _judges(commands: list[str]) -> str:
    return f"Judged by {' and '.join(commands)}." if commands else "No study judges it yet."


def _source(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the registry of studies names {module}, which does not exist")
    return ast.parse(Path(spec.origin).read_text("utf-8"))


def _judged(tree: ast.Module) -> set[int]:
    """Claims named by a study's module and by the modules of verdicts whose rules it takes."""
    numbers, todo, seen = set(), [tree], set()
    while todo:
        for node in ast.walk(todo.pop()):
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
                modules = [f"{node.module}.{name}" for name in names if name.endswith("verdicts")]
                modules += [str(node.module)] if "judge" in names else []
                todo += [_source(module) for module in modules if module not in seen]
                seen.update(modules)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "claim":
                numbers |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return numbers
