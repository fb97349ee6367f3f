"""Greedy decoding in batches, with a fixed generation config and never the checkpoint's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from neko_lean.data import length_batches, pad
from neko_lean.modeling import CausalLM
from neko_lean.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Bar | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, as text.

    Prompts go in raw: no template, no BOS that the tokenizer does not add itself. A generation stops at EOS or after
    `max_new_tokens`; special tokens are dropped and spaces cleaned up. Prompts of like length share a batch,
    padded left, which in float32 gives the tokens of decoding each alone.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lm.model.eval()
    # generate() fills what a config leaves open from the model's own, which came with the checkpoint.
    lm.model.generation_config = config
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = [""] * len(prompts)
    everything = len(prompts) * max(map(len, encoded))
    for batch in length_batches([len(ids) for ids in encoded], max_rows=batch_size, max_tokens=everything):
        input_ids, mask = pad([encoded[i] for i in batch], int(tokenizer.pad_token_id), lm.device, left=True)
        out = lm.model.generate(input_ids, attention_mask=mask, generation_config=config)  # [B, L + new]
        new = out[:, input_ids.shape[1] :]
        for index, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            # Called outright: the option of batch_decode, which the task set, is ignored for BPE by transformers 5.
            texts[index] = tokenizer.clean_up_tokenization(text)
        if progress is not None:
            progress.advance(len(batch))
    return texts
