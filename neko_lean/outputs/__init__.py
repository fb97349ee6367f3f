"""Where results go: what may be written or replaced, by one process at a time, atomically, and never through a link.

Every command that writes asks `claim_folder` or `claim_file` for its place before it works, holds `locked` while it
works, and ends with `publish`.
"""

from neko_lean.errors import UnpublishedError
from neko_lean.outputs.durable import (
    empty_folder,
    no_follow,
    refuse_links,
    remove_temporaries,
    remove_tree,
    sync,
    sync_tree,
    unshare,
    write_atomically,
    write_in_place,
)
from neko_lean.outputs.lock import locked, refuse_orphans, working_in
from neko_lean.outputs.ownership import MANIFEST, RUN, why_not_our_work, why_not_ours
from neko_lean.outputs.place import (
    Output,
    Source,
    claim_file,
    claim_folder,
    refuse_occupied,
    refuse_occupied_file,
    restore_interrupted,
)
from neko_lean.outputs.publish import (
    clear_work,
    publish,
    publish_file,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    remove_replaced,
    staged_folder,
)
from neko_lean.outputs.signing import UNSIGNED, file_sha256, is_signed, sign
from neko_lean.outputs.write_errors import explained_write_errors, os_error_sentence

__all__ = [
    "MANIFEST",
    "RUN",
    "UNSIGNED",
    "Output",
    "Source",
    "UnpublishedError",
    "claim_file",
    "claim_folder",
    "clear_work",
    "empty_folder",
    "explained_write_errors",
    "file_sha256",
    "is_signed",
    "locked",
    "no_follow",
    "os_error_sentence",
    "publish",
    "publish_file",
    "refuse_links",
    "refuse_occupied",
    "refuse_occupied_file",
    "refuse_orphans",
    "refuse_strange_work",
    "refuse_unfinished",
    "refuse_unplanned",
    "remove_replaced",
    "remove_temporaries",
    "remove_tree",
    "restore_interrupted",
    "sign",
    "staged_folder",
    "sync",
    "sync_tree",
    "unshare",
    "why_not_our_work",
    "why_not_ours",
    "working_in",
    "write_atomically",
    "write_in_place",
]
