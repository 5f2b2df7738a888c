"""The model classes by name, and loading a saved model of whatever class it is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from smearlens._explain import explained
from smearlens.models.base import HookedModel
from smearlens.models.files import ModelFileError, find_folder, load_folder, read_description

FAMILIES = {  # class name in a config.json -> the module that defines it
    "ConvAttn": "smearlens.models.conv_attn",
    "AttnAttn": "smearlens.models.attn_attn",
    "Mamba": "smearlens.models.mamba",
    "Seq2Seq": "smearlens.models.seq2seq",
    "CharGPT": "smearlens.models.char_gpt",
}


def family(name: str) -> type[HookedModel]:
    """The model class of that name."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model class {name!r}; known: {sorted(FAMILIES)}")
    return getattr(import_module(FAMILIES[name]), name)


@explained
def load_model(path: str | Path) -> HookedModel:
    """Load a saved model of whatever class its `config.json` names."""
    folder = find_folder(path)
    name = read_description(folder)["model"]
    if name not in FAMILIES:
        raise ModelFileError(
            f"{folder / 'config.json'}: found a model of class {name!r}, expected one "
            f"of {sorted(FAMILIES)}; a class of your own loads by {name}.from_pretrained, else "
            "update smearlens or restore the file"
        )
    return load_folder(family(name), folder)
