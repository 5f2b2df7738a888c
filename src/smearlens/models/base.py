"""`HookedModel`: what every model shares. Strict hooks, presets, saving and loading.

Leaves out the forward pass: `models.decoder` has that of the decoder-only models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from smearlens._files import from_dict, nearest, sha256, write_atomically
from smearlens._hooks import ActivationCache, HookedRootModule, caching_hook

FAMILIES = {  # class name in a config.json -> the module that defines it
    "ConvAttn": "smearlens.models.conv_attn",
    "AttnAttn": "smearlens.models.attn_attn",
    "Mamba": "smearlens.models.mamba",
}
SCHEMA = 1  # of config.json
SHIPPED = Path(__file__).parent / "pretrained"

Model = TypeVar("Model", bound="HookedModel")


class ModelFileError(Exception):
    """A saved model that cannot be loaded: names the file, what was found, expected, a remedy."""


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
        for pair in (*fwd_hooks, *bwd_hooks):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"fwd_hooks and bwd_hooks are lists of pairs (name, hook), got {pair!r} in one"
                )
            self._match(pair[0], "name")
        attached = {id(handle) for _, handle in self._handles()}
        contexts = {name: dict(point.ctx) for name, point in self.hook_dict.items()}
        try:
            with super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts):
                yield self
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
            pos_slice: positions (queries, of a pattern) to keep, as TransformerLens' `Slice`
            **kwargs: further arguments of the forward pass

        Raises:
            ValueError: for an unknown name, a filter that accepts nothing, `remove_batch_dim` of
                several sequences, or `incl_bwd` of an output that is no loss
        """
        names = self._match(names_filter, "names_filter")
        tokens = inputs[0] if inputs else kwargs.get("tokens")
        if remove_batch_dim and isinstance(tokens, Tensor) and tokens.shape[0] != 1:
            raise ValueError(
                f"remove_batch_dim needs a batch of 1, got tokens of shape {tuple(tokens.shape)}"
            )
        kept: dict[str, Tensor] = {}
        options = {"device": device, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        keep = caching_hook(kept, **options)
        keep_gradient = caching_hook(kept, backward=True, **options)
        forward = [(name, keep) for name in names]
        backward = [(name, keep_gradient) for name in names if incl_bwd]
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            output = self(*inputs, **kwargs)
            if incl_bwd:
                _require_scalar(output)
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` (with its sha256) into `folder`."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: t.detach().clone() for name, t in self.state_dict().items()}  # untied
        write_atomically(folder / "model.safetensors", save(weights))
        description = {
            "schema": SCHEMA,
            "model": type(self).__name__,
            "config": asdict(self.config),
            "sha256": sha256(folder / "model.safetensors"),
        }
        write_atomically(folder / "config.json", json.dumps(description, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[Model], name: str | Path) -> Model:
        """Load a model: a local folder, else one that ships with the package, else from the hub.

        Raises:
            ModelFileError: for anything missing, unexpected, misshapen, altered or not finite
        """
        return load_folder(cls, _find(name))

    def push_to_hub(
        self, repository: str, *, private: bool = False, token: str | None = None
    ) -> str:
        """Upload weights, configuration and a card to the Hugging Face hub; returns the address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_atomically(Path(folder) / "README.md", model_card(self))
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repository)
        return str(address)


def preset_config(cls: type[HookedModel], name: str, **changes: Any) -> Any:
    """The configuration of preset `name` of a model class, with `changes`."""
    if name not in cls.presets:
        raise ValueError(
            f"unknown preset {name!r} of {cls.__name__}; known: {sorted(cls.presets)}, "
            f"nearest: {nearest(name, cls.presets)}"
        )
    return from_dict(cls.config_class, {**cls.presets[name].changes, **changes})


def family(name: str) -> type[HookedModel]:
    """The model class of that name."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model class {name!r}; known: {sorted(FAMILIES)}")
    return getattr(import_module(FAMILIES[name]), name)


def load_model(path: str | Path) -> HookedModel:
    """Load a saved model of whatever class its `config.json` names."""
    folder = _find(path)
    name = _description(folder)["model"]
    if name not in FAMILIES:
        raise ModelFileError(
            f"{folder / 'config.json'}: found a model of class {name!r}, expected one "
            f"of {sorted(FAMILIES)}; update smearlens or restore the file"
        )
    return load_folder(family(name), folder)


def load_folder(cls: type[Model], folder: Path) -> Model:
    """Build the model that `folder` describes and fill it with its weights, checking everything."""
    description = _description(folder)
    if description["model"] != cls.__name__:
        raise ModelFileError(
            f"{folder / 'config.json'}: found a model of class {description['model']}, expected "
            f"{cls.__name__}; use {description['model']}.from_pretrained, or load_model for any"
        )
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ModelFileError(f"{weights}: missing; save the model again with save_pretrained")
    found = sha256(weights)
    if found != description["sha256"]:
        raise ModelFileError(
            f"{weights}: sha256 is {found}, config.json expects {description['sha256']}; "
            "the file was altered or cut off: fetch or save it again"
        )
    try:
        model = cls(from_dict(cls.config_class, description["config"], str(folder / "config.json")))
    except ValueError as error:
        raise ModelFileError(f"{folder / 'config.json'}: {error}") from error
    state = _weights(weights)
    model.to(next(iter(state.values())).dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelFileError(
            f"{weights}: does not fit config.json, which expects other weights ({error}); "
            "save the model again with save_pretrained"
        ) from error
    return model.eval()


def model_card(model: HookedModel) -> str:
    """A short model card: class, sizes, hooks, and how to load it."""
    name = type(model).__name__
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in asdict(model.config).items())
    return (
        f"---\nlibrary_name: smearlens\ntags: [smearlens, mechanistic-interpretability]\n---\n\n"
        f"# {name}, {model.n_parameters:,} parameters\n\n"
        f"```python\nfrom smearlens import {name}\n\n"
        f'model = {name}.from_pretrained("this repository")\n```\n\n'
        f"{len(model.hook_dict)} hook points; `list(model.hook_dict)` names them.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n"
    )


