"""A short way for tests to call `score` with options by name."""

from dataclasses import fields

from neko_lean.options import OutputOptions
from neko_lean.scoring import ScoreInputs, ScoreSettings, score


def score_with(model, data, out, **options):
    """Call `score` with each option in the dataclass that it is a field of."""

    def group(kind):
        return kind(**{field.name: options.pop(field.name) for field in fields(kind) if field.name in options})

    inputs, settings, run = map(group, (ScoreInputs, ScoreSettings, OutputOptions))
    assert not options, f"unknown options {sorted(options)}"
    return score(model, out, data=data, inputs=inputs, settings=settings, run=run)
