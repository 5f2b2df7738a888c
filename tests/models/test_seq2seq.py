"""The encoder-decoder against torch's own layers; padding, decoding, causality and bad input."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import nn
from torch.nn import functional as F

from smearlens.causal.audit import audit
from smearlens.data.pig_latin import PairBatches, to_pig_latin
from smearlens.models.seq2seq import Seq2Seq, Seq2SeqConfig
from smearlens.nn import attention
from smearlens.training.config import TrainConfig
from smearlens.training.loop import train

CONFIG = Seq2SeqConfig(
    d_vocab=11, d_model=12, n_heads=3, n_layers=2, n_ctx=13, d_mlp=10, start=9, end=10
)
LENGTHS = (6, 3, 5, 1)  # of the sources; targets have 7 tokens


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def batch(generator):
    source = torch.randint(9, (4, 6), generator=generator)
    target = torch.randint(9, (4, 7), generator=generator)
    return {
        "source": source,
        "target": target,
        "source_mask": torch.arange(6) < torch.tensor(LENGTHS)[:, None],
        "loss_mask": torch.arange(7) < torch.tensor([4, 7, 6, 2])[:, None],
    }


@pytest.fixture
def model():
    return Seq2Seq(CONFIG).eval()


# Against torch -------------------------------------------------------------------------------


class TorchSeq2Seq(nn.Module):
    """The same model from torch's layers, its weights taken from ours."""

    def __init__(self, ours):
        super().__init__()
        c, pre = ours.config, ours.config.norm == "pre"
        sizes = {
            "d_model": c.d_model, "nhead": c.n_heads, "dim_feedforward": c.d_mlp, "dropout": 0.0,
            "batch_first": True, "norm_first": pre,
            "activation": partial(F.gelu, approximate="tanh"),  # as a module it is lost in copies
        }  # fmt: skip
        last = [nn.LayerNorm(c.d_model) if pre else None for _ in range(2)]
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**sizes), c.n_layers, last[0], enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**sizes), c.n_layers, last[1]
        )
        self.embeds = nn.ModuleList(nn.Embedding(c.d_vocab, c.d_model) for _ in range(2))
        tables = [side.pos_embed.table.detach().clone() for side in (ours.encoder, ours.decoder)]
        self.tables = nn.ParameterList(tables)
        self.unembed = nn.Linear(c.d_model, c.d_vocab, bias=False)
        self.double()
        self.pairs = list(self.counterparts(ours))
        with torch.no_grad():
            for mine, theirs in self.pairs:
                theirs.copy_(mine)

    def counterparts(self, ours):
        """(our parameter, theirs) for every parameter of ours; their biases of attention are 0."""
        yield ours.unembed.weight, self.unembed.weight
        sides = ((ours.encoder, self.encoder), (ours.decoder, self.decoder))
        for i, (mine, theirs) in enumerate(sides):
            yield mine.embed.weight, self.embeds[i].weight
            yield mine.pos_embed.table, self.tables[i]
            if theirs.norm is not None:
                yield from zip(mine.ln_final.parameters(), theirs.norm.parameters(), strict=True)
            for block, layer in zip(mine.blocks, theirs.layers, strict=True):
                yield from self.in_layer(block, layer)

    def in_layer(self, block, layer):
        parts = [(block.ln1, layer.norm1), (block.mlp.up, layer.linear1)]
        parts += [(block.mlp.down, layer.linear2)]
        layers = [(block.attn, layer.self_attn)]
        if block.cross_attn is None:
            parts += [(block.ln2, layer.norm2)]
        else:
            parts += [(block.ln_cross, layer.norm2), (block.ln2, layer.norm3)]
            layers += [(block.cross_attn, layer.multihead_attn)]
        for mine, theirs in parts:
            yield from zip(mine.parameters(), theirs.parameters(), strict=True)
        for mine, theirs in layers:
            nn.init.zeros_(theirs.in_proj_bias)
            nn.init.zeros_(theirs.out_proj.bias)
            yield mine.in_proj.weight, theirs.in_proj_weight
            yield mine.out_proj.weight, theirs.out_proj.weight

    def forward(self, source, target, source_mask):
        memory, x = (
            embed(tokens) + table[: tokens.shape[1]]
            for embed, tokens, table in zip(self.embeds, (source, target), self.tables, strict=True)
        )
        memory = self.encoder(memory, src_key_padding_mask=~source_mask)
        ahead = torch.ones(2 * target.shape[1:], dtype=torch.bool).triu(1)
        read = {"tgt_mask": ahead, "memory_key_padding_mask": ~source_mask}
        return self.unembed(self.decoder(x, memory, **read))