def _require_scalar(output: Any) -> None:
    """Raise a ValueError unless `output` is something to run backward from."""
    if not (isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad):
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"incl_bwd runs backward from a scalar that depends on weights, got {given}; "
            "pass return_type='loss', and enable gradients"
        )


def _find(name: str | Path) -> Path:
    """The folder a name stands for; the network is asked only for `owner/name`."""
    given, text = Path(name).expanduser(), str(name)
    for folder in (given, SHIPPED / text):
        if (folder / "config.json").is_file():
            return folder
    shipped = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
    local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1
    if local or given.exists() or given.parent.exists():
        found = sorted(p.name for p in given.iterdir()) if given.is_dir() else "no such folder"
        raise ModelFileError(
            f"{text}: expected a folder with config.json and model.safetensors, found {found}; "
            f"write one with save_pretrained, or name a model that ships with the package "
            f"{shipped} or, as owner/name, one on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:
        raise ModelFileError(
            f"{text}: no local folder, and could not be fetched from the hub ({error}); "
            f"shipped with the package: {shipped}"
        ) from error


def _description(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`, its outline checked."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ModelFileError(
                f"{path}: found schema {found['schema']!r}, expected {SCHEMA}; update smearlens, "
                "or save the model again with save_pretrained"
            )
        description = {key: found[key] for key in ("model", "config", "sha256")}
        if not all(isinstance(description[key], str) for key in ("model", "sha256")):
            raise TypeError("model and sha256 must be strings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path}: found no model description ({error!r}), expected an object with schema, "
            "model, config, sha256; restore it or save the model again with save_pretrained"
        ) from error
    return description


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: of one floating dtype, and finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "train the model again, or fetch or save the file again"
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ModelFileError(f"{path}: not a safetensors file ({error}); {remedy}") from error
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        found = sorted(str(dtype) for dtype in dtypes)
        raise ModelFileError(
            f"{path}: found weights of {found}, expected one floating dtype; {remedy}"
        )
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ModelFileError(
                f"{path}: found a value in {name} that is not finite, expected none; {remedy}"
            )
    return state
