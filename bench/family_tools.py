"""Tools of bench/families.py: references from plain transformers, and stand-ins that record what neko-lean does."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from small_models import plain_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from neko_lean.models.causal_lm import CausalLM
from neko_lean.runs import training_run
from neko_lean.training import loop


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of a folder, in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.config.return_dict = True  # with False, transformers' own forward fails
    return model


def following(logp: Tensor, ids: Sequence[int]) -> Tensor:
    """Log-probability of every token except the first [L - 1], from log-probabilities [L, V]."""
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def next_logp(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Log-probability of every token except the first [L - 1], from the model's own forward."""
    return following(plain_logits(model, torch.tensor([ids]))[0].log_softmax(1), ids)


def cut(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Tokens before the first one that ends a generation."""
    return list(ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))])


def largest(tensor: Tensor) -> float:
    """Largest absolute value, 0 for an empty tensor."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def one_line(error: BaseException) -> str:
    """An exception's message in one line."""
    return re.sub(r"\s+", " ", str(error))[:300]


def where(error: BaseException) -> str:
    """The last line of neko_lean in the traceback, and the line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/neko_lean/" in frame.filename]
    last = [*ours[-1:], frames[-1]]
    names = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in last]
    return " > ".join(dict.fromkeys(names))


@contextlib.contextmanager
def recorded_weights() -> Iterator[dict[str, Tensor]]:
    """Record the parameters that a run writes, as they were in memory.

    The run's memory is not predicted, because the prediction takes longer than these runs.
    """
    recorded: dict[str, Tensor] = {}
    write, prediction = loop.save_checkpoint, training_run.predicted_peak

    def watched(lm: CausalLM, *args: Any) -> None:
        recorded.update({name: p.detach().clone() for name, p in lm.model.named_parameters()})
        write(lm, *args)

    loop.save_checkpoint, training_run.predicted_peak = watched, lambda *_: None
    try:
        yield recorded
    finally:
        loop.save_checkpoint, training_run.predicted_peak = write, prediction


class Recorder:
    """Replaces the optimizer: records gradients and changes no weight."""

    updated = False

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self.names = {id(p): name for name, p in lm.model.named_parameters()}
        self.recorded: dict[str, Tensor] = {}

    def begin_step(self, lr: float) -> None:
        pass

    def update(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.recorded[self.names[id(parameter)]] = parameter.grad.clone()
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """All gradients by name. After a plain backward pass, they are still on the parameters."""
        remaining = {name: p.grad for name, p in self.lm.model.named_parameters() if p.grad is not None}
        return self.recorded | remaining


class IdTokenizer:
    """A tokenizer that decodes token ids to numbers, to see what was generated. `end` is its EOS token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end: int) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def clean_up_tokenization(self, text: str) -> str:
        return text
