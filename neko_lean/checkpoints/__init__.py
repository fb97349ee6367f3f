"""Saves of an unfinished run, exact resume from them, and the signals that ask for one."""

from neko_lean.checkpoints.run_folder import RunFolder, finished_run, link_tree, open_run_folder
from neko_lean.checkpoints.run_identity import digests, rows_digest, versions
from neko_lean.checkpoints.saves import METRICS, RunState, Save, load_weights, random_states, set_random_states
from neko_lean.checkpoints.signals import Signals, handle_signals

__all__ = [
    "METRICS",
    "RunFolder",
    "RunState",
    "Save",
    "Signals",
    "digests",
    "finished_run",
    "handle_signals",
    "link_tree",
    "load_weights",
    "open_run_folder",
    "random_states",
    "rows_digest",
    "set_random_states",
    "versions",
]
