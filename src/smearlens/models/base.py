"""`HookedModel`: what every model shares: strict hooks, presets, saving and loading.

Leaves out the files of a saved model (`models.files`) and the forward pass (`models.decoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from smearlens._explain import explained
from smearlens._files import from_dict, nearest
from smearlens._hooks import ActivationCache, HookedRootModule, caching_hook
from smearlens.models.cached import memory_explained, require_scalar
from smearlens.models.files import (
    find_folder,
    load_folder,
    save_folder,
    upload,
)

Model = TypeVar("Model", bound="HookedModel")


@dataclass(frozen=True)
class Preset:
    """A named configuration: only what differs from the defaults, and where it comes from."""

    source: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class LensConfig:
    """The part of a configuration that TransformerLens' tools ask for as `model.cfg`."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    attn_only: bool  # no block has an MLP
    normalization_type: str | None  # "LN", "RMS" or None
    device: torch.device
    dtype: torch.dtype


class HookedModel(HookedRootModule):
    """A model whose every intermediate passes a named hook.

    A subclass sets `config_class` (a frozen dataclass) and `presets`, builds its modules, and ends
    its constructor with `self.setup()`.
    """

    config_class: ClassVar[type]
    presets: ClassVar[dict[str, Preset]]
    save_instead: ClassVar[str] = ""  # what to save, of a class that only looks at another model

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.tokenizer: Any = None

    @classmethod
    def _require(cls, config: Any) -> None:
        """Raise a TypeError unless `config` is this class's own."""
        if not isinstance(config, cls.config_class):
            own = cls.config_class.__name__
            raise TypeError(
                f"{cls.__name__} takes a {own}, got {type(config).__name__}; "
                f"write {cls.__name__}({own}(...)) or {cls.__name__}.from_preset(name)"
            )

    @classmethod
    @explained
    def from_preset(cls: type[Model], name: str, **changes: Any) -> Model:
        """A fresh model of preset `name`, with `changes` to its configuration."""
        return cls(preset_config(cls, name, **changes))

    @property
    def cfg(self) -> LensConfig:
        """Sizes under the names of TransformerLens, with device and dtype of the weights."""
        weight = next(self.parameters())
        c = self.config
        attn_only = not any(name.endswith("hook_mlp_out") for name in self.hook_dict)
        kinds: dict[type, str] = {torch.nn.LayerNorm: "LN", torch.nn.RMSNorm: "RMS"}
        norms = [kinds[type(module)] for module in self.modules() if type(module) in kinds]
        return LensConfig(
            c.n_layers, c.n_heads, c.d_model, c.d_model // c.n_heads, c.d_vocab, c.n_ctx,
            attn_only, norms[0] if norms else None, weight.device, weight.dtype,
        )  # fmt: skip

    @property
    def n_parameters(self) -> int:
        """Number of trainable weights."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @explained
    def to_tokens(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Token ids [batch pos] of a text, of several of one length, or of ids as they are.

        Raises:
            ValueError: without a tokenizer, or for texts that differ in length
        """
        if isinstance(text, Tensor):
            return text if text.ndim == 2 else text[None]
        if self.tokenizer is None:
            raise ValueError(
                f"this {type(self).__name__} has no tokenizer; set model.tokenizer "
                "(for example CharTokenizer(text)) or pass token ids as a LongTensor"
            )
        texts = [text] if isinstance(text, str) else list(text)
        rows = [torch.as_tensor(self.tokenizer.encode(t)) for t in texts]
        lengths = [len(row) for row in rows]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"text must be one text, or several of one length in tokens; got {lengths} tokens: "
                "cut them to one length, or take them one by one"
            )
        return torch.stack(rows)

    # Hooks -------------------------------------------------------------------------------------

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        bwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModel]:
        """Attach hooks for the time of a `with` block, as TransformerLens does, but strictly.

        Raises:
            ValueError: for a name this model does not have, with the nearest it has. After any
                exception no hook of the block stays attached and hook contexts are as before.
        """
        for pairs in (fwd_hooks, bwd_hooks):
            if not isinstance(pairs, (list, tuple)):
                raise TypeError(f"fwd_hooks and bwd_hooks are lists of pairs, got {pairs!r}")
        for pair in (*fwd_hooks, *bwd_hooks):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"fwd_hooks and bwd_hooks are lists of pairs (name, hook), got {pair!r} in one"
                )
            self._match(pair[0], "name")
        attached = {id(handle) for _, handle in self._handles()}
        contexts = {name: dict(point.ctx) for name, point in self.hook_dict.items()}
        try:
            given = (list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts)
            with torch.compiler.set_stance("force_eager"), super().hooks(*given):
                yield self  # eager: compiled code sees no new hooks
        except BaseException:
            for name, point in self.hook_dict.items():
                point.ctx = contexts[name]
                for side in (point.fwd_hooks, point.bwd_hooks):
                    for handle in [h for h in side if id(h) not in attached]:
                        handle.hook.remove()
                        side.remove(handle)
            raise

    def add_hook(self, name: str | Callable, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Attach `hook` for good, to one name or to all that a predicate accepts."""
        self._match(name, "name")
        super().add_hook(name, hook, *args, **kwargs)

    def run_with_cache(  # pyrefly: ignore[bad-override]
        self,
        *inputs: Any,
        names_filter: str | Iterable[str] | Callable[[str], bool] | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run and keep the activations that `names_filter` accepts; all of them by default.

        Args:
            *inputs: arguments of the forward pass
            names_filter: a hook name, several, or a predicate on names
            device: where to keep the activations
            remove_batch_dim: drop a batch axis of size 1
            incl_bwd: run backward from the output (a loss) and keep gradients as `name_grad`
            reset_hooks_end: False leaves the caching hooks attached
            clear_contexts: forget what hooks left in their contexts
            pos_slice: positions to keep, as TransformerLens' `Slice`; no score reads some queries
            **kwargs: further arguments of the forward pass

        Raises:
            ValueError: for an unknown name, a filter that accepts nothing, `remove_batch_dim` of
                several sequences, or `incl_bwd` of an output that is no loss
            CacheMemoryError: if memory runs out, with the size of the cache (`cache_bytes`)
        """
        names = self._match(names_filter, "names_filter")
        tokens = next((t for t in (*inputs, *kwargs.values()) if isinstance(t, Tensor)), None)
        if remove_batch_dim and tokens is not None and tokens.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim needs a batch of 1, got tokens of shape {tuple(tokens.shape)}"
            )
        kept: dict[str, Tensor] = {}
        options = {"device": device, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        keep = caching_hook(kept, **options)
        keep_gradient = caching_hook(kept, backward=True, **options)
        forward = [(name, keep) for name in names]
        backward = [(name, keep_gradient) for name in names if incl_bwd]
        memory = memory_explained(self, inputs, kwargs, names, kept, incl_bwd)
        with memory, self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            output = self(*inputs, **kwargs)
            if incl_bwd:
                require_scalar(output)
                output.backward()
        return output, ActivationCache(kept, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """What TransformerLens' method of that name returns, unknown names excepted."""
        return super().get_caching_hooks(self._match(names_filter, "names_filter"), *args, **kwargs)

    def add_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """What TransformerLens' method of that name does, unknown names excepted."""
        return super().add_caching_hooks(self._match(names_filter, "names_filter"), *args, **kwargs)

    def _match(self, wanted: Any, argument: str) -> list[str]:
        """The hook names that `wanted` names or accepts; unknown ones raise, and so does none."""
        if wanted is None and argument == "names_filter":
            names = list(self.hook_dict)
        elif callable(wanted):
            names = [name for name in self.hook_dict if wanted(name)]
        elif argument == "names_filter" and isinstance(wanted, Iterable):
            names = [wanted] if isinstance(wanted, str) else list(wanted)
        else:
            names = [wanted]
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"{argument} takes hook names or a predicate on names, got {name!r}; "
                    "list(model.hook_dict) shows the names"
                )
            if name not in self.hook_dict:
                raise ValueError(
                    f"no hook {name!r} in {type(self).__name__}; "
                    f"nearest: {nearest(name, self.hook_dict)}"
                )
        if not names:
            raise ValueError(
                f"{argument} accepts none of the {len(self.hook_dict)} hooks of "
                f"{type(self).__name__}; list(model.hook_dict) shows them"
            )
        return names

    def _handles(self) -> Iterator[tuple[Any, Any]]:
        for point in self.hook_points():
            for handle in (*point.fwd_hooks, *point.bwd_hooks):
                yield point, handle

    # Files -------------------------------------------------------------------------------------

    @explained
    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` (with its sha256) into `folder`.

        Raises:
            ValueError: for weights of several dtypes, or not finite; nothing is written
        """
        save_folder(self, Path(folder))

    @classmethod
    @explained
    def from_pretrained(cls: type[Model], name: str | Path) -> Model:
        """Load a model: a local folder, else one that ships with the package, else from the hub.

        Raises:
            ModelFileError: for anything missing, unexpected, misshapen, altered or not finite
        """
        return load_folder(cls, find_folder(name))

    def push_to_hub(
        self, repository: str, *, private: bool = False, token: str | None = None
    ) -> str:
        """Upload weights, configuration and a card to the Hugging Face hub; returns the address."""
        return upload(self, repository, private=private, token=token)


def preset_config(cls: type[HookedModel], name: str, **changes: Any) -> Any:
    """The configuration of preset `name` of a model class, with `changes`."""
    if name not in cls.presets:
        raise ValueError(
            f"unknown preset {name!r} of {cls.__name__}; known: {sorted(cls.presets)}, "
            f"nearest: {nearest(name, cls.presets)}"
        )
    return from_dict(cls.config_class, {**cls.presets[name].changes, **changes})
