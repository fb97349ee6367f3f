"""One family of each kind against plain transformers on one row at a time: no padding, no mask, no cache.

bench/families.py does the same with every family that transformers has.
"""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from neko_lean.data.batching import pad
from neko_lean.data.examples import Example
from neko_lean.models.causal_lm import next_token_logp, split
from neko_lean.models.token_stats import token_stats
from neko_lean.recipes import load_recipe
from neko_lean.scoring.generation import generate
from neko_lean.training.backward import select_backward
from neko_lean.training.batch import select_hidden
from neko_lean.training.micro_batches import MicroBatches
from tests.helpers import SIZES

CPU = torch.device("cpu")
PAD, V = SIZES["pad_token_id"], SIZES["vocab_size"]
CACHED_ATTENTION = {"num_key_value_heads": 2, "head_dim": 8}
# A family of each kind, and what differs from SIZES. The kinds: how logits are transformed, how positions are embedded,
# what is kept between tokens, whether the layers can be walked.
FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "GPT2": {},  # learned positions, dropout by default, no list of layers
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.1},
    "Bloom": {},  # positions from the mask alone
    "Gemma2": {**CACHED_ATTENTION, "final_logit_softcapping": 3.0, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.4},
    "Granite": {"logits_scaling": 2.0, "embedding_multiplier": 1.5},
    "Phi": {"resid_pdrop": 0.1},  # a bias of the head
    "GPTJ": {"rotary_dim": 4, "n_inner": 48},
    "Mamba": {"state_size": 4},  # no keys and values
    "Mixtral": {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": 6},
    "Bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}
ROWS = [[5, 9, 2, 7, 11, 30, 61, 4, 88, 15, 23], [8, 3, 90, 41], [17, 6, 6, 33, 52, 70, 19]]
NEW_TOKENS = 8


def family(name, seed=0):
    """A model with random values in every parameter, and logits far enough from each other for a cap to bite."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            usual = parameter.ndim > 1 and parameter.std() < 0.1
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5) if usual else parameter.add_(0.2 * noise)
        if head.bias is not None:
            head.bias.normal_()
        spread = logits(model, ROWS[0]).std(1).mean()
        head.weight.mul_(3 / spread)
    return model


def logits(model, row):
    """[L, V] float32, by the model's own forward."""
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()


def following(logp, row):
    """Log-probability of each token but the first."""
    return logp[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities(name):
    model = family(name)
    wanted = torch.cat([following(logits(model, row).log_softmax(1), row) for row in ROWS])
    torch.testing.assert_close(next_token_logp(split(model), ROWS, PAD), wanted, atol=2e-4, rtol=1e-4)
    # In bfloat16 both round; a forgotten bias, scale or cap is far above that.
    rounded = model.to(torch.bfloat16)
    own = torch.cat([following(logits(rounded, row).log_softmax(1), row) for row in ROWS])
    got = next_token_logp(split(rounded), ROWS, PAD)
    assert (got - own).abs().median() < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_a_step(name):
    """Ascent on the first row and the KL to a dense teacher on the others, by the backward pass that training takes."""
    model, teacher = family(name), family(name, seed=1)
    with torch.no_grad():
        known = [logits(teacher, row).log_softmax(1) for row in ROWS]  # [L, V] each

    parts = [logits(model, row).log_softmax(1) for row in ROWS]
    kl = [(p.exp() * (p - q)).sum(1) for p, q in zip(known[1:], parts[1:], strict=True)]
    wanted = 0.5 * following(parts[0], ROWS[0]).mean() + torch.cat(kl).mean()
    wanted.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    lm = split(model)
    recipe, walk = select_backward(lm, load_recipe("neko", {"dtype": "float32"}), CPU)
    model.train(recipe.dropout)
    ids, mask = pad(ROWS, PAD, CPU)
    index = [mask.flatten().nonzero()[:, 0]]  # every real position, row after row
    target = torch.cat([torch.tensor([*row[1:], -1]) for row in ROWS])
    topk = torch.arange(V).expand(len(target), V)
    for own_teacher in (True, False):
        told = [p.detach() for p in parts] if own_teacher else known
        micro = MicroBatches([ids], [None], index)
        hidden = walk.forward(micro) if walk else select_hidden(lm, micro)
        empty = torch.full((len(target),), -torch.inf)
        target_logp, kl = token_stats(
            hidden, lm.head, target, topk, torch.cat(told), empty, transform=lm.transform
        )  # fmt: skip
        if own_teacher:  # whatever the config's dropout
            assert kl.abs().max() < 1e-5
    first = len(ROWS[0])
    loss = 0.5 * target_logp[: first - 1].mean() + kl[first:].mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)

    loss.backward()
    found = {}

    def keep(parameter):
        if parameter.grad is not None:
            found[parameter] = parameter.grad
            parameter.grad = None

    if walk:
        walk.backward(keep)
    largest = max(g.abs().max() for g in gradients.values())
    for n, parameter in model.named_parameters():
        got = found.get(parameter, parameter.grad)
        reference = gradients.get(n, torch.zeros_like(parameter))
        got = torch.zeros_like(parameter) if got is None else got
        assert (got - reference).abs().max() <= 1e-3 * max(reference.abs().max(), 0.01 * largest), n


def number_tokenizer(end):
    """A tokenizer whose texts are token ids, so that a generation shows them; its EOS is `end`."""
    words = Tokenizer(WordLevel({str(i): i for i in range(V)}, unk_token=str(PAD)))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(end))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_generations(name):
    """Greedy decoding of prompts of different lengths together, against the likeliest token of the whole row anew."""
    model = family(name)
    said = []
    for row in ROWS:
        ids = list(row)
        for _ in range(NEW_TOKENS):
            ids.append(int(logits(model, ids)[-1].argmax()))
        said.append(ids[len(row) :])
    end = said[1][2]  # so that the rows leave the batch at different times
    ends = (end, SIZES["eos_token_id"])
    wanted = [ids[: min(ids.index(one) if one in ids else len(ids) for one in ends)] for ids in said]

    rows = [Example(f"r{n}-sc1", " ".join(map(str, ids)), "1", "Task1") for n, ids in enumerate(ROWS)]
    tokenizer = number_tokenizer(end)
    batches = generate(
        split(model),
        tokenizer,
        rows,
        batch_size=3,
        max_new_tokens=NEW_TOKENS,
        prompts=ROWS,
        stop_early=False,
    )
    texts = dict(one for batch in batches for one in batch)
    for n, ids in enumerate(wanted):
        # A text has no special tokens; the config's EOS is none of this tokenizer's.
        got = [int(one) for one in texts[n].text.split()]
        assert got[: got.index(ends[1]) if ends[1] in got else None] == [one for one in ids if one != PAD], n
