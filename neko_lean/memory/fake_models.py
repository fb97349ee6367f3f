"""Models without storage, from a config alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neko_lean.errors import NekoLeanError
from neko_lean.memory.estimate import StepMemory
from neko_lean.memory.fake_tensors import fake_tensors
from neko_lean.memory.repeated_layers import Recordings, each_kind_once
from neko_lean.models import CausalLM, config_softcap, find_backbone, load_config, reset_output_switches
from neko_lean.training import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def fake_model(config: Path | PreTrainedConfig, dtype: torch.dtype) -> CausalLM:
    """A model without storage. Call it within `fake_tensors()`.

    Args:
        config: the model's config, or a folder that holds its config.json.
        dtype: dtype of the weights.

    Raises NekoLeanError if the model's backbone and head cannot be told apart.
    """
    from transformers import AutoModelForCausalLM

    model_config = load_config(config) if isinstance(config, Path) else config
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False).eval()
    reset_output_switches(model)
    try:
        with each_kind_once(model):
            backbone = find_backbone(model)
    except NekoLeanError as error:
        raise NekoLeanError(f"memory cannot be predicted from the config alone in {dtype}: {error}") from error
    return CausalLM(model, backbone, softcap=config_softcap(model_config))


def find_layers(lm: CausalLM) -> nn.ModuleList:
    """The model's decoder layers, as `decoder_layers` finds them. Raises NekoLeanError if they cannot be run alone."""
    with each_kind_once(lm.model):
        return decoder_layers(lm)


@dataclass
class FakeModels:
    """The models of one config, one for each dtype, and what is known about their steps.

    A model is built when it is first used. Predictions of the same config share it, and what they record of its layers,
    so each of them after the first takes a fraction of the time.
    """

    config: PreTrainedConfig

    memories: dict[Any, StepMemory] = field(default_factory=dict)
    """The memory of steps that have been predicted, see `prediction.step_memory`."""

    _mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    _built: dict[torch.dtype, tuple[CausalLM, Recordings]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: FakeModels | PreTrainedConfig | Path) -> FakeModels:
        """The models of a config, or of the folder that holds its config.json."""
        if isinstance(config, FakeModels):
            return config
        return cls(load_config(config) if isinstance(config, Path) else config)

    @contextmanager
    def use(self, dtype: torch.dtype) -> Iterator[tuple[CausalLM, Recordings]]:
        """Within this context, tensors are fake, and the model may be changed: the changes are undone at its end.

        Yields the model and the recordings of its layers. Raises NekoLeanError as `fake_model` does.
        """
        with fake_tensors(self._mode):
            if dtype not in self._built:
                self._built[dtype] = fake_model(copy.deepcopy(self.config), dtype), Recordings()
            lm, recordings = self._built[dtype]
            try:
                with unchanged(lm.model):
                    yield lm, recordings
            except BaseException:
                del self._built[dtype]  # a step that fails may leave hooks behind
                raise


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo at the end of this context what happens to a model in it: attributes and buffers of its modules, gradients,
    and which parameters have them."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    attributes = {module: _copied(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        for parameter, requires_grad in trained.items():
            parameter.grad = None
            parameter.requires_grad_(requires_grad)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes, including the dicts and lists among them."""
    return {key: copy.copy(value) if isinstance(value, dict | list) else value for key, value in values.items()}
