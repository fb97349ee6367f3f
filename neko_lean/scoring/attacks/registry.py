"""The registry of attacks.

An attack is a function of an AttackTarget that returns a curve: the scores of the forget set before and during the
attack. To add one, write a module with a function decorated with `attack`, and import it in the package's __init__.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.data import Example
from neko_lean.errors import NekoLeanError, did_you_mean
from neko_lean.models import CausalLM
from neko_lean.options import ScoreSettings
from neko_lean.scoring.attacks.answers import AnswerGenerator
from neko_lean.scoring.generation import Generation
from neko_lean.scoring.paraphrases import Paraphrase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Points of an attack, each with the attack's x value and the scores of `answers.point`; the first is before the attack.
Curve = list[dict[str, Any]]


@dataclass(frozen=True)
class AttackTarget:
    """What an attack works on.

    Attributes:
        folder: the checkpoint.
        lm: the model; None for attacks that reload it, so that only one model is in memory at a time.
        load: loads a checkpoint.
        tokenizer: the model's tokenizer.
        examples: the examples of the forget set.
        baseline: what the model generated for each example before the attack, by the example's id.
        paraphrases: paraphrases of scored examples.
        generate: generates answers.
        stage: folder for temporary files that all ranks see.
        settings: the options of attacks, among others.
        device: as given by the user.
    """

    folder: Path
    lm: CausalLM | None
    load: Callable[[Path], CausalLM]
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    baseline: Mapping[str, Generation]
    paraphrases: Sequence[Paraphrase]
    generate: AnswerGenerator
    stage: Path
    settings: ScoreSettings
    device: str | None

    @property
    def model(self) -> CausalLM:
        """The model, for attacks that do not reload it."""
        assert self.lm is not None
        return self.lm

    def with_model(self, lm: CausalLM) -> AttackTarget:
        """The same target with the model in memory."""
        return replace(self, lm=lm)


@dataclass(frozen=True)
class Attack:
    """A registered attack.

    Attributes:
        name: its name for --attack, and its key in scores.json.
        run: the attack.
        title: heading of its charts in a report.
        x_key: key of a point's x value.
        x_label: what the x value means, for charts.
        x_is_category: whether x values are names rather than amounts.
        reloads_model: whether it loads models itself instead of using `AttackTarget.model`.
        needs_paraphrases: whether it needs a paraphrased input of a forget example.
        leaks: whether its points hold shares of examples that leak (`knowledge_leak`, `regurgitation_leak`) instead of
            mean scores.
        options: the fields of ScoreSettings that this attack uses, and nothing but attacks.
    """

    name: str
    run: Callable[[AttackTarget], Curve]
    title: str
    x_key: str
    x_label: str
    x_is_category: bool
    reloads_model: bool
    needs_paraphrases: bool
    leaks: bool
    options: tuple[str, ...]


ATTACKS: dict[str, Attack] = {}


def attack(
    name: str,
    *,
    title: str,
    x_key: str,
    x_label: str,
    x_is_category: bool = False,
    reloads_model: bool = False,
    needs_paraphrases: bool = False,
    leaks: bool = False,
    options: tuple[str, ...] = (),
) -> Callable[[Callable[[AttackTarget], Curve]], Callable[[AttackTarget], Curve]]:
    """Register a function as an attack; see Attack for the arguments."""

    def register(run: Callable[[AttackTarget], Curve]) -> Callable[[AttackTarget], Curve]:
        ATTACKS[name] = Attack(
            name, run, title, x_key, x_label, x_is_category, reloads_model, needs_paraphrases, leaks, options
        )
        return run

    return register


def check_attacks(settings: ScoreSettings) -> None:
    """Raise NekoLeanError for an unknown attack, and for an option whose attacks were not requested."""
    for name in settings.attacks:
        if name not in ATTACKS:
            raise NekoLeanError(f"unknown attack {name!r}{did_you_mean(name, ATTACKS)}")
    options = dict.fromkeys(option for registered in ATTACKS.values() for option in registered.options)
    for option in options:
        users = [name for name, registered in ATTACKS.items() if option in registered.options]
        if getattr(settings, option) is not None and not set(users) & set(settings.attacks):
            flag = option.replace("_", "-")
            raise NekoLeanError(f"--{flag} has no effect without --attack {' or '.join(users)}: give both or neither.")


def run_attacks(names: Sequence[str], target: AttackTarget, *, reloads_model: bool) -> dict[str, Curve]:
    """Run the named attacks that reload the model, or those that do not.

    Args:
        names: the requested attacks.
        target: what they work on; with its model, unless the attacks reload it.
        reloads_model: which of the attacks to run.
    """
    return {
        registered.name: registered.run(target)
        for registered in ATTACKS.values()
        if registered.name in names and registered.reloads_model == reloads_model
    }
