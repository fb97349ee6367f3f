"""Names that do not exist: one sentence with the nearest one, and exit code 2."""

import pytest
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.cli.help import COMMANDS, Commands
from neko_lean.cli.suggestions import COMMAND_SYNONYMS, PARAMETER_SYNONYMS


def refusal(*args):
    """The one sentence of a usage error."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.rstrip("\n")


def parameters(command):
    return {param.name for param in Commands().get_command(None, command).params}


@pytest.mark.parametrize(
    ("command", "option", "suggestion"),
    [
        ("unlearn", "--output-dir", "did you mean --out?"),
        ("unlearn", "--output_dir=x", "did you mean --out?"),
        ("unlearn", "-o", "did you mean --out?"),
        ("unlearn", "--forget-set", "did you mean --forget?"),
        ("unlearn", "--dataset", "did you mean --forget?"),
        ("score", "--dataset", "did you mean --data?"),
        ("memorize", "--forget-set", "did you mean --data?"),
        ("unlearn", "--learning_rate", "did you mean --learning-rate?"),
        ("unlearn", "--num-train-epochs", "did you mean --epochs?"),
        ("unlearn", "--method", "did you mean --recipe?"),
        ("unlearn", "--outt", "did you mean --out?"),
        ("unlearn", "--DEVICE", "did you mean --device?"),
        ("unlearn", "--weight-decay", "did you mean --set weight_decay=VALUE?"),
        ("unlearn", "--max-grad-norm", "did you mean --set clip=VALUE?"),
        ("unlearn", "--zzz", "see neko-lean unlearn --help."),
        ("unlearn", "--model", "MODEL is an argument: give its value without --model."),
        ("memorize", "--model-name-or-path", "MODEL_OR_CONFIG is an argument: give its value without"),
        ("cache-teacher", "--retain-set", "RETAIN is an argument: give its value without --retain-set."),
    ],
)
def test_an_unknown_option_names_the_nearest(command, option, suggestion):
    sentence = refusal(command, option, "x").replace("root ", "neko-lean ")
    assert f"has no option {option.partition('=')[0]}; {suggestion}" in sentence


@pytest.mark.parametrize(
    ("command", "suggestion"),
    [("unlern", "unlearn?"), ("Unlearn", "unlearn?"), ("cache_teacher", "cache-teacher?"), ("evaluate", "score?"),
     ("finetune", "memorize?"), ("train", "unlearn or memorize?"), ("xyzzy", "only cache-teacher, inspect,")],
)  # fmt: skip
def test_an_unknown_command_names_the_nearest(command, suggestion):
    assert suggestion in refusal(command, "--help")


def test_an_option_before_the_command_is_refused_with_its_place():
    assert "options of a command come after its name" in refusal("--lr", "1e-5", "unlearn")


def test_other_usage_errors_are_one_sentence_too():
    assert "missing option '--out'" in refusal("unlearn", "m", "--forget", "f")
    assert "'--max-steps'" in refusal("unlearn", "m", "--forget", "f", "--out", "o", "--max-steps", "many")
    assert "([red]x[/]\\x1b); see " in refusal("inspect", "cache", "[red]x[/]\x1b")


def test_every_synonym_is_a_name_that_exists():
    assert all(name in COMMANDS for names in COMMAND_SYNONYMS.values() for name in names)
    known = set.union(*(parameters(command) for command in COMMANDS))
    assert {name for names in PARAMETER_SYNONYMS.values() for name in names} <= known
    assert all(key == key.lower() and "_" not in key for key in (*COMMAND_SYNONYMS, *PARAMETER_SYNONYMS))
