"""Predict a model with many equal layers from one with few of them.

Of a long run of equal layers, only the first three, one in the middle and the last three are kept. The middle one
stands for all that are missing: what it allocates counts once for each of them. That is exact at any moment at which
the step is not close to the middle layer, because each of the missing layers then holds the same. In between, the bytes
alive change by the same amount from one layer to the next, so they are largest at one of the ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from neko_lean.errors import NekoLeanError
from neko_lean.memory.fake_models import find_layers
from neko_lean.memory.repeated_layers import CannotRepeatError, layer_kind
from neko_lean.models import CausalLM

T = TypeVar("T")

END = 3  # periods kept at each end of a run
LONGEST_PERIOD = 8  # layers; families alternate between two to six kinds


@dataclass(frozen=True)
class KeptLayer:
    """A layer of a shortened model."""

    number: int
    """In the whole model."""

    copies: int = 1
    """Number of layers that it stands for."""

    counted: bool = True
    """Whether the bytes that are alive while it runs may be the peak."""


@dataclass(frozen=True)
class ShortenedModel:
    """What is known about the layers of a model, in the order in which they run; all empty if it was not shortened."""

    layers: list[KeptLayer] = field(default_factory=list)

    missing: list[nn.Module] = field(default_factory=list)
    """For each layer that is missing, the one that stands for it."""

    def copies(self, number: int) -> int:
        """Number of layers that a layer of the shortened model stands for."""
        return self.layers[number].copies if self.layers else 1

    @property
    def counts(self) -> list[tuple[int, bool]]:
        """What `LiveTensors` has to know about each layer."""
        return [(layer.copies, layer.counted) for layer in self.layers]

    def parameters(self, lm: CausalLM) -> list[nn.Parameter]:
        """All parameters of the whole model. Those of missing layers are those of the layers that stand for them."""
        return [*lm.model.parameters(), *(p for layer in self.missing for p in layer.parameters())]


Shorten = Callable[[CausalLM], AbstractContextManager[ShortenedModel]]
"""`shortened` or `all_layers`."""


@contextmanager
def all_layers(_: CausalLM) -> Iterator[ShortenedModel]:
    """A model that is not shortened."""
    yield ShortenedModel()


@contextmanager
def shortened(lm: CausalLM) -> Iterator[ShortenedModel]:
    """Within this context, a model on fake tensors has fewer layers, if it has enough equal ones.

    Call it within `FakeModels.use`, whose end gives the model its layers back.
    """
    layers = None
    with suppress(NekoLeanError):
        layers = find_layers(lm)
    kept = [] if layers is None or _share_parameters(layers) else kept_layers([layer_kind(layer) for layer in layers])
    if layers is None or len(kept) in (0, len(layers)):
        yield ShortenedModel()
        return
    chosen = [layers[layer.number] for layer in kept]
    missing = [layer for layer, one in zip(chosen, kept, strict=True) for _ in range(one.copies - 1)]
    lm.backbone.layers = nn.ModuleList(chosen)

    # Some families look up a layer's kind by its place in the model.
    config = vars(lm.backbone.config)
    by_layer = {
        key: values for key, values in config.items() if isinstance(values, list) and len(values) == len(layers)
    }
    config.update({key: [values[layer.number] for layer in kept] for key, values in by_layer.items()})
    try:
        yield ShortenedModel(kept, missing)
    finally:
        config.update(by_layer)


def run_shortened(run: Callable[[Shorten], T]) -> T:
    """The result of `run` for a shortened model, or for the whole model if its layers cannot be repeated."""
    try:
        return run(shortened)
    except CannotRepeatError:
        return run(all_layers)


def kept_layers(kinds: Sequence[Hashable]) -> list[KeptLayer]:
    """Choose the layers of a shortened model.

    Args:
        kinds: kind of each layer. Runs in which a few kinds repeat in the same order are shortened.
    """
    kept: list[KeptLayer] = []
    start = 0
    while start < len(kinds):
        period, repeats = _run(kinds, start)
        for repeat in range(repeats):
            if repeats <= 2 * END + 1 or repeat < END or repeat >= repeats - END:
                copies = 1
            elif repeat == END:
                copies = repeats - 2 * END
            else:
                continue
            counted = repeats <= 2 * END + 1 or repeat < END - 1 or repeat > repeats - END
            first = start + repeat * period
            kept += [KeptLayer(number, copies, counted) for number in range(first, first + period)]
        start += period * repeats
    return kept


def _run(kinds: Sequence[Hashable], start: int) -> tuple[int, int]:
    """Period and number of repeats of a run that is long enough to be shortened; 1 and 1 if none starts here."""
    for period in range(1, LONGEST_PERIOD + 1):
        pattern, repeats = kinds[start : start + period], 1
        while kinds[start + repeats * period : start + (repeats + 1) * period] == pattern:
            repeats += 1
        if repeats > 2 * END + 1:
            return period, repeats
    return 1, 1


def _share_parameters(layers: nn.ModuleList) -> bool:
    return len({id(p) for p in layers.parameters()}) < sum(1 for layer in layers for _ in layer.parameters())
