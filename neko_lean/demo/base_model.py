"""The demo's model before training: config and tokenizer of a small OLMo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neko_lean.data import Example

VOCABULARY = 2048
EOS, PAD = "<|endoftext|>", "<|padding|>"


def write_base(folder: Path, rows: Sequence[Example], vocabulary: int = VOCABULARY) -> None:
    """Write the config and the tokenizer of a small OLMo model, without weights.

    Args:
        folder: folder to write to.
        rows: examples that the tokenizer is trained on.
        vocabulary: largest vocabulary size.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import OlmoConfig, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = [f"{row.input} {row.output}" for row in rows]
    trained.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=2, special_tokens=[EOS, PAD], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=EOS, pad_token=PAD)
    tokenizer.save_pretrained(folder)
    OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        architectures=["OlmoForCausalLM"],
    ).save_pretrained(folder)
