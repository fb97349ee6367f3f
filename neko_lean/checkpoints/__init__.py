"""Saves of a training run, exact resume from them, and signals that stop a run after a save."""

from neko_lean.checkpoints.finished import finished_run
from neko_lean.checkpoints.open_run import check_run_folder, open_run_folder
from neko_lean.checkpoints.run_folder import RunFolder
from neko_lean.checkpoints.run_identity import digests, rows_digest, versions
from neko_lean.checkpoints.run_state import RunState, random_states, set_random_states
from neko_lean.checkpoints.saves import METRICS, Save
from neko_lean.checkpoints.signals import Signals, handle_signals
from neko_lean.checkpoints.tensors import WEIGHTS, load_weights, stored_tensors

__all__ = [
    "METRICS",
    "WEIGHTS",
    "RunFolder",
    "RunState",
    "Save",
    "Signals",
    "check_run_folder",
    "digests",
    "finished_run",
    "handle_signals",
    "load_weights",
    "open_run_folder",
    "random_states",
    "rows_digest",
    "set_random_states",
    "stored_tensors",
    "versions",
]
