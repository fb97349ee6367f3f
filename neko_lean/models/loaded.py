"""Accept a model that is already loaded wherever a checkpoint is expected."""

from __future__ import annotations

import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from neko_lean.distributed import is_main_process, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError, first_line
from neko_lean.outputs import explained_write_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

P = ParamSpec("P")
R = TypeVar("R")


def accepts_loaded_model(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a function with the parameter `model`, and perhaps `tokenizer` and `out`.

    A loaded model is saved in a temporary folder next to `out`, which the function gets as `model` and which is removed
    when it returns. So the function runs on the same files, checks and fingerprints as with a checkpoint. Only the
    config is saved for a function without `tokenizer`.
    """
    signature = inspect.signature(function)
    config_only = "tokenizer" not in signature.parameters

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        model, tokenizer = bound.arguments["model"], bound.arguments.pop("tokenizer", None)
        out = bound.arguments.get("out")
        with checkpoint_of(model, tokenizer, out, config_only=config_only) as bound.arguments["model"]:
            return function(*bound.args, **bound.kwargs)

    return wrapped


@contextmanager
def checkpoint_of(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path | None = None,
    *,
    config_only: bool = False,
) -> Iterator[str | Path]:
    """A path or a hub name as it is; a loaded model as a checkpoint folder, which exists while the block runs.

    Args:
        model: a checkpoint folder, a hub name, or a loaded transformers model.
        tokenizer: the loaded model's tokenizer. A path or a hub name brings its own.
        out: the temporary folder is created next to this path, on a disk with space for a model; without it, in the
            system's folder for temporary files.
        config_only: save the config alone, without weights and tokenizer.

    Raises:
        NekoLeanError: the model is of another type, it cannot be saved as safetensors, or the tokenizer is missing or
            has no effect.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise NekoLeanError(f"tokenizer has no effect, because {model} brings its own; leave it out.")
        yield model
        return
    if tokenizer is None and not config_only:
        raise NekoLeanError("a loaded model needs its tokenizer; pass tokenizer=, such as AutoTokenizer loads.")
    _check_type(model)
    temporary = Path(tempfile.gettempdir())
    parent = next(filter(Path.is_dir, Path(out).resolve().parents), temporary) if out is not None else temporary

    def save() -> Path:
        folder = Path(tempfile.mkdtemp(prefix=".neko-lean-", dir=parent))
        try:
            return _save(model, tokenizer, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    with explained_write_errors(parent):
        checkpoint = run_on_main_and_broadcast(save)
    try:
        yield checkpoint
    finally:
        if is_main_process():
            shutil.rmtree(checkpoint.parent, ignore_errors=True)


def _check_type(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        hint = "; merge the adapter first, with merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise NekoLeanError(
            f"model has type {type(model).__name__}; expected a checkpoint folder, a hub name, or a loaded model of "
            f"transformers{hint}."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise NekoLeanError("model has an adapter, of which a checkpoint would hold nothing else; merge it first.")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> Path:
    """Save a checkpoint in a folder inside `folder` that has the model's name; only the config without a tokenizer."""
    # Resolved, because a model that was loaded from ".." would be saved outside of `folder`.
    name = Path(str(model.config.name_or_path or "/")).resolve().name or type(model).__name__
    checkpoint = folder / name
    try:
        if tokenizer is None:
            model.config.save_pretrained(checkpoint)
        else:
            model.save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)
    except OSError:
        raise
    except Exception as error:  # transformers raises many types
        raise NekoLeanError(
            f"the loaded model cannot be saved as a checkpoint ({first_line(error)}); save it yourself and pass the "
            f"folder."
        ) from error
    return checkpoint
