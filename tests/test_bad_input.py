"""Everything a user can get wrong: what was given, what is allowed, what to do.

One table over the public API. Files are in `models/test_saving.py`, hooks that fail in
`models/test_hooks.py`. Leaves out the options of training and analysis, which their own tests hold.
"""

import pytest
import torch
from jaxtyping import config as jaxtyping_config

import smearlens
from smearlens import (
    Attention,
    AttnAttn,
    AttnAttnConfig,
    CharTokenizer,
    ConvAttn,
    ConvAttnConfig,
    DepthwiseConv,
    KeySmear,
    ModelFileError,
    TrainConfig,
    iid_tokens,
    induction_score,
    kernel_profile,
    load_corpus,
    load_model,
    mixings,
    prev_token_score,
    repeated_tokens,
)

SIZES = {"d_vocab": 11, "d_model": 12, "n_heads": 3, "n_ctx": 13}
TOKENS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(7))
ROW = TOKENS[:1]
PATTERN = "blocks.0.attn.hook_pattern"


@pytest.fixture(autouse=True)
def unchecked():
    """Types and shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ConvAttn(ConvAttnConfig(**SIZES, kernel_size=5)).eval()


def config(**changes):
    return lambda model: ConvAttnConfig(**{**SIZES, **changes})


def deep(**changes):
    return lambda model: AttnAttnConfig(**{**SIZES, **changes})


def preset(name, **changes):
    return lambda model: ConvAttn.from_preset(name, **changes)


def run(tokens, *args, **options):
    return lambda model: model(tokens, *args, **options)


def hooked(*hooks, **options):
    return lambda model: model.run_with_hooks(TOKENS, fwd_hooks=list(hooks), **options)


def cached(*inputs, **options):
    return lambda model: model.run_with_cache(*(inputs or (TOKENS,)), **options)


def generate(*args, **options):
    return lambda model: model.generate(*args, **options)


def nothing(tensor, hook):
    pass


def state_of(model, tokens):
    state = {}
    model(tokens, state=state)
    return state


def generator():
    return torch.Generator().manual_seed(0)


CASES = {
    # configurations
    "heads that do not divide": (config(n_heads=5), "n_heads=5 must divide d_model=12"),
    "no heads": (config(n_heads=0), "n_heads must be a positive int, got 0"),
    "size as text": (config(d_vocab="11"), "d_vocab must be a positive int, got '11'"),
    "size as fraction": (config(d_model=12.0), r"d_model must be a positive int, got 12\.0"),
    "size as bool": (deep(n_layers=True), "n_layers must be a positive int, got True"),
    "no layers": (deep(n_layers=0), "n_layers must be a positive int, got 0"),
    "no taps": (config(kernel_size=0), "kernel_size must be a positive int, got 0"),
    "no context": (config(n_ctx=-1), "n_ctx must be a positive int, got -1"),
    "dropout of all": (config(dropout=1.0), r"dropout must be in \[0, 1\), got 1\.0"),
    "dropout as text": (deep(dropout="no"), r"dropout must be in \[0, 1\), got 'no'"),
    "dropout of nan": (config(dropout=float("nan")), r"dropout must be in \[0, 1\), got nan"),
    "unknown positions": (
        config(positions="rope"),
        r"positions must be one of \['learned', 'sinusoidal', .*'rotary', None\], got 'rope'",
    ),
    "unknown role": (
        config(conv_on="keys"),
        r"conv_on must be one of \['stream', 'q', 'k', 'v', None\], got 'keys'",
    ),
    "switch as text": (config(causal="no"), "causal must be True or False, got 'no'"),
    "switch as number": (deep(norm=1), "norm must be True or False, got 1"),
    "odd heads turned": (
        lambda model: ConvAttn(ConvAttnConfig(**{**SIZES, "d_model": 9}, positions="rotary")),
        "rotary positions need an even d_head, got 3; change n_heads",
    ),
    "another model's configuration": (
        lambda model: ConvAttn(AttnAttnConfig(**SIZES)),
        r"ConvAttn takes a ConvAttnConfig, got AttnAttnConfig; write ConvAttn\(ConvAttnConfig\(",
    ),
    "no configuration": (
        lambda model: AttnAttn({"d_vocab": 11}),
        r"AttnAttn takes a AttnAttnConfig, got dict; .* or AttnAttn.from_preset\(name\)",
    ),
    # presets
    "unknown preset": (
        preset("papr"), r"unknown preset 'papr' of ConvAttn; known: \['cpu', .*nearest: \['paper'",
    ),
    "unknown change": (
        preset("cpu", heads=3), r"ConvAttnConfig: unknown key 'heads'; nearest:",
    ),
    "change of a wrong type": (
        preset("cpu", d_model="64"), r"ConvAttnConfig\.d_model: expected int, got '64'",
    ),
    # tokens
    "tokens as list": (
        run([[1, 2]]), r"tokens must be an int64 tensor \[batch pos\], got list; model.to_tokens",
    ),
    "tokens as text": (run("abc"), "tokens must be an int64 tensor .*, got str; model.to_tokens"),
    "one axis": (run(TOKENS[0]), r"tokens must be \[batch pos\], got shape \(7,\)"),
    "three axes": (run(TOKENS[None]), r"tokens must be \[batch pos\], got shape \(1, 2, 7\)"),
    "no tokens": (run(TOKENS[:, :0]), r"tokens must be \[batch pos\], got shape \(2, 0\)"),
    "fractions": (run(TOKENS / 2), r"tokens must be int64, got torch.float32; use tokens.long\(\)"),
    "bools": (run(TOKENS > 3), r"tokens must be int64, got torch.bool; use tokens.long\(\)"),
    "outside the vocabulary": (
        run(TOKENS + 5), r"tokens range over 5..15, d_vocab is 11; was the text encoded with this",
    ),
    "negative": (run(TOKENS - 1), r"tokens range over -1..9, d_vocab is 11"),
    "too many": (
        run(TOKENS.repeat(1, 2)),
        "tokens reach position 14, n_ctx is 13; shorten them or build the model with",
    ),
    "on another device": (
        run(TOKENS.to("meta")), r"tokens are on meta, the model is on cpu; use tokens.to\('cpu'\)",
    ),
    "other sequences than the state's": (
        lambda model: model(ROW, state=state_of(model, TOKENS)),
        "state holds 2 sequences, tokens 1; start other sequences with an empty state",
    ),
    "more than the state leaves room for": (
        lambda model: model(TOKENS, state=state_of(model, TOKENS)), "tokens reach position 14",
    ),
    "a state of a model that reads ahead": (
        lambda model: ConvAttn(ConvAttnConfig(**SIZES, causal=False))(TOKENS, state={}),
        "causal=False reads tokens that do not exist yet: run it on the whole sequence, or build",
    ),
    # loss
    "unknown return type": (
        run(TOKENS, "los"), r"return_type must be one of \['logits', 'loss', 'both'\], got 'los'",
    ),
    "loss of one token": (run(ROW[:, :1], "loss"), r"a loss needs at least 2 tokens, got shape"),
    "mask of numbers": (
        run(TOKENS, "loss", loss_mask=torch.ones(2, 7)),
        r"loss_mask must be a bool tensor \[2, 7\] as the tokens are, got torch.float32 \[2, 7\]",
    ),
    "mask of another shape": (
        run(TOKENS, "loss", loss_mask=torch.ones(2, 6).bool()), r"got torch.bool \[2, 6\]; True",
    ),
    "mask of another shape, for logits": (
        run(TOKENS, "logits", loss_mask=torch.ones(2, 6).bool()), r"got torch.bool \[2, 6\]; True",
    ),
    "mask of everything": (
        run(TOKENS, "loss", loss_mask=torch.arange(7).expand(2, 7) < 1),
        "loss_mask keeps no target .position 0 is none.; the mean is undefined",
    ),
    # text
    "no tokenizer": (
        lambda model: model.to_tokens("abc"), r"this ConvAttn has no tokenizer; set",
    ),
    "unknown character": (
        lambda model: CharTokenizer("abc").encode("abz"), r"text\[2\] is 'z', which is not among",
    ),
    # generation
    "nothing to generate": (
        generate(TOKENS, 0, temperature=0), "max_new_tokens=0 after a prompt of 7 must be an int",
    ),
    "too much to generate": (
        generate(TOKENS, 7, temperature=0), "max_new_tokens=7 after .* at least 1, and fit",
    ),
    "half a token": (generate(TOKENS, 2.5, temperature=0), r"max_new_tokens=2.5 .* must be an int"),
    "no randomness": (
        generate(TOKENS, 2),
        "temperature=1.0 with generator=None: pass temperature=0 for greedy decoding",
    ),
    "negative temperature": (
        generate(TOKENS, 2, temperature=-1, generator=generator()), "temperature=-1 with",
    ),
    "temperature of nan": (
        generate(TOKENS, 2, temperature=float("nan"), generator=generator()), "temperature=nan",
    ),
    "top 0": (
        generate(TOKENS, 2, top_k=0, generator=generator()), "top_k must be an int, at least 1, or",
    ),
    "top 2.5": (generate(TOKENS, 2, top_k=2.5, temperature=0), r"top_k must be an int.*, got 2\.5"),
    "prompt as list": (generate([1, 2], 2, temperature=0), "tokens must be an int64 tensor"),
    "prompt outside the vocabulary": (
        generate(TOKENS + 5, 2, temperature=0), r"tokens range over 5..15, d_vocab is 11",
    ),
    # hooks
    "unknown hook": (
        hooked(("blocks.0.attn.hook_patern", nothing)),
        rf"no hook 'blocks.0.attn.hook_patern' in ConvAttn; nearest: \['{PATTERN}'",
    ),
    "hook of a part that is not there": (
        hooked(("blocks.0.attn.smear.hook_weight", nothing)), "no hook 'blocks.0.attn.smear",
    ),
    "hook that is no function": (
        hooked(("hook_embed", 3)), r"called as hook\(tensor, hook=point\); got 3 for 'hook_embed'",
    ),
    "pair without a hook": (
        hooked(("hook_embed",)), r"lists of pairs \(name, hook\), got \('hook_embed',\) in one",
    ),
    "pair without a list": (
        lambda model: model.run_with_hooks(TOKENS, fwd_hooks=("hook_embed", nothing)),
        r"fwd_hooks and bwd_hooks are lists of pairs \(name, hook\), got 'hook_embed' in one",
    ),
    "several names for one hook": (
        hooked((["hook_embed"], nothing)), r"name takes hook names or a predicate on names, got",
    ),
    "no name": (hooked((None, nothing)), "name takes hook names or a predicate on names, got None"),
    "predicate that accepts nothing": (
        hooked((lambda name: False, nothing)), "name accepts none of the 15 hooks of ConvAttn",
    ),
    "unknown direction": (
        lambda model: model.add_hook("hook_embed", nothing, "both"), "dir must be 'fwd' or 'bwd'",
    ),
    "hook that returns another shape": (
        hooked((PATTERN, lambda t, hook: t[0])),
        rf"hook on '{PATTERN}' returned shape \(3, 7, 7\) for an activation of shape \(2, 3, 7",
    ),
    "hook that returns a number": (
        hooked(("hook_embed", lambda t, hook: 0.0)), "hook on 'hook_embed' returned float; return",
    ),
    # caches
    "unknown name to cache": (
        cached(names_filter=["hook_embd"]), r"no hook 'hook_embd' in ConvAttn; nearest:",
    ),
    "nothing to cache": (cached(names_filter=[]), "names_filter accepts none of the 15 hooks"),
    "number to cache": (cached(names_filter=3), "names_filter takes hook names or a predicate on"),
    "batch axis of several": (
        cached(remove_batch_dim=True), r"remove_batch_dim needs a batch of 1, got tokens of shape",
    ),
    "batch axis of several, by name": (
        lambda model: model.run_with_cache(tokens=TOKENS, remove_batch_dim=True),
        r"remove_batch_dim needs a batch of 1, got tokens of shape \(2, 7\)",
    ),
    "gradients of logits": (
        cached(incl_bwd=True),
        r"incl_bwd runs backward from a scalar .*, got \[2, 7, 11\]; pass return_type='loss'",
    ),
    "gradients of a pair": (cached(incl_bwd=True, return_type="both"), "incl_bwd .* got tuple"),
    # layers
    "heads of a layer": (lambda model: Attention(10, 3), "n_heads=3 must be at least 1 and divide"),
    "role of a layer": (
        lambda model: Attention(12, 3, conv_on=["o"]), "conv_on takes 'q', 'k' and 'v', got 'o'",
    ),
    "channels of a convolution": (
        lambda model: DepthwiseConv(3, 2)(torch.zeros(2, 5, 4)),
        r"x must be \[batch pos channel\] with the 3 channels of the weight \[channel tap\], got",
    ),
    "heads of a smear": (lambda model: KeySmear(0), "n_heads must be at least 1, got 0"),
    # files and names
    "no such model": (
        lambda model: ConvAttn.from_pretrained("./nowhere"),
        r"./nowhere: expected a folder with config.json and model.safetensors, found no such",
    ),
    "file instead of a folder": (
        lambda model: load_model(__file__), "test_bad_input.py: expected a folder with config.json",
    ),
    "unknown corpus": (
        lambda model: load_corpus("tiny-shakespear"), "neither a file nor one of tiny-shakespeare",
    ),
    # data and analysis
    "period of one": (
        lambda model: repeated_tokens(2, 1, 9, 11, generator=generator()),
        r"period must be at least 2, as n or \(low, high\), got \(1, 1\)",
    ),
    "period without a repeat": (
        lambda model: repeated_tokens(2, 9, 9, 11, generator=generator()),
        "period=9 leaves nothing to repeat in length=9",
    ),
    "no examples": (
        lambda model: iid_tokens(0, 9, 11, generator=generator()), "batch must be at least 1, got",
    ),
    "tokens of another run": (
        lambda model: induction_score(model.run_with_cache(TOKENS)[1], TOKENS[:, :5]),
        r"tokens \[2, 5\] do not belong to a pattern of 2 examples and 7 keys; pass the tokens",
    ),
    "scores of a cache without attention": (
        lambda model: prev_token_score(model.run_with_cache(TOKENS, names_filter="hook_embed")[1]),
        "no attention or ssm layer in a cache of 1 activations .*; cache hook_pattern, or hook_q",
    ),
    "mixings of nothing": (lambda model: mixings({}), "no attention or ssm layer in a cache of 0"),
    "profile without a kernel": (
        lambda model: kernel_profile(model.run_with_cache(TOKENS, names_filter=PATTERN)[1]),
        "layer=None: hook_kernel is cached for no layer; run the model with that hook in",
    ),
    "profile of an unknown layer": (
        lambda model: kernel_profile(model.run_with_cache(TOKENS)[1], layer="blocks.1.conv"),
        r"layer='blocks.1.conv': hook_kernel is cached for \['blocks.0.conv'\]; name one of them",
    ),
    # training
    "warm-up longer than the run": (
        lambda model: TrainConfig(steps=10, warmup=10), "warmup=10 must be below steps=10",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_explained(model, case):
    attempt, message = CASES[case]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError, ModelFileError, FileNotFoundError), match=message):
        attempt(model)
    assert not list(model._handles()), "a hook stayed attached"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.tokenizer is None


def test_the_model_still_works_after_all_of_that(model):
    assert model(TOKENS).isfinite().all()


def test_a_name_the_package_does_not_have_is_answered_with_those_it_has():
    with pytest.raises(
        AttributeError, match=r"no attribute 'ConvAttention'; it has \[.*'ConvAttn'"
    ):
        _ = smearlens.ConvAttention
