"""How attention evolves: a metric function for `Tracker` that looks at every layer and head.

    tracker = Tracker(AttentionTracking(held_out, generator=generator, repeats=repeats), at=500)

One forward pass per kind of input leaves q, k and the residual streams; everything is read from
them block by block, so that memory grows with the length of the context. Leaves out the statistics
(`analysis.mixing.layer_streams`), plots, and models without self-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.behaviour import (
    icl_score,
    induction_accuracy,
    induction_loss,
    per_token_loss,
)
from smearlens.analysis.heads import induction_score
from smearlens.analysis.mixing.kinds import SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import cka_table, compare_layers, head_statistics
from smearlens.analysis.mixing.layers import mixings
from smearlens.models.base import HookedModel
from smearlens.training.randomness import observing

Numbers = dict[str, float]
PLAIN_TOKENS = 512  # on which patterns are compared once with those of queries and keys
PLAIN_GAP = 0.02  # of a weight: what half precision may make of it


@explained
class AttentionTracking:
    """Measures attention, layer similarity and losses of a model as flat names and numbers.

    Names, for each layer such as `blocks.0` and each pair `blocks.0-blocks.1`:

    - `entropy/blocks.0` (nats), `normalised_entropy/`, `distance/` and `span/` (tokens), `sink/`,
      `previous/`, `…_without_first/`: means over rows, windows and heads, as
      `analysis.mixing.layer_streams.head_statistics` defines them; of one head
      `entropy/blocks.0/head.2`
    - `head_diversity/blocks.0`: 0 where all heads attend alike
    - `js/blocks.0-blocks.1`, `cosine/`, `centred_cosine/`, `matched_cosine/`, `cka/` (of the
      residual streams after the blocks): similarities, 1 = equal
    - `loss` over all windows, `token_loss/3` (the loss of one fixed random position of window 3)
      and `icl_score`, in nats
    - with `repeats`: `induction/blocks.0` and per head, its control with the tokens of another
      sequence `induction_control/blocks.0`, `induction_loss`, `induction_accuracy`, and the
      statistics of all layers and heads on these tokens, `repeats/entropy/blocks.0`
    - the nulls of everything that compares: `shuffled/…` on the same windows with their tokens
      shuffled, and with `untrained` also `untrained/…` and the statistics of its layers

    Args:
        text: held-out windows; all count for losses, the first `windows` for attention
        generator: draws the shuffling and the positions of the token losses, once, here
        repeats: repeated tokens with a period of their own per sequence (`repeated_tokens`)
        untrained: a model of the same shape that nobody has trained; looked at once
        windows: how many windows attention is measured on, and how many are run at a time

    Raises:
        ValueError: for fewer than 3 tokens per window, or windows below 1
    """

    def __init__(
        self,
        text: Int[Tensor, "window pos"],
        *,
        generator: torch.Generator,
        repeats: Int[Tensor, "batch length"] | None = None,
        untrained: HookedModel | None = None,
        windows: int = 8,
    ):
        if windows < 1 or text.shape[1] < 3 or not len(text):
            raise ValueError(
                f"text must be some windows of at least 3 tokens and windows at least 1, got text "
                f"{list(text.shape)} and windows={windows}"
            )
        self.text, self.repeats, self.windows = text, repeats, windows
        seen = text[:windows]
        order = torch.rand(seen.shape, generator=generator).argsort(1)
        self.shuffled = seen.gather(1, order)
        self.positions = torch.randint(text.shape[1] - 1, (len(text), 1), generator=generator)
        self._untrained = untrained
        self._null: Numbers | None = None  # of the untrained model, which does not change
        self._known = False  # that its patterns are those of its queries and keys

    def __call__(self, model: HookedModel) -> Numbers:
        """Everything of `model`, which should be in eval mode, without gradients."""
        found = self._on_text(model) | _under("shuffled", self._on_shuffled(model))
        found |= _under("untrained", self._of_untrained())
        return found | self._on_repeats(model)

    def _on_text(self, model: HookedModel) -> Numbers:
        text = _beside(model, self.text[: self.windows])
        if not self._known:
            _require_plain(model, text[:1, :PLAIN_TOKENS])
            self._known = True
        logits, look = _look(model, text)
        found = look.statistics() | look.similarities()
        losses, scores = [per_token_loss(logits, text)], [icl_score(logits, text).values]
        for start in range(self.windows, len(self.text), self.windows):
            rest = _beside(model, self.text[start : start + self.windows])
            logits = model(rest)
            losses.append(per_token_loss(logits, rest))
            scores.append(icl_score(logits, rest).values)
        return found | self._losses(torch.cat(losses), torch.cat(scores))

    def _on_shuffled(self, model: HookedModel) -> Numbers:
        shuffled = _beside(model, self.shuffled)
        logits, look = _look(model, shuffled)
        return look.similarities() | {"icl_score": icl_score(logits, shuffled).mean()}

    def _losses(self, losses: Tensor, scores: Tensor) -> Numbers:
        fixed = losses.gather(1, self.positions.to(losses.device))[:, 0].tolist()
        each = {f"token_loss/{i}": loss for i, loss in enumerate(fixed)}
        return {"loss": float(losses.double().mean()), "icl_score": float(scores.mean()), **each}

    def _of_untrained(self) -> Numbers:
        if self._untrained is None:
            return {}
        if self._null is None:
            with observing(self._untrained):
                _, look = _look(
                    self._untrained, _beside(self._untrained, self.text[: self.windows])
                )
                whole = look.statistics() | look.similarities()
            self._null = {name: value for name, value in whole.items() if "/head." not in name}
        return self._null

    def _on_repeats(self, model: HookedModel) -> Numbers:
        if self.repeats is None:
            return {}
        repeats = _beside(model, self.repeats)
        logits, look = _look(model, repeats)
        found = look.induction(repeats) | _under("repeats", look.statistics())
        found["induction_loss"] = float(induction_loss(logits, repeats).nanmean())
        found["induction_accuracy"] = float(induction_accuracy(logits, repeats).nanmean())
        return found


@explained
class GenerationTracking:
    """The same statistics and similarities along text that the model writes: `generated/…`.

    Only the rows that produced a token count. One step per token makes this the dearest look.

    Args:
        prompts: what to continue
        new_tokens: how many tokens to add to each
        generator: its present state starts the samples of every look; of the model's device
        temperature: of the samples
        top_k: sample among the k likeliest only
    """

    def __init__(
        self,
        prompts: Int[Tensor, "batch pos"],
        new_tokens: int,
        *,
        generator: torch.Generator,
        temperature: float | int = 1.0,
        top_k: int | None = None,
    ):
        self.prompts, self.new_tokens = prompts, new_tokens
        self.options: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        self._state, self._device = generator.get_state(), generator.device

    def __call__(self, model: Any) -> Numbers:
        """Let `model` write, and look at it reading what it wrote."""
        generator = torch.Generator(self._device)
        generator.set_state(self._state)
        prompts = _beside(model, self.prompts)
        tokens = model.generate(prompts, self.new_tokens, generator=generator, **self.options)
        _, look = _look(model, tokens, rows=slice(self.prompts.shape[1] - 1, -1))
        return _under("generated", look.statistics() | look.similarities())


class _Look:
    """The layers and residual streams of one forward pass."""

    def __init__(self, cache: Mapping[str, Tensor] | Any, rows: slice):
        names = [n for n in cache.keys() if n.endswith("hook_resid_post")]  # noqa: SIM118
        self.streams = {n.removesuffix(".hook_resid_post"): cache[n] for n in names}
        found = mixings({n: cache[n] for n in cache.keys() if n not in names})  # noqa: SIM118
        self.layers: dict[str, SoftmaxMixing] = {
            n.removesuffix(".attn"): m for n, m in found.items() if isinstance(m, SoftmaxMixing)
        }
        self.rows = rows

    def statistics(self) -> Numbers:
        """Of every layer and head."""
        found: Numbers = {}
        for layer, mixing in self.layers.items():
            for name, values in head_statistics(mixing, rows=self.rows).items():
                found |= _of_heads(name, layer, values)
        return found

    def similarities(self) -> Numbers:
        """Between heads, and between layers."""
        compared = compare_layers(self.layers, rows=self.rows)
        diversity = compared.diversity.nanmean(0).tolist()
        found = {f"head_diversity/{n}": v for n, v in zip(self.layers, diversity, strict=True)}
        tables = {
            "js": compared.js, "cosine": compared.cosine, "centred_cosine": compared.centred,
            "matched_cosine": compared.matched,
        }  # fmt: skip
        for name, table in tables.items():
            found |= _of_pairs(name, list(self.layers), table.nanmean(0))
        streams = [x[:, self.rows] for x in self.streams.values()]
        return found | _of_pairs("cka", list(self.streams), cka_table(streams))

    def induction(self, tokens: Tensor) -> Numbers:
        """Where heads look on repeated tokens."""
        found: Numbers = {}
        scores = induction_score(self.layers, tokens)
        for layer, values in scores.per_layer.items():
            found |= _of_heads("induction", layer, values)
            found[f"induction_control/{layer}"] = float(scores.control[layer].mean())
        return found


def _look(
    model: HookedModel, tokens: Tensor, rows: slice = slice(None)
) -> tuple[Float[Tensor, "batch pos d_vocab"], _Look]:
    """Run the model with only what is needed kept."""
    wanted = (".attn.hook_q", ".attn.hook_k", ".hook_resid_post")
    names = [n for n in model.hook_dict if n.endswith(wanted)]
    if not any(n.endswith(".attn.hook_q") for n in names):
        raise ValueError(
            f"{type(model).__name__} has no self-attention to track: none of its hooks ends in "
            "'.attn.hook_q'"
        )
    logits, cache = model.run_with_cache(tokens, names_filter=names)
    return logits, _Look(cache, rows)


def _require_plain(model: HookedModel, tokens: Tensor) -> None:
    """Raise where the pattern of a layer is not the causal softmax of its queries and keys."""
    _, look = _look(model, tokens)
    patterns = {f"{layer}.attn.hook_pattern": layer for layer in look.layers}
    names = [name for name in patterns if name in model.hook_dict]
    cache = model.run_with_cache(tokens, names_filter=names)[1] if names else {}
    for name in names:
        gap = float((look.layers[patterns[name]].dense() - cache[name]).abs().nan_to_num().max())
        if gap > PLAIN_GAP:
            raise ValueError(
                f"{name} differs by {gap:.2g} from the causal softmax of hook_q and hook_k, which "
                "tracking reads: attention with a window, a bias, a cap, another scale, or without "
                "a causal mask cannot be tracked"
            )


def _beside(model: HookedModel, tokens: Tensor) -> Tensor:
    """The tokens on the device of the model, which training may have moved."""
    return tokens.to(next(model.parameters()).device)


def _of_heads(name: str, layer: str, values: Float[Tensor, "batch head"]) -> Numbers:
    """Mean of the layer and of each head; windows where it is undefined do not count."""
    heads = values.nanmean(0)
    each = {f"{name}/{layer}/head.{h}": value for h, value in enumerate(heads.tolist())}
    return {f"{name}/{layer}": float(heads.nanmean()), **each}


def _of_pairs(name: str, layers: list[str], table: Float[Tensor, "layer layer"]) -> Numbers:
    """One number per pair of layers."""
    values = table.tolist()
    return {
        f"{name}/{layers[i]}-{layers[j]}": values[i][j]
        for i, j in combinations(range(len(layers)), 2)
    }


def _under(source: str, numbers: Numbers) -> Numbers:
    return {f"{source}/{name}": value for name, value in numbers.items()}
