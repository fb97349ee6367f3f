"""Writing outputs safely: what may be replaced, locks, atomic and durable writes, and work folders.

Every command that writes claims its output before it works, and publishes the complete result at the end.
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
from neko_lean.outputs.publish import discard, publish, publish_file, remove_replaced
from neko_lean.outputs.signing import SHA256_HEX, UNSIGNED, file_sha256, is_signed, sign
from neko_lean.outputs.work_folder import (
    clear_work,
    keep_or_discard,
    open_work_folder,
    refuse_strange_work,
    refuse_unfinished,
    refuse_unplanned,
    staged_folder,
)
from neko_lean.outputs.write_errors import explained_write_errors, os_error_sentence

__all__ = [
    "MANIFEST",
    "RUN",
    "SHA256_HEX",
    "UNSIGNED",
    "Output",
    "Source",
    "UnpublishedError",
    "claim_file",
    "claim_folder",
    "clear_work",
    "discard",
    "empty_folder",
    "explained_write_errors",
    "file_sha256",
    "is_signed",
    "keep_or_discard",
    "locked",
    "no_follow",
    "open_work_folder",
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
