"""Memory: estimates against what is kept, and memory that runs out.

    python benchmarks/stress_memory.py

Contains every model configuration of the tests. Leaves out speed: `bench_*`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from campaign import Campaign, script

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models.zoo import VARIANTS, Variant

from smearlens import CacheMemoryError, cache_bytes


def memory(variants: Iterable[Variant]) -> Campaign:
    """Estimates of every cache against what is kept, and memory that runs out at every hook."""
    found = Campaign(
        claim="Memory is foretold, and its end explained",
        tried="cache_bytes against the bytes of the cache, for every model configuration, whole "
        "and at every fifth hook; memory refused there, in each of torch's wordings; and a cache "
        "larger than the address space the process may have",
        target="estimates equal to the byte; CacheMemoryError with that estimate, three remedies",
        counts=dict.fromkeys(("configurations", "estimates", "refusals"), 0),
    )
    with found.timed():
        for variant in variants:
            given = variant.factory().eval()
            found.count("configurations")
            _, cache = given.run_with_cache(*variant.inputs)
            sizes = {name: t.numel() * t.element_size() for name, t in cache.items()}
            whole = cache_bytes(given, *variant.inputs)
            found.expect(whole == sum(sizes.values()), f"{variant.name}: {whole} bytes estimated")
            for number, name in list(enumerate(sizes))[:: 1 if len(sizes) < 8 else 5]:
                _refuse(found, variant, given, name, sizes, number)
        _run_out(found)
    return found


def _refuse(
    found: Campaign, variant: Variant, given: Any, name: str, sizes: dict[str, int], number: int
) -> None:
    """One hook's estimate, and a refusal of memory there."""
    wordings = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError("no words"),
    )

    def refuse(tensor: torch.Tensor, hook: Any) -> None:
        if tensor.device.type != "meta":
            raise wordings[number % 3]

    found.count("estimates")
    alone = cache_bytes(given, *variant.inputs, names_filter=name)
    found.expect(alone == sizes[name], f"{variant.name} {name}: {alone} bytes estimated")
    found.count("refusals")
    try:
        with given.hooks([(name, refuse)]):
            given.run_with_cache(*variant.inputs)
        found.expect(False, f"{variant.name} {name}: nothing was raised")
    except CacheMemoryError as error:
        words = all(part in str(error) for part in ("names_filter", "pos_slice", "fewer", "MiB"))
        right = error.estimate == sum(sizes.values()) and words
        found.expect(right, f"{variant.name} {name}: {error}")
    except Exception as error:
        found.expect(False, f"{variant.name} {name}: {error!r:.120}")


SHORT_OF_MEMORY = """
import resource, torch
from smearlens import AttnAttn, CacheMemoryError
torch.set_num_threads(1)
model = AttnAttn.from_preset("cpu", d_vocab=64, n_heads=2, n_ctx=4096)
model(torch.zeros(1, 4).long())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
try:
    model.run_with_cache(torch.zeros(16, 4096).long())
except CacheMemoryError as error:
    print(error.estimate, error)
"""


def _run_out(found: Campaign) -> None:
    """A cache of gigabytes in a process that may have 256 megabytes more."""
    found.count("refusals")
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False
    )
    said = done.stdout.partition(" ")
    right = said[0].isdigit() and int(said[0]) > 2**30 and "names_filter" in said[2]
    found.expect(right, f"a process short of memory: {done.stdout} {done.stderr[-200:]}")


def main(variants: Sequence[Variant] = tuple(VARIANTS)) -> Iterable[Campaign]:
    yield memory(variants)


if __name__ == "__main__":
    script(main)
