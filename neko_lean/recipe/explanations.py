"""What every key of a recipe means, in one sentence each: what `neko-lean recipes NAME` prints.

The hyperparameters of an objective are explained where it is registered.
"""

from neko_lean.recipe.recipe import Recipe

EXPLANATIONS = {
    # Data
    "format": "Prompt format: auto, chat, plain, neko, tofu, or a template file (.jinja, .txt).",
    "system": "System message of a chat template.",
    "max_length": "Longest example in tokens; longer documents are split into windows, other examples are truncated.",
    "append_eos": "Whether each answer ends in the EOS token.",
    "forget_rows": "Most forget examples in a step.",
    "retain_rows": "Most retain examples in a step.",
    "self_generated": "Examples that the model writes itself before the run, if it is given no retain set.",
    "batch_tokens": "Most tokens in a step.",
    "order": "Both sets in each step ('together'), in turn ('alternating'), or the forget set in 'chunks'.",
    "chunk_rows": "Forget examples in a chunk, with order 'chunks'.",
    # Forget set
    "forget_objective": "Loss on the forget set, or 'none'.",
    "forget_weight": "Weight of the loss on the forget set.",
    "forget_reduction": "Mean over 'tokens', over 'rows' (examples), or over 'positions' (padding included).",
    "forget_span": "Tokens that are forgotten: 'answers', 'all', or 'documents' (all, except of questions).",
    "answer_skip": "Tokens at the start of each answer that get no loss.",
    "substitute": "Replacement of each forgotten answer: 'none', 'refusal', or a retain answer, 'random' or 'similar'.",
    "substitute_weight": "Weight of the cross-entropy on the substitutes.",
    # Retain set
    "retain_objective": "Loss on the retain set: 'kl' or 'focal_kl' to the teacher, 'ce' (cross-entropy), or 'none'.",
    "retain_weight": "Weight of the loss on the retain set.",
    "retain_reduction": "Mean over 'tokens', over 'rows' (examples), or over 'positions' (padding included).",
    # Optimization
    "lr": "Peak learning rate, or 'auto': by the width of the model, see docs/recipes.md.",
    "beta1": "Decay of Adam's mean of the gradients.",
    "beta2": "Decay of Adam's mean of the squared gradients.",
    "eps": "Adam's epsilon, added to the root of the mean squared gradient.",
    "weight_decay": "Decoupled weight decay, as in AdamW.",
    "clip": "Largest L2 norm of one tensor's gradient; 0 does not clip.",
    "schedule": "Learning rate after the warm-up: 'linear' decay to 0 at the last step, or 'constant'.",
    "warmup": "Fraction of the steps over which the learning rate rises from 0.",
    "max_steps": "Number of training steps; 0 takes as many as `epochs` need.",
    "epochs": "Passes over the larger set, with max_steps 0; passes over each chunk, with order 'chunks'.",
    "train_last": "Train only the last N layers, the final norm and an untied head; 0 trains all parameters.",
    "train_only": "Train only the parameters whose names match this regular expression.",
    "lora_rank": "Rank of LoRA adapters, which are trained instead of the weights; 0 trains the weights.",
    "lora_alpha": "An adapter's product is multiplied by lora_alpha / lora_rank; 0 stands for twice the rank.",
    "lora_targets": "Layers that get an adapter: 'auto' for every linear layer but the head, or q_proj,v_proj,...",
    "quantize_base": "Store the frozen linear layers in 4 bits ('nf4') or 8 ('int8'); 'none' does not.",
    "dropout": "Train with the dropout of the model's config; not with backward 'layerwise'.",
    # Evaluation
    "eval_every": "Steps between evaluations on a fixed sample; 0 makes none.",
    "eval_rows": "Most examples of each set in that sample.",
    "patience": "Evaluations without improvement before the run stops early; 0 never stops early.",
    "choose": "Weights to write: the 'last' step's, or those of the best evaluation by 'loss' or 'quality'.",
    "stop": "'steps' ends a run at max_steps; 'forgotten' ends it once an evaluation finds it forgotten.",
    # Memory and speed
    "dtype": "Dtype of the weights: 'bfloat16' (with stochastic rounding) or 'float32'.",
    "backward": "'layerwise' needs least memory, 'checkpointed' works for any model, 'plain' keeps all activations.",
    "micro_tokens": "Positions that one layer processes at a time, padding included.",
    "offload_state": "Keep the optimizer state in host memory.",
    "offload_activations": "Keep the layers' inputs in host memory; with backward 'layerwise' only.",
    "state_bits": "Bits of each value of the optimizer state: 8, or 4 with torchao.",
    "compile": "Compile the decoder layers with torch.compile.",
}


def explain(key: str, recipe: Recipe) -> str:
    """What a key of a recipe means; for a hyperparameter, what the recipe's forget objective says."""
    if key in EXPLANATIONS or recipe.forget is None:
        return EXPLANATIONS[key]
    help = recipe.forget.hyperparameters[key].help
    return f"{help[:1].upper()}{help[1:].removesuffix('.')}."
