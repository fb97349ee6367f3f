"""The paraphrase attack: the same questions in other words."""

from __future__ import annotations

from neko_lean.data import with_prompt
from neko_lean.errors import NekoLeanError
from neko_lean.scoring.attacks.answers import baseline_point, point
from neko_lean.scoring.attacks.registry import AttackTarget, Curve, attack


@attack(
    "paraphrase",
    title="Paraphrased prompts",
    x_key="paraphrase",
    x_label="0: original prompt, 1: paraphrased",
    x_is_category=True,
    needs_paraphrases=True,
)
def paraphrase(target: AttackTarget) -> Curve:
    """Ask each example that has paraphrased inputs in all of them; the example's own answer is expected."""
    by_id = {example.id: example for example in target.examples}
    paraphrased = [
        with_prompt(by_id[paraphrase.id], paraphrase.input)
        for paraphrase in target.paraphrases
        if paraphrase.input is not None and paraphrase.id in by_id
    ]
    if not paraphrased:
        raise NekoLeanError("--attack paraphrase needs --paraphrases FILE with an input for at least one forget row.")
    originals = [by_id[name] for name in dict.fromkeys(example.id for example in paraphrased)]
    after = point(paraphrased, target.generate(target.model, paraphrased, "paraphrases"))
    return [{"paraphrase": 0, **baseline_point(originals, target.baseline)}, {"paraphrase": 1, **after}]
