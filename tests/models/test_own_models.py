"""Models of one's own class: their caches when compiled, their size, their files."""

import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest
import torch
from torch import nn

from smearlens import HookedModel, HookPoint, cache_bytes
from smearlens.models.families import load_model
from smearlens.models.files import ModelFileError

TOKENS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Config:
    d_vocab: int = 11


class Own(HookedModel):
    config_class = Config

    def __init__(self, config=None):
        super().__init__(config or Config())
        self.embed, self.unembed = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.hook_embed = HookPoint()
        self.build()
        self.setup()

    def build(self):
        pass

    def forward(self, tokens):
        return self.unembed(self.hook_embed(self.embed(tokens)))


COMPILED = """
import torch
from smearlens import ConvAttn
model, tokens = ConvAttn.from_preset("cpu").eval(), torch.zeros(2, 7, dtype=torch.int64)
model.compile(backend="eager")
with torch.no_grad():
    before = model(tokens)
    found, cache = model.run_with_cache(tokens)
    assert set(cache.keys()) == set(model.hook_dict)
    torch.testing.assert_close(found, before)
    torch.testing.assert_close(model(tokens), before)
"""


def test_hooks_see_a_compiled_model():
    """Without the type checks of the tests, which torch does not compile."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


def test_the_size_of_a_cache_needs_no_return_type():
    model = Own()
    _, cache = model.run_with_cache(TOKENS)
    assert cache_bytes(model, TOKENS) == sum(4 * t.numel() for t in cache.values())


# Files -----------------------------------------------------------------------------------------


class WithCounter(Own):
    def build(self):
        self.norm = nn.BatchNorm1d(6)


class WithTriangle(Own):
    def build(self):
        self.register_buffer("triangle", torch.ones(5, 5).tril().bool())


class WithHiddenKeys(Own):
    def build(self):
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))


@pytest.mark.parametrize("cls", [WithCounter, WithTriangle, WithHiddenKeys])
def test_buffers_of_any_kind_are_saved(cls, tmp_path):
    torch.manual_seed(0)
    model = cls()
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(ModelFileError, match=f"loads by {cls.__name__}.from_pretrained"):
        load_model(tmp_path)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    for value in (torch.nan, torch.inf, -torch.inf):
        model = WithHiddenKeys()
        with torch.no_grad():
            model.embed.weight[2, 3] = value
        with pytest.raises(ValueError, match=r"value in embed.weight that is not finite"):
            model.save_pretrained(tmp_path / "weights")
    model = WithHiddenKeys()
    model.mask[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"value in mask that is not finite"):
        model.save_pretrained(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (list[int], [1, 2]),
        (dict[str, int], {"a": 1}),
        (dict[str, list[float]], {"a": [1.5]}),
        (tuple, (3, 4)),
        (Any, {"z": [1, None]}),
        (list[tuple[int, int]], [(1, 2)]),
    ],
    ids=str,
)
def test_fields_of_a_configuration_come_back(hint, value, tmp_path):
    cls = type("Own2", (Own,), {"config_class": made(hint)})
    model = cls(cls.config_class(value))
    model.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config == model.config


def test_a_configuration_that_json_changes_is_not_saved(tmp_path):
    cls = type("Own3", (Own,), {"config_class": made(Any)})
    with pytest.raises(ValueError, match="written as JSON and read again"):
        cls(cls.config_class((1, 2))).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def made(hint):
    fields = [("v", hint, field(default=None)), ("d_vocab", int, field(default=11))]
    return make_dataclass("Made", fields, frozen=True)
