"""One forward pass a document: what the model thinks of each of its tokens. Membership, memorisation, ranks and entropy
are all read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from neko_lean.data import encode_texts, length_batches
from neko_lean.distributed import all_gather_tensors, flatten_in_rank_order, group_by_round, items_of_rank
from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, next_token_stats, refuse_non_finite_outputs, refuse_unknown_ids
from neko_lean.scoring.limits import BATCH_TOKENS, MAX_LENGTH
from neko_lean.terminal import ProgressBar, log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class View:
    """`PredictionStats` of one document's tokens but its first, as numpy: [length - 1] each, float64 but for rank."""

    logp: np.ndarray
    entropy: np.ndarray
    deviation: np.ndarray
    rank: np.ndarray

    def after(self, prompt: int) -> View:
        """The tokens that come after the first `prompt`: a row's answer. The first token of all has no view."""
        start = max(1, prompt) - 1
        return View(self.logp[start:], self.entropy[start:], self.deviation[start:], self.rank[start:])


def view_documents(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: ProgressBar | None = None,
) -> list[View]:
    """A View of each tokenised document. Raises NekoLeanError for one of fewer than two tokens, for one with a token
    that the model has no row for, and where the model's numbers are NaN or infinite.

    The ranks share the batches out, and each has all views: those of one process to the last bit, since the batches are
    the same. `progress` counts documents of all ranks.
    """
    lm.model.eval()
    for number, ids in enumerate(documents):
        if len(ids) < 2:
            raise NekoLeanError(f"document {number + 1} has fewer than two tokens, so it has no loss.")
    refuse_unknown_ids(((f"document {number + 1}", ids) for number, ids in enumerate(documents)), lm)
    lengths = [len(ids) for ids in documents]
    batches = length_batches(lengths, max_rows=max(1, len(documents)), max_tokens=batch_tokens)
    own = [torch.empty(0, 4, dtype=torch.float64)]  # [length - 1, 4] a document; a rank may have none
    for batch, beside in zip(items_of_rank(batches), group_by_round(batches), strict=False):
        found = next_token_stats(lm, [documents[i] for i in batch], int(tokenizer.pad_token_id))
        own += [torch.stack([column.double() for column in one], 1).cpu() for one in found]
        if progress is not None:
            progress.advance(sum(map(len, beside)))
    order = flatten_in_rank_order(batches)
    columns = torch.cat(all_gather_tensors(torch.cat(own))).split([lengths[i] - 1 for i in order])
    views = {}
    for index, one in zip(order, columns, strict=True):
        refuse_non_finite_outputs(one, f"document {index + 1} of {len(documents)}")
        logp, entropy, deviation, place = one.T.contiguous().numpy()
        views[index] = View(logp, entropy, deviation, place.astype(np.int64))
    return [views[i] for i in range(len(documents))]


def tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int = MAX_LENGTH
) -> tuple[list[list[int]], list[bool]]:
    """The documents' tokens, cut to the first `limit`, and whether each document lost some; a warning counts those."""
    encoded = encode_texts(tokenizer, texts)
    cut = [len(ids) > limit for ids in encoded]
    if any(cut):
        log_line(f"warning: {sum(cut)} of {len(encoded)} documents cut to their first {limit} tokens.")
    return [ids[:limit] for ids in encoded], cut
