"""Tables read off the code: hooks of a model, public names, errors, claims.

Used by the pages while they are built, and by the tests. Leaves out everything that is written.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import smearlens

SRC = Path(smearlens.__file__).parent
COMMENT = re.compile(r"self\.(hook_\w+) = HookPoint\(\)  # (\[[^\]]*\])(?:, (.*))?")

MEANING = {  # where the comment in the code is the shape alone
    "hook_embed": "embedding of each token",
    "hook_pos_embed": "embedding of each position",
    "hook_resid_pre": "residual stream before the block",
    "hook_resid_post": "residual stream after the block",
    "hook_in": "input of the convolution",
    "hook_out": "output of the convolution, as long as its input",
    "hook_kernel": "the weights themselves: a hook here ablates a tap",
    "hook_k": "keys as they enter the scores: convolved, smeared, rotated",
    "hook_v": "values as they are averaged",
    "hook_z": "values averaged by the pattern, per head",
    "hook_pattern": "weights after the softmax; rows sum to 1",
    "hook_u": "input of the layer, after convolution and activation",
    "hook_delta": "step size Δ, after the softplus",
    "hook_B": "input matrix of each token",
    "hook_C": "read-out matrix of each token",
    "hook_A_bar": "decay of each state at each step",
    "hook_B_bar": "gain of the input into each state",
    "hook_attn_out": "what attention adds to the stream",
    "hook_cross_attn_out": "what cross attention adds to the stream",
    "hook_conv_out": "what the convolution adds to the stream",
    "hook_ssm_out": "what the state-space layer adds to the stream",
    "hook_mlp_out": "what the MLP adds to the stream",
}

API_PAGES = {  # page -> title, introduction, prefixes of the modules whose names it holds
    "models": ("Models and layers", "Build, hook, save and load.", ("models", "nn", "_hooks")),
    "analysis": ("Analysis", "From activations to numbers.", ("analysis",)),
    "causal": ("Causal", "Experiments on a running model.", ("causal", "experiments")),
    "data": ("Data", "Tokens, and where they come from.", ("data",)),
    "training": ("Training", "A short loop that resumes.", ("training",)),
    "viewing": (
        "Viewing and adapters",
        "Imported from their own modules, so that a metric loads none of it.",
        ("viz", "adapters"),
    ),
}
MODULES = {  # page -> modules documented whole, below the public names
    "analysis": ("analysis.states", "analysis.mixing.state_space"),
    "viewing": ("viz.widgets", "viz.plots", "adapters.hugging_face"),
}
RESULTS_OF = {  # page -> what its functions return or take, documented below the public names
    "analysis": (
        "analysis.mixing.options.RowOptions", "analysis.patterns.Profile",
        "analysis.kernels.KernelProfile", "analysis.smearing.SmearFit",
        "analysis.similarity.Similarity", "analysis.coherence.Coherence",
        "analysis.association.Association", "analysis.association.Correlation",
        "analysis.association.WithinRun", "analysis.phase_change.PhaseChange",
        "analysis.loss_paths.LossPaths", "analysis.stats.PairedTest",
        "analysis.behaviour.IclScore", "analysis.behaviour.ArSplit",
        "analysis.mixing.implicit.ImplicitMixing",
    ),
    "causal": ("causal.ablate.Effect", "causal.patch.Recovery"),
    "data": ("data.corpora.Corpus", "data.pig_latin.PairSplit"),
    "training": ("training.loop.TrainResult",),
}  # fmt: skip
FIELD = re.compile(  # name, type, default and comment of a field; a long comment stands above it
    r"^(?:    # ([^\n]*)\n)?    (\w+): ([^\n#]*?)(?: = ([^\n#]*?))?(?:  # ([^\n]*))?$", re.MULTILINE
)


class Markdown(str):
    """Text that a page shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)


