"""Where results go: what may be written or replaced, by one process at a time, atomically, and never through a link.

Every command that writes asks `claim_folder` or `claim_file` for its place before it works, holds `locked` while it
works, and ends with `publish`.
"""

from neko_lean.outputs.durable import (
    empty_folder,
    no_follow,
    refuse_links,
    remove_tree,
    sync,
    sync_tree,
    unshare,
    write_atomically,
    write_in_place,
)
from neko_lean.outputs.lock import locked, working_in
from neko_lean.outputs.place import Output, claim_file, claim_folder, refuse_occupied, restore_interrupted
from neko_lean.outputs.publish import (
    UnpublishedError,
    clear_work,
    publish,
    publish_file,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    remove_replaced,
    staged_folder,
)
from neko_lean.outputs.write_errors import explained_write_errors, os_error_sentence

__all__ = [
    "Output",
    "UnpublishedError",
    "claim_file",
    "claim_folder",
    "clear_work",
    "empty_folder",
    "explained_write_errors",
    "locked",
    "no_follow",
    "os_error_sentence",
    "publish",
    "publish_file",
    "refuse_links",
    "refuse_occupied",
    "refuse_strange_work",
    "refuse_unfinished",
    "refuse_unplanned",
    "remove_replaced",
    "remove_tree",
    "restore_interrupted",
    "staged_folder",
    "sync",
    "sync_tree",
    "unshare",
    "working_in",
    "write_atomically",
    "write_in_place",
]
