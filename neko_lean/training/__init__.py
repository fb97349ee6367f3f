"""A training run: batches, losses, the layerwise backward pass, the optimizer and the training loop."""

from neko_lean.training.adam_state import new_state
from neko_lean.training.batch import Batch, forget_span, make_batch, select_hidden
from neko_lean.training.examples import TrainingExamples
from neko_lean.training.layers import decoder_layers, freeze, prepare_student
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.levels import with_levels, with_spread
from neko_lean.training.loop import Callback, Loop
from neko_lean.training.micro_batches import MicroBatches, micro_batches, split_across_ranks
from neko_lean.training.optimizer import SLICE, update_bytes
from neko_lean.training.out_of_memory import explained_out_of_memory
from neko_lean.training.schedules import batches, phases, total_steps
from neko_lean.training.trainer import Trainer

__all__ = [
    "SLICE",
    "Batch",
    "Callback",
    "LayerPass",
    "Loop",
    "MicroBatches",
    "Trainer",
    "TrainingExamples",
    "batches",
    "decoder_layers",
    "explained_out_of_memory",
    "forget_span",
    "freeze",
    "make_batch",
    "micro_batches",
    "new_state",
    "phases",
    "prepare_student",
    "select_hidden",
    "split_across_ranks",
    "total_steps",
    "update_bytes",
    "with_levels",
    "with_spread",
]
