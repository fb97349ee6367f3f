"""Log-probabilities, gradients and generations of each kind of family match plain transformers, which runs one sequence
at a time without padding, mask or cache.

bench/families.py does the same for every family in transformers.
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
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.predictions import next_token_logp
from neko_lean.recipe import load_recipe
from neko_lean.scoring.generation import generate
from neko_lean.training.backward import select_backward
from neko_lean.training.batch import select_hidden
from neko_lean.training.micro_batches import MicroBatches
from tests.helpers import SIZES

CPU = torch.device("cpu")
PAD, V = SIZES["pad_token_id"], SIZES["vocab_size"]
CACHED_ATTENTION = {"num_key_value_heads": 2, "head_dim": 8}
# Families, with their changes to SIZES, that cover every logit transform, position embedding, cache, and whether layers
# can be run one by one.
FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "GPT2": {},  # learned positions, dropout by default, no list of layers
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.1},
    "Bloom": {},  # positions derived from the mask
    "Gemma2": {**CACHED_ATTENTION, "final_logit_softcapping": 3.0, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.4},
    "Granite": {"logits_scaling": 2.0, "embedding_multiplier": 1.5},
    "Phi": {"resid_pdrop": 0.1},  # a bias in the head
    "GPTJ": {"rotary_dim": 4, "n_inner": 48},
    "Mamba": {"state_size": 4},  # no keys and values
    "Mixtral": {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": 6},
    "Bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}
SEQUENCES = [[5, 9, 2, 7, 11, 30, 61, 4, 88, 15, 23], [8, 3, 90, 41], [17, 6, 6, 33, 52, 70, 19]]
NEW_TOKENS = 8


def family(name, seed=0):
    """A model with random values in every parameter, and logits spread enough for a soft cap to have an effect."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            is_matrix = parameter.ndim > 1 and parameter.std() < 0.1
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5) if is_matrix else parameter.add_(0.2 * noise)
        if head.bias is not None:
            head.bias.normal_()
        spread = logits(model, SEQUENCES[0]).std(1).mean()
        head.weight.mul_(3 / spread)
    return model


def logits(model, ids):
    """Logits [L, V] float32 from the model's own forward pass."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def target_logp(logp, ids):
    """Log-probability of each token except the first."""
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities(name):
    model = family(name)
    expected = torch.cat([target_logp(logits(model, ids).log_softmax(1), ids) for ids in SEQUENCES])
    torch.testing.assert_close(next_token_logp(as_causal_lm(model), SEQUENCES, PAD), expected, atol=2e-4, rtol=1e-4)

    # In bfloat16 both round. A missing bias, scale or cap would give a much larger difference.
    rounded = model.to(torch.bfloat16)
    expected = torch.cat([target_logp(logits(rounded, ids).log_softmax(1), ids) for ids in SEQUENCES])
    actual = next_token_logp(as_causal_lm(rounded), SEQUENCES, PAD)
    assert (actual - expected).abs().median() < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_a_step(name):
    """Gradient ascent on the first sequence plus the KL to a dense teacher on the others."""
    model, teacher = family(name), family(name, seed=1)
    expected_loss, expected_grads, student_logp, teacher_logp = reference_step(model, teacher)

    lm = as_causal_lm(model)
    recipe, layer_pass = select_backward(lm, load_recipe("neko", {"dtype": "float32"}), CPU)
    model.train(recipe.dropout)
    input_ids, mask = pad(SEQUENCES, PAD, CPU)
    # Every real position, sequence after sequence.
    micro_batches = MicroBatches([input_ids], [None], [mask.flatten().nonzero()[:, 0]])
    target = torch.cat([torch.tensor([*ids[1:], -1]) for ids in SEQUENCES])
    topk_ids = torch.arange(V).expand(len(target), V)
    tail_logp = torch.full((len(target),), -torch.inf)
    for is_self_teacher in (True, False):
        topk_logp = torch.cat(student_logp if is_self_teacher else teacher_logp)
        hidden = layer_pass.forward(micro_batches) if layer_pass else select_hidden(lm, micro_batches)
        logp, kl = token_stats(hidden, lm.head, target, topk_ids, topk_logp, tail_logp, transform=lm.transform)
        if is_self_teacher:  # whatever dropout the config states
            assert kl.abs().max() < 1e-5
    first = len(SEQUENCES[0])
    loss = 0.5 * logp[: first - 1].mean() + kl[first:].mean()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)

    loss.backward()
    layer_grads = {}

    def collect(parameter):
        if parameter.grad is not None:
            layer_grads[parameter] = parameter.grad
            parameter.grad = None

    if layer_pass:
        layer_pass.backward(collect)
    largest = max(gradient.abs().max() for gradient in expected_grads.values())
    for parameter_name, parameter in model.named_parameters():
        gradient = layer_grads.get(parameter, parameter.grad)
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        expected = expected_grads.get(parameter_name, torch.zeros_like(parameter))
        tolerance = 1e-3 * max(expected.abs().max(), 0.01 * largest)
        assert (gradient - expected).abs().max() <= tolerance, parameter_name


def reference_step(model, teacher):
    """Loss and gradients of the step by autograd, and the log-probabilities [L, V] of student and teacher."""
    with torch.no_grad():
        teacher_logp = [logits(teacher, ids).log_softmax(1) for ids in SEQUENCES]
    student_logp = [logits(model, ids).log_softmax(1) for ids in SEQUENCES]
    kl = [(p.exp() * (p - q)).sum(1) for p, q in zip(teacher_logp[1:], student_logp[1:], strict=True)]
    loss = 0.5 * target_logp(student_logp[0], SEQUENCES[0]).mean() + torch.cat(kl).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, gradients, [p.detach() for p in student_logp], teacher_logp


def number_tokenizer(eos):
    """A tokenizer whose texts are token ids, so that a generation shows them; its EOS token is `eos`."""
    words = Tokenizer(WordLevel({str(i): i for i in range(V)}, unk_token=str(PAD)))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(eos))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_generations(name):
    """Greedy decoding of a batch of prompts of different lengths matches the argmax over each recomputed sequence."""
    model = family(name)
    continuations = []
    for prompt in SEQUENCES:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(logits(model, ids)[-1].argmax()))
        continuations.append(ids[len(prompt) :])
    eos = continuations[1][2]  # so that sequences leave the batch at different times
    ends = (eos, SIZES["eos_token_id"])
    expected = [ids[: min(ids.index(end) if end in ids else len(ids) for end in ends)] for ids in continuations]

    examples = [Example(f"r{n}-sc1", " ".join(map(str, ids)), "1", "Task1") for n, ids in enumerate(SEQUENCES)]
    batches = generate(
        as_causal_lm(model),
        number_tokenizer(eos),
        examples,
        batch_size=3,
        max_new_tokens=NEW_TOKENS,
        prompts=SEQUENCES,
        stop_early=False,
    )
    generations = dict(pair for batch in batches for pair in batch)
    for n, ids in enumerate(expected):
        # Texts lack special tokens, and the config's EOS token is not special for this tokenizer.
        actual = [int(word) for word in generations[n].text.split()]
        assert actual[: actual.index(ends[1]) if ends[1] in actual else None] == [i for i in ids if i != PAD], n