@pytest.mark.parametrize("short", [0, attention.SHORT], ids=["fused core", "explicit core"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torch_layers_in_logits_loss_and_gradients(norm, short, batch, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", short)
    ours = Seq2Seq(replace(CONFIG, norm=norm, positions="learned-sinusoidal")).double()
    for p in ours.parameters():  # gains, biases and positions too, so that none can be left out
        nn.init.normal_(p, std=0.5)
    theirs = TorchSeq2Seq(ours)
    assert {id(mine) for mine, _ in theirs.pairs} == {id(p) for p in ours.parameters()}
    logits, loss = ours(**batch, return_type="both")
    expected = theirs(batch["source"], batch["target"], batch["source_mask"])
    targets = batch["target"].masked_fill(~batch["loss_mask"], -100)[:, 1:]
    expected_loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(loss, ours(**batch, return_type="loss"))
    loss.backward()
    expected_loss.backward()
    for mine, other in theirs.pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-10)
        assert mine.grad.abs().max() > 0


# Padding -------------------------------------------------------------------------------------


def test_padding_never_changes_the_logits_of_a_word(model, batch):
    together = model(batch["source"], batch["target"], source_mask=batch["source_mask"])
    other = torch.where(batch["source_mask"], batch["source"], 10)
    assert torch.equal(model(other, batch["target"], source_mask=batch["source_mask"]), together)
    for row, length in enumerate(LENGTHS):
        alone = model(batch["source"][row : row + 1, :length], batch["target"][row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_a_mask_that_keeps_all_is_no_mask(model, batch):
    whole = torch.ones_like(batch["source_mask"])
    with_mask = model(batch["source"], batch["target"], source_mask=whole)
    torch.testing.assert_close(with_mask, model(batch["source"], batch["target"]))


def test_padded_pairs_give_the_loss_of_all_their_characters():
    pairs = [(word, to_pig_latin(word)) for word in ("team", "by-and-by", "a", "stranger")]
    model = Seq2Seq.from_preset("base").eval()
    padded = PairBatches(pairs, 4, 0, padded=True).batch(0)
    singly = PairBatches(pairs, 1, 0)
    total = characters = 0
    for step in range(4):
        one = singly.batch(step)
        n = one["target"].shape[1] - 1
        total, characters = total + n * model(**one, return_type="loss"), characters + n
    torch.testing.assert_close(model(**padded, return_type="loss"), total / characters)


# Decoding ------------------------------------------------------------------------------------


def recomputed(model, source, mask, limit):
    """Greedy decoding of one sequence after the other, everything computed anew for each token."""
    rows = []
    for i in range(len(source)):
        word, target = source[i : i + 1][:, mask[i]], [model.config.start]
        while len(target) <= limit and model.config.end not in target:
            target.append(int(model(word, torch.tensor([target]))[0, -1].argmax()))
        rows.append(target[1:])
    return rows


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("limit", [1, 5, 12, None])
def test_translation_equals_full_recomputation(norm, limit, batch):
    model = Seq2Seq(replace(CONFIG, norm=norm)).eval()
    nn.init.normal_(model.unembed.weight, std=0.7)
    source, mask = batch["source"].repeat(3, 1), batch["source_mask"].repeat(3, 1)
    source[4:] = torch.randint(9, (8, 6))
    expected = recomputed(model, source, mask, limit or 12)
    found = model.translate(source, source_mask=mask, max_new_tokens=limit)
    longest = max(map(len, expected))
    assert found.shape == (12, longest)
    assert found.tolist() == [row + [10] * (longest - len(row)) for row in expected]
    lengths = {len(row) for row in expected if row[-1] == 10}
    assert limit in (1, 5) or len(lengths) > 1, "the case must have translations that end early"


def test_decoding_runs_the_encoder_once_and_projects_the_source_once(model, batch):
    calls = []
    layers = [block.cross_attn for block in model.decoder.blocks]
    model.add_hook("encoder.hook_embed", lambda t, hook: calls.append("encoder"))
    state = {}
    model(batch["source"], batch["target"][:, :2], state=state)
    known = {name: t.clone() for name, t in state.items() if "source_" in name}
    assert sorted(known) == sorted(f"{a.name}.source_{role}" for a in layers for role in "kv")
    for a in layers:  # what is known is used: the weights may change, and memory too
        nn.init.zeros_(a.in_proj.weight[12:])
    model(batch["source"], batch["target"][:, 2:3], state=state)
    assert calls == ["encoder"]
    assert all(torch.equal(state[name], t) for name, t in known.items())


def test_hooks_on_cross_keys_act_at_every_step_of_decoding(model, batch):
    seen = []

    def swap(keys, hook):
        seen.append(keys.shape)
        return keys.flip(1)

    name = "decoder.blocks.1.cross_attn.hook_k"
    with model.hooks([(name, swap)]):
        found = model.translate(batch["source"], max_new_tokens=4)
        steps = found.shape[1]
        whole = torch.cat((torch.full((4, 1), 9), found), 1)
        again = model(batch["source"], whole).argmax(-1)[:, :-1]
    assert seen == [(4, 6, 3, 4)] * (steps + 1)
    real = (found == 10).cumsum(1) - (found == 10).long() == 0
    assert torch.equal(again[real], found[real])


# Causality -----------------------------------------------------------------------------------


def test_the_encoder_reads_ahead_and_the_decoder_does_not(model, batch):
    other = batch["source"].clone()
    other[:, -1] = (other[:, -1] + 1) % 9
    _, one = model.run_with_cache(batch["source"], batch["target"])
    _, two = model.run_with_cache(other, batch["target"])
    last = "encoder.blocks.0.hook_resid_post"
    assert ((one[last] - two[last])[:, 0].abs().amax(-1) > 1e-6).all()
    pattern = one["decoder.blocks.0.attn.hook_pattern"]
    assert not pattern.triu(1).any()
    assert one["encoder.blocks.0.attn.hook_pattern"].triu(1).any()


def test_audit_takes_the_decoder_given_a_source(model, batch):
    source = batch["source"][:1]
    decoder = model.decoder_given(source)
    assert list(decoder.hook_dict) == list(model.hook_dict)
    expected = model(source.expand(4, -1), batch["target"], return_type="loss")
    assert torch.equal(decoder(batch["target"], return_type="loss"), expected)
    result = audit(decoder)
    assert result.passed
    assert result.streaming < 1e-5
    assert model.decoder.blocks[0].attn.name == "decoder.blocks.0.attn"


def test_audit_finds_a_decoder_that_reads_ahead(model, batch):
    model.decoder.blocks[1].attn.causal = False
    result = audit(model.decoder_given(batch["source"][:1]))
    assert not result.passed
    assert result.future.jacobian > 1e-4
    assert result.future.first_leak == "decoder.blocks.1.attn.hook_pattern"


# Presets, training ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "heads", "layers", "positions", "parameters"),
    [
        ("base", 4, 2, "sinusoidal", 138_688),
        ("beast-small", 8, 2, "learned-sinusoidal", 142_784),
        ("beast-large", 8, 4, "learned-sinusoidal", 275_648),
    ],
)
def test_presets_have_the_sizes_of_the_write_up(preset, heads, layers, positions, parameters):
    model = Seq2Seq.from_preset(preset)
    c = model.config
    assert (c.d_vocab, c.d_model, c.n_heads, c.n_layers) == (29, 64, heads, layers)
    assert c.positions == positions
    side = 2 * 64 * 64 + 64 + 64 + 2 * (2 * 64)  # MLP with biases and two norms
    encoder, decoder = 4 * 64**2 + side, 8 * 64**2 + side + 2 * 64
    tables = 2 * 32 * 64 if "learned" in positions else 0
    expected = layers * (encoder + decoder) + 3 * 29 * 64 + 2 * (2 * 64) + tables
    assert model.n_parameters == expected == parameters


def test_training_takes_its_batches_as_they_are():
    pairs = [(word, to_pig_latin(word)) for word in ("eat", "oat", "my", "team", "one", "it")]
    model = Seq2Seq.from_preset("base", d_model=16, d_mlp=16, dropout=0.0)
    data = PairBatches(pairs, 4, 0, padded=True)
    rows = train(model, data, TrainConfig(steps=60, lr=1e-2)).log("metrics")
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


# Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_mlp": 0}, "d_mlp must be a positive int, got 0"),
        ({"n_heads": 5}, "n_heads=5 must divide d_model=12"),
        ({"positions": "rotary"}, "positions must be one of .*'learned', 'sinusoidal'.*rotary"),
        ({"norm": True}, r"norm must be one of \['pre', 'post'\], got True"),
        ({"end": 11}, r"end must be a token in 0\.\.10, got 11"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": torch.zeros(4, 14).long()}, "source reach position 14, n_ctx is 13"),
        ({"source": torch.full((4, 6), 11)}, r"source range over 11\.\.11, d_vocab is 11"),
        ({"target": torch.zeros(4, 7)}, "target must be int64, got torch.float32"),
        ({"target": [1, 2]}, "target must be an int64 tensor"),
        (
            {"source": torch.zeros(3, 6).long()},
            r"equally many sequences, got \[3, 6\] and \[4, 7\]",
        ),
        ({"source_mask": torch.ones(4, 5).bool()}, r"source_mask must be a bool tensor \[4, 6\]"),
        ({"source_mask": torch.ones(4, 6)}, "source_mask must be a bool tensor .*float32"),
        ({"source_mask": torch.zeros(4, 6).bool()}, "source_mask must keep a token of every"),
        ({"loss_mask": torch.zeros(4, 7).bool()}, "loss_mask keeps no target"),
        (
            {"loss_mask": torch.ones(4, 6).bool(), "return_type": "logits"},
            r"loss_mask must be a bool tensor \[4, 7\] as the tokens are, got torch.bool \[4, 6\]",
        ),
        ({"return_type": "nats"}, "return_type must be one of .*'nats'"),
    ],
)
def test_wrong_inputs_are_explained(changes, message, model, batch, unchecked):
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{**batch, "return_type": "loss", **changes})


def test_a_batch_axis_of_several_sources_is_not_removed(model, batch):
    with pytest.raises(ValueError, match=r"needs a batch of 1, got tokens of shape \(4, 6\)"):
        model.run_with_cache(**batch, remove_batch_dim=True)


@pytest.mark.parametrize("limit", [0, 13, 2.0])
def test_a_limit_that_does_not_fit_is_refused(limit, model, batch, unchecked):
    with pytest.raises(ValueError, match=r"max_new_tokens must be an int in 1\.\.12 \(n_ctx - 1\)"):
        model.translate(batch["source"], max_new_tokens=limit)


def test_a_decoder_reads_one_source_and_a_state_one_batch(model, batch, unchecked):
    with pytest.raises(ValueError, match=r"source must be one sequence \[1 source\], got \[4, 6\]"):
        model.decoder_given(batch["source"])
    state = {}
    model(batch["source"], batch["target"][:, :1], state=state)
    with pytest.raises(ValueError, match="state holds 4 sequences, target 2"):
        model(batch["source"][:2], batch["target"][:2, :1], state=state)


def test_a_state_stays_with_its_source(model, batch):
    source, target, state = batch["source"], batch["target"], {}
    model(source, target[:, :2], state=state)
    for other in (source.roll(1, 1), source[:, :5]):
        with pytest.raises(ValueError, match="state was begun with another source; begin this one"):
            model(other, target[:, 2:], state=state)
    assert state["target"].shape == (4, 2)
    rest = model(source.clone(), target[:, 2:], state=state)  # an equal one is the same
    torch.testing.assert_close(rest, model(source, target)[:, 2:])


def test_cross_attention_with_rotation_keeps_no_state(generator):
    layer = attention.Attention(12, 3, causal=False, rotary=True)
    x, source = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    with pytest.raises(ValueError, match="keeps no state: pass state=None"):
        layer(x, source, state={})


def test_a_decoder_given_a_source_says_what_to_save(tmp_path):
    model = Seq2Seq(Seq2SeqConfig(d_model=12, n_heads=3, n_layers=1, n_ctx=13))
    with pytest.raises(TypeError, match="a SourcedDecoder is not saved: save the Seq2Seq whose"):
        model.decoder_given(torch.tensor([[3, 1, 4]])).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
