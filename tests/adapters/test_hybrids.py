"""Attention that only some blocks have, or that is no plain softmax of queries and keys."""

from dataclasses import dataclass

import pytest
import torch
from tests.adapters.test_bridge import build, transformers  # noqa: F401 - a fixture
from torch import nn

from smearlens import HookedModel, HookPoint, prev_token_score
from smearlens.adapters.bridge import bridge_cache
from smearlens.adapters.hugging_face import attention_cache
from smearlens.training.attention_tracking import AttentionTracking

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(0))


def test_blocks_without_attention_are_counted():
    patterns = [torch.rand(2, 3, 4, 4) for _ in range(2)]
    output = {"attentions": patterns, "hidden_states": [torch.rand(2, 4, 6)] * 5}
    with pytest.raises(ValueError, match=r"4 blocks gave 2 attentions.*layers="):
        attention_cache(output)
    for given in (output, patterns):
        found = attention_cache(given, layers=[1, 3])
        assert list(found) == ["blocks.1.attn.hook_pattern", "blocks.3.attn.hook_pattern"]
        assert found["blocks.3.attn.hook_pattern"] is patterns[1]
    with pytest.raises(ValueError, match="layers must be 2 different indices"):
        attention_cache(patterns, layers=[1, 1])
    assert len(attention_cache(output | {"hidden_states": [torch.rand(2, 4, 6)] * 3})) == 2


def test_a_window_is_not_rebuilt_from_queries_and_keys(transformers):  # noqa: F811
    sizes = {
        "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 16,
    }  # fmt: skip
    _, plain = build(transformers, "llama", **sizes)
    rotated = lambda name: name.endswith(("hook_rot_q", "hook_rot_k"))  # noqa: E731
    _, cache = plain.run_with_cache(TOKENS, names_filter=rotated)
    with pytest.raises(ValueError, match=r"pass bridge=, or cache blocks.0.attn.hook_pattern"):
        bridge_cache(cache)
    _, whole = plain.run_with_cache(TOKENS)
    expected = prev_token_score(bridge_cache(whole))["blocks.0.attn"]
    found = prev_token_score(bridge_cache(cache, plain))["blocks.0.attn"]
    torch.testing.assert_close(found, expected, check_dtype=False)
    plain.original_model.config.sliding_window = 4
    with pytest.raises(ValueError, match="windows, caps or rescales"):
        bridge_cache(cache, plain)


@dataclass(frozen=True)
class Config:
    d_vocab: int = 11


class Looking(HookedModel):
    """One layer of attention whose queries see `window` keys back; None for all."""

    config_class = Config
    window = None

    def __init__(self):
        super().__init__(Config())
        self.embed, self.unembed = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.blocks = nn.ModuleList([nn.Module()])
        attn = self.blocks[0].attn = nn.Module()
        self.blocks[0].hook_resid_post = HookPoint()
        attn.hook_q, attn.hook_k, attn.hook_pattern = HookPoint(), HookPoint(), HookPoint()
        self.setup()

    def forward(self, tokens):
        x, attn = self.embed(tokens), self.blocks[0].attn
        q, k = attn.hook_q(x[:, :, None]), attn.hook_k(2 * x[:, :, None])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 6**0.5
        seen = torch.ones(scores.shape[-2:]).tril()
        seen = seen if self.window is None else seen.triu(1 - self.window)
        pattern = attn.hook_pattern(scores.masked_fill(seen == 0, -torch.inf).softmax(-1))
        mixed = torch.einsum("bhqk,bkd->bqd", pattern, x)
        return self.unembed(self.blocks[0].hook_resid_post(x + mixed))


class Windowed(Looking):
    window = 3


def test_attention_that_queries_and_keys_do_not_tell_is_not_tracked():
    text = torch.randint(11, (3, 16), generator=torch.Generator().manual_seed(1))

    def track(cls):
        torch.manual_seed(0)
        with torch.no_grad():
            tracking = AttentionTracking(text, generator=torch.Generator().manual_seed(2))
            return tracking(cls().eval())

    assert track(Looking)["distance/blocks.0"] > 2
    with pytest.raises(ValueError, match=r"differs by .* from the causal softmax of hook_q"):
        track(Windowed)
