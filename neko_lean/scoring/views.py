"""One forward pass per document: the model's statistics for each of its tokens.

Membership inference, memorisation, ranks and entropy are all computed from these views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from neko_lean.data import EncodedExample, encode_texts, length_batches
from neko_lean.distributed import all_gather_tensors, flatten_in_rank_order, group_by_round, items_of_rank
from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, next_token_stats, refuse_non_finite_outputs, refuse_unknown_ids
from neko_lean.scoring.limits import BATCH_TOKENS, MAX_LENGTH
from neko_lean.terminal import ProgressBar, log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class View:
    """What the model predicts for each token of a document except the first.

    Attributes:
        logp: log-probability of the token, in nats: [length - 1] float64.
        entropy: entropy of the prediction, in nats: [length - 1] float64.
        deviation: standard deviation of the log-probability under the prediction: [length - 1] float64.
        rank: rank of the token among all tokens, 1 for the most likely: [length - 1] int64.
    """

    logp: np.ndarray
    entropy: np.ndarray
    deviation: np.ndarray
    rank: np.ndarray

    def after(self, prompt_length: int) -> View:
        """The view of an example's answer: the tokens after the first `prompt_length`."""
        start = max(1, prompt_length) - 1
        return View(self.logp[start:], self.entropy[start:], self.deviation[start:], self.rank[start:])


def view_documents(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: ProgressBar | None = None,
) -> list[View]:
    """Compute the view of each tokenized document.

    The batches are divided among the ranks, and every rank returns all views. They equal those of a single process
    bit for bit, because the batches are the same.

    Args:
        lm: the model.
        tokenizer: its tokenizer, for the padding token.
        documents: token ids of each document, at least two.
        batch_tokens: maximum number of positions per forward pass, padding included.
        progress: counts the documents of all ranks.

    Raises:
        NekoLeanError: a document has fewer than two tokens or a token id that the model does not have, or an output of
            the model is NaN or infinite.
    """
    lm.model.eval()
    for number, ids in enumerate(documents):
        if len(ids) < 2:
            raise NekoLeanError(f"document {number + 1} has fewer than two tokens, so it has no loss; remove it.")
    refuse_unknown_ids(((f"document {number + 1}", ids) for number, ids in enumerate(documents)), lm)

    # Each rank runs its batches.
    lengths = [len(ids) for ids in documents]
    batches = length_batches(lengths, max_rows=max(1, len(documents)), max_tokens=batch_tokens)
    rows = [torch.empty(0, 4, dtype=torch.float64)]  # [length - 1, 4] per document; a rank may have none
    for batch, batches_of_round in zip(items_of_rank(batches), group_by_round(batches), strict=False):
        stats = next_token_stats(lm, [documents[i] for i in batch], int(tokenizer.pad_token_id))
        rows += [torch.stack([column.double() for column in columns], 1).cpu() for columns in stats]
        if progress is not None:
            progress.advance(sum(map(len, batches_of_round)))

    # Every rank gets all of them.
    order = flatten_in_rank_order(batches)
    gathered = torch.cat(all_gather_tensors(torch.cat(rows))).split([lengths[i] - 1 for i in order])
    views = {}
    for index, table in zip(order, gathered, strict=True):
        refuse_non_finite_outputs(table, f"document {index + 1} of {len(documents)}")
        logp, entropy, deviation, rank = table.T.contiguous().numpy()
        views[index] = View(logp, entropy, deviation, rank.astype(np.int64))
    return [views[i] for i in range(len(documents))]


def view_answers(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedExample],
    *,
    progress: ProgressBar | None = None,
) -> list[View]:
    """Compute the view of each tokenized example's answer; the arguments are those of `view_documents`."""
    views = view_documents(lm, tokenizer, [example.input_ids for example in encoded], progress=progress)
    return [view.after(example.prompt_length) for view, example in zip(views, encoded, strict=True)]


def tokenize_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int = MAX_LENGTH
) -> tuple[list[list[int]], list[bool]]:
    """Tokenize documents and truncate them to `limit` tokens; logs a warning with the number of truncated ones.

    Returns:
        The token ids of each document, and whether it was truncated.
    """
    encoded = encode_texts(tokenizer, texts)
    truncated = [len(ids) > limit for ids in encoded]
    if any(truncated):
        log_line(f"warning: {sum(truncated)} of {len(encoded)} documents are truncated to their first {limit} tokens.")
    return [ids[:limit] for ids in encoded], truncated
