"""What an import costs and what it must not pull in, each measured in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest

REPEATS = 5  # the smallest of so many times counts; the first that keeps the budget ends it

MEASURE = """
import sys, time, json
{before}
start = time.process_time()
{statement}
seconds = time.process_time() - start
print("\\n" + json.dumps([seconds, sorted(sys.modules)]))
"""

HEAVY = {
    "transformer_lens", "transformers", "datasets", "pandas", "matplotlib", "scipy", "wandb",
    "circuitsvis", "accelerate", "tokenizers", "huggingface_hub",
}  # fmt: skip


def cheapest(statement, before="", budget=0.0):
    """Smallest CPU time of `statement` after `before`, in seconds, and the modules then loaded."""
    best, modules = float("inf"), set()
    for _ in range(REPEATS):
        code = MEASURE.format(before=before, statement=statement)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seconds, names = json.loads(run.stdout.splitlines()[-1])
        best, modules = min(best, seconds), {name.partition(".")[0] for name in names}
        if best <= budget:
            break
    return best, modules


@pytest.mark.parametrize(
    ("statement", "before", "budget", "forbidden"),
    [
        ("import smearlens", "", 0.05, HEAVY | {"torch", "numpy", "jaxtyping"}),
        ("from smearlens import induction_score", "import torch", 0.15, HEAVY),
        (
            "from smearlens import ConvAttn",
            "import transformer_lens",
            0.2,
            {"matplotlib", "scipy", "circuitsvis", "wandb"},
        ),
    ],
    ids=["package", "metric", "model"],
)
def test_an_import_keeps_its_budget_of_cpu_time(statement, before, budget, forbidden):
    seconds, modules = cheapest(statement, before, budget)
    assert not forbidden & modules
    assert seconds <= budget


@pytest.mark.skipif(
    importlib.util.find_spec("smearlens.cli") is None, reason="the command line is not there yet"
)
def test_help_keeps_its_budget_from_the_start_of_the_process():
    statement = """
from smearlens.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
start = 0.0  # all CPU time of the process counts
"""
    seconds, modules = cheapest(statement, budget=0.6)
    assert "smearlens" in modules
    assert not {"torch", "numpy", *HEAVY} & modules
    assert seconds <= 0.6


def test_all_public_names_load_in_silence_and_without_what_few_functions_need():
    everything = "import smearlens; [getattr(smearlens, name) for name in smearlens.__all__]"
    code = f"{everything}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr, run.stdout.count("\n")) == (0, "", 1)
    modules = set(json.loads(run.stdout))
    assert not {"matplotlib", "scipy", "circuitsvis", "wandb", "tensorboard", "ray"} & modules
