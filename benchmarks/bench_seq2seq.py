"""The encoder-decoder beside the same model from torch's layers, and its two attention cores.

    python benchmarks/bench_seq2seq.py

A step is forward, backward and AdamW on a padded batch of 128 Pig Latin pairs. The peer stacks
`nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer` of the same sizes. Both run without
dropout: torch's layers have it at other places.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from peers import recomputed, stepper
from timing import Row, compare, report
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens.data.pig_latin import PairBatches, pig_latin_pairs
from smearlens.models.seq2seq import Seq2Seq, Seq2SeqConfig
from smearlens.nn import attention

STEP_BAR = 1.1  # of the step of torch's layers
SHORT_BAR = 1.05  # of a layer with the fused core, at the lengths of words
STEP_WHY = "every intermediate passes a hook point, and so does each of the attention's two inputs"
CORE_WHY = "the explicit core is taken for both numbers of heads, and wins where heads are narrow"
BATCH_TRANSLATED = 16
PRESETS = ("base", "beast-small", "beast-large")


class TorchSeq2Seq(nn.Module):
    """The model from torch's layers."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        width = config.d_model
        sizes = {
            "d_model": width, "nhead": config.n_heads, "dim_feedforward": config.d_mlp,
            "dropout": 0.0, "activation": partial(F.gelu, approximate="tanh"),
            "batch_first": True, "norm_first": True,
        }  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**sizes), config.n_layers, nn.LayerNorm(width),
            enable_nested_tensor=False,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**sizes), config.n_layers, nn.LayerNorm(width)
        )
        self.embeds = nn.ModuleList(nn.Embedding(config.d_vocab, width) for _ in range(2))
        self.positions = nn.Parameter(torch.randn(2, config.n_ctx, width) * 0.1)
        self.unembed = nn.Linear(width, config.d_vocab, bias=False)

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor, loss_mask: Tensor
    ) -> Tensor:
        """Mean loss of the next tokens that count."""
        hidden = torch.zeros(source.shape).masked_fill(~source_mask, -torch.inf)
        logits = self.decode(target, self.encode(source, hidden), hidden)
        targets = target[:, 1:].masked_fill(~loss_mask[:, 1:], -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    def encode(self, source: Tensor, hidden: Tensor) -> Tensor:
        """What the decoder reads; `hidden` is -inf where a source token is padding."""
        x = self.embeds[0](source) + self.positions[0, : source.shape[1]]
        return self.encoder(x, src_key_padding_mask=hidden)

    def decode(self, target: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        """Logits [batch pos d_vocab]."""
        y = self.embeds[1](target) + self.positions[1, : target.shape[1]]
        ahead = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        z = self.decoder(
            y, memory, tgt_mask=ahead, tgt_is_causal=True, memory_key_padding_mask=hidden
        )
        return self.unembed(z)

    @torch.no_grad()
    def translate(self, source: Tensor, source_mask: Tensor, length: int) -> Tensor:
        """Greedy, as torch's layers allow: without caches, the source read once."""
        hidden = torch.zeros(source.shape).masked_fill(~source_mask, -torch.inf)
        memory = self.encode(source, hidden)
        start = torch.zeros(len(source), 1, dtype=torch.int64)
        return recomputed(lambda tokens: self.decode(tokens, memory, hidden), start, length)


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    pairs = list(pig_latin_pairs(min_letters=3))[::4]
    batch = PairBatches(pairs, 128, 0, padded=True).batch(0)
    shape = (128, batch["source"].shape[1], batch["target"].shape[1])
    for preset in PRESETS:
        ours = Seq2Seq.from_preset(preset, dropout=0.0)
        theirs = TorchSeq2Seq(ours.config)
        mine = stepper(ours, lambda ours=ours: ours(**batch, return_type="loss"))
        peer = stepper(theirs, lambda theirs=theirs: theirs(**batch))
        name = f"training step of {preset} / torch's layers"
        yield compare(name, shape, mine, peer, STEP_BAR, rounds=15, why=STEP_WHY)
    yield translation_row(batch)
    for n_heads in (4, 8):
        yield core_row(n_heads, shape)


def translation_row(batch: dict[str, Tensor]) -> Row:
    """Translations of fresh models, which go on to the end of `n_ctx`."""
    ours = Seq2Seq.from_preset(PRESETS[-1]).eval()
    theirs = TorchSeq2Seq(ours.config).eval()
    source, mask = (batch[name][:BATCH_TRANSLATED] for name in ("source", "source_mask"))
    length = ours.translate(source, source_mask=mask).shape[1]
    name = f"translation by {PRESETS[-1]} / torch's layers"
    return compare(
        name, (BATCH_TRANSLATED, length),
        lambda: ours.translate(source, source_mask=mask, max_new_tokens=length),
        lambda: theirs.translate(source, mask, length),
    )  # fmt: skip


def core_row(n_heads: int, shape: tuple[int, int, int]) -> Row:
    """Why short sequences take the explicit core."""
    batch, n_keys, length = shape
    layer = attention.Attention(64, n_heads, causal=False)
    x = torch.randn(batch, length, 64, requires_grad=True)
    source = torch.randn(batch, n_keys, 64, requires_grad=True)
    mask = torch.arange(n_keys) < torch.randint(3, n_keys + 1, (batch, 1))

    def gradients(short: int) -> None:
        known, attention.SHORT = attention.SHORT, short
        try:
            layer(x, source, key_mask=mask).sum().backward()
        finally:
            attention.SHORT = known

    name = f"attention, {n_heads} heads: explicit core / fused core, forward + backward"
    sides = (lambda: gradients(attention.SHORT)), (lambda: gradients(0))
    return compare(name, shape, *sides, SHORT_BAR, rounds=15, why=CORE_WHY)


def main() -> list[Row]:
    return report(rows())


if __name__ == "__main__":
    main()
