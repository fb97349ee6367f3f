"""The registry: what an objective declares, and what a second registration does."""

import inspect

import pytest

from neko_lean.objectives import FORGET_OBJECTIVES, RETAIN_OBJECTIVES, Objective, forget_objective, retain_objective


@pytest.mark.parametrize("objective", [*FORGET_OBJECTIVES.values(), *RETAIN_OBJECTIVES.values()], ids=lambda o: o.name)
def test_hyperparameters_are_the_keyword_arguments_of_the_loss(objective: Objective):
    parameters = inspect.signature(objective.loss).parameters.values()
    keywords = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    assert keywords == list(objective.hyperparameters)
    assert all(parameter.default > 0 or not parameter.positive for parameter in objective.hyperparameters.values())


def test_a_name_is_registered_once():
    for register, name in ((forget_objective, "npo"), (retain_objective, "kl"), (forget_objective, "none")):
        with pytest.raises(ValueError, match="registered already"):
            register(name)(lambda inputs: inputs.logp.sum())
