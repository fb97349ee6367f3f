"""What other programs and papers call recipes and their keys, for the suggestions in error messages.

Names are in lower case with hyphens; those of a method that is not here are absent, so that all recipes are listed.
"""

from neko_lean.errors import Synonyms

_ASCENT = ("neko", "graddiff")

NAME_SYNONYMS: Synonyms = {
    **dict.fromkeys(("ga", "grad-ascent", "gradient-ascent", "gradascent", "gradientascent"), _ASCENT),
    **dict.fromkeys(("ga-kl", "gradient-ascent-kl", "grad-ascent-kl", "kl", "kl-min"), ("neko",)),
    **dict.fromkeys(("gd", "ga-gd", "grad-diff", "gradient-difference", "gradient-diff"), ("graddiff",)),
    **dict.fromkeys(("npo-kl", "npo-rt", "negative-preference-optimization"), ("npo",)),
    **dict.fromkeys(("sim-npo", "simple-npo"), ("simnpo",)),
    **dict.fromkeys(("weighted-ga", "weighted-gradient-ascent"), ("wga",)),
    **dict.fromkeys(("refusal", "i-dont-know", "idk-nll"), ("idk",)),
    **dict.fromkeys(("idk-dpo", "preference"), ("dpo",)),
    **dict.fromkeys(("sft", "finetune", "fine-tune", "train", "ft"), ("memorize",)),
    **dict.fromkeys(("default", "base"), ("calibrated",)),
}

KEY_SYNONYMS: Synonyms = {
    **dict.fromkeys(("learning-rate", "peak-lr", "alpha"), ("lr",)),
    **dict.fromkeys(("num-epochs", "num-train-epochs", "epoch"), ("epochs",)),
    **dict.fromkeys(("steps", "num-steps", "max-iters", "iterations", "train-steps"), ("max_steps",)),
    **dict.fromkeys(("batch-size", "train-batch-size", "per-device-train-batch-size"), ("forget_rows", "retain_rows")),
    **dict.fromkeys(("max-seq-length", "max-seq-len", "max-len", "seq-len", "cutoff-len"), ("max_length",)),
    **dict.fromkeys(("max-grad-norm", "grad-clip", "clip-norm", "gradient-clipping"), ("clip",)),
    **dict.fromkeys(("warmup-ratio", "warmup-steps", "warmup-fraction"), ("warmup",)),
    **dict.fromkeys(("lr-scheduler", "lr-scheduler-type", "scheduler", "lr-schedule"), ("schedule",)),
    **dict.fromkeys(("adam-beta1",), ("beta1",)),
    **dict.fromkeys(("adam-beta2",), ("beta2",)),
    **dict.fromkeys(("adam-epsilon", "epsilon", "adam-eps"), ("eps",)),
    **dict.fromkeys(("wd", "decay"), ("weight_decay",)),
    **dict.fromkeys(("bf16", "fp16", "fp32", "precision", "torch-dtype"), ("dtype",)),
    **dict.fromkeys(("gradient-checkpointing",), ("backward",)),
    **dict.fromkeys(("torch-compile",), ("compile",)),
    **dict.fromkeys(("eval-steps", "eval-interval", "evaluation-steps"), ("eval_every",)),
    **dict.fromkeys(("early-stopping", "early-stopping-patience"), ("patience",)),
    **dict.fromkeys(("loss", "objective", "forget-loss", "method", "loss-type"), ("forget_objective",)),
    **dict.fromkeys(("retain-loss", "regularization"), ("retain_objective",)),
    **dict.fromkeys(("retain-coeff", "retain-lambda", "lambda", "kl-weight", "kl-coeff"), ("retain_weight",)),
    **dict.fromkeys(("forget-coeff", "forget-lambda"), ("forget_weight",)),
    **dict.fromkeys(("micro-batch-size", "micro-batch", "micro-batch-tokens"), ("micro_tokens",)),
    **dict.fromkeys(("max-tokens", "tokens-per-batch"), ("batch_tokens",)),
    **dict.fromkeys(("template", "prompt-template", "prompt-format"), ("format",)),
    **dict.fromkeys(("system-prompt",), ("system",)),
}
