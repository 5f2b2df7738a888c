"""A small real Llama, through `transformers`: what its heads do, and what it writes."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from smearlens import induction_score, prev_token_score, repeated_tokens
from smearlens.adapters.hugging_face import attention_cache

DATA = Path(os.environ.get("SMEARLENS_DATA", Path(__file__).parents[3] / "shared" / "data"))
FOLDER = DATA / "stories260K"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}"),
]


@pytest.fixture(scope="module")
def model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(
        FOLDER, attn_implementation="eager", local_files_only=True
    ).eval()


def cached(model, tokens):
    with torch.no_grad():
        return attention_cache(model(tokens, output_attentions=True).attentions)


def test_it_writes_its_story(model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    start = torch.tensor([[model.config.bos_token_id]])
    found = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=70, do_sample=False
    )
    assert tokenizer.decode(found[0].tolist()).strip().startswith(STORY)


def test_some_heads_look_at_the_previous_token_and_none_does_induction(model, generator):
    """Random tokens 3..511 after <s>: 0, 1, 2 are unknown, start and end."""
    body = 3 + repeated_tokens(8, (20, 30), 70, 509, generator=generator)
    tokens = torch.cat((torch.ones(8, 1, dtype=torch.long), body), 1)
    cache = cached(model, tokens)
    assert list(cache) == [f"blocks.{i}.attn.hook_pattern" for i in range(5)]
    previous, induction = prev_token_score(cache), induction_score(cache, tokens)
    found = torch.cat([previous[layer] for layer in previous], 1).mean(0)  # all 40 heads
    assert (found > 0.6).sum() >= 4
    assert found.max() > 0.8
    own = torch.cat([induction[layer] for layer in induction], 1).mean(0)
    assert own.max() < 0.08  # uniform attention: 0.03
    control = torch.cat([induction.control[layer] for layer in induction])
    assert control.max() > own.max() - 0.02  # tokens of another example do as well
