"""What the properties are tried on: sizes drawn by hypothesis, numbers by a generator it seeds."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

sizes = st.integers
seeds = st.integers(0, 2**32 - 1)
NAME = "blocks.0.attn"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def fewer(share):
    """A profile's number of examples times `share`, for properties that cost more than 20 ms."""
    return settings(max_examples=max(10, int(settings.default.max_examples * share)))


def normal(draw, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator(draw(seeds)), dtype=dtype)


def random_pattern(seed, *shape, causal=True, spread=2.0):
    scores = spread * torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    if causal:
        scores = scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@st.composite
def patterns(draw, causal=None, least=2, most=9, heads=(1, 4)):
    """A pattern [batch head query key], mild or nearly one-hot."""
    batch, head, length = draw(sizes(1, 3)), draw(sizes(*heads)), draw(sizes(least, most))
    causal = draw(st.booleans()) if causal is None else causal
    spread = draw(st.sampled_from((0.3, 2.0, 30.0)))
    return random_pattern(draw(seeds), batch, head, length, length, causal=causal, spread=spread)


@st.composite
def with_tokens(draw, **options):
    """A pattern, and tokens that repeat."""
    pattern = draw(patterns(**options))
    kinds = draw(sizes(1, 6))
    size = (len(pattern), pattern.shape[-1])
    return pattern, torch.randint(kinds, size, generator=generator(draw(seeds)))


@st.composite
def scans(draw, most=13):
    """u, delta, A, B, C and the state before, in float64."""
    batch, pos, channel, d_state = (draw(sizes(1, n)) for n in (3, most, 4, 3))
    g = generator(draw(seeds))
    u, delta = (torch.randn(batch, pos, channel, generator=g, dtype=torch.float64) for _ in "ud")
    B, C = (torch.randn(batch, pos, d_state, generator=g, dtype=torch.float64) for _ in "BC")
    shared = draw(st.booleans())  # one decay for all states of a channel
    A = -torch.rand(channel, 1 if shared else d_state, generator=g, dtype=torch.float64) * 3
    state = torch.randn(batch, channel, d_state, generator=g, dtype=torch.float64)
    return u, torch.nn.functional.softplus(delta), A, B, C, state


rules = st.sampled_from(("mamba", "zoh", "bilinear", "bilinear-clamped"))