def hook_rows(model: Any) -> list[tuple[str, str, str]]:
    """Name, shape and meaning of every hook of a model, from the comments where it is made."""
    points = dict(model.named_modules())
    rows = []
    for name in model.hook_dict:
        owner, _, point = name.rpartition(".")
        shape, meaning = _comments(type(points[owner]))[point]
        rows.append((name, shape, meaning or MEANING[point]))
    return rows


def hook_table(model: Any) -> Markdown:
    """`hook_rows` as a table."""
    return table(
        ("name", "shape", "what it is"), ((f"`{n}`", f"`{s}`", m) for n, s, m in hook_rows(model))
    )


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Markdown:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return Markdown("\n".join(f"| {' | '.join(str(c) for c in line)} |" for line in lines))


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Hook point to the shape and the remark in the comment behind it, base classes included."""
    found: dict[str, tuple[str, str]] = {}
    for each in reversed(cls.__mro__):
        if each.__module__.startswith("smearlens"):
            for name, shape, remark in COMMENT.findall(inspect.getsource(each)):
                found[name] = (shape, remark)
    return found


def homes() -> dict[str, str]:
    """Public name to the module that defines it."""
    return dict(smearlens._HOME_OF)


def api_names() -> dict[str, list[str]]:
    """Page of the reference to the public names on it, in order."""
    pages: dict[str, list[str]] = {page: [] for page in API_PAGES}
    for name, module in homes().items():
        part = module.split(".")[1]
        owners = [page for page, (_, _, parts) in API_PAGES.items() if part in parts]
        if len(owners) != 1:
            raise ValueError(
                f"{name} of {module} belongs on {owners or 'no'} page of the reference; "
                f"add {part!r} to one entry of API_PAGES"
            )
        pages[owners[0]].append(name)
    return pages


def api_pages() -> dict[str, str]:
    """Page of the reference to its Markdown, one mkdocstrings directive per public name."""
    pages = {}
    for page, names in api_names().items():
        title, introduction, _ = API_PAGES[page]
        parts = [f"# {title}", introduction]
        for name in names:
            parts += [f"::: {homes()[name]}.{name}", *_facts(getattr(smearlens, name))]
        if page in RESULTS_OF:
            parts.append("## What they return {.module}")
        parts += [
            f"::: smearlens.{home}\n    options:\n      heading_level: 3"
            for home in RESULTS_OF.get(page, ())
        ]
        for module in MODULES.get(page, ()):
            parts.append(f"## `smearlens.{module}` {{ .module }}")
            parts += [
                f"::: smearlens.{module}.{name}\n    options:\n      heading_level: 3"
                for name in public_names(module)
            ]
        pages[page] = "\n\n".join(parts) + "\n"
    return pages


def _facts(thing: Any) -> list[str]:
    """Fields of a configuration, presets of a model: what no docstring repeats."""
    if not inspect.isclass(thing):
        return []
    if thing.__name__.endswith("Config"):
        body = inspect.getsource(thing).partition("def ")[0]
        rows = [
            (f"`{name}`", f"`{_choices(kind)}`", f"`{default}`" if default else "required",
             above or beside)
            for above, name, kind, default, beside in FIELD.findall(body)
        ]  # fmt: skip
        return [table(("field", "takes", "default", "what it is"), rows)]
    rows = [
        (f"`{n}`", p.source, f"`{p.changes}`") for n, p in getattr(thing, "presets", {}).items()
    ]
    return [table(("preset", "what it is", "differs in"), rows)] if rows else []


def _choices(kind: str) -> str:
    """A type as a reader of a table wants it, without a bar that would start another cell."""
    return re.sub(r"Literal\[(.*?)\]", r"\1", kind).replace(" | ", " or ")


def public_names(module: str) -> list[str]:
    """`__all__` of a module of the package, else the public functions and classes it defines."""
    file = SRC.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    made = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, made) and not n.name.startswith("_")]


def error_classes() -> list[str]:
    """Every exception the package defines."""
    found = []
    for file in sorted(SRC.rglob("*.py")):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Warning")):
                found.append(node.name)
    return found
