"""Variants of families that bench/families.py tests in addition to every causal family of transformers."""

from __future__ import annotations

from typing import Any

# Name of a variant: its family, and the configuration values that it changes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, return_dict false": ("llama", {"return_dict": False}),
    "llama, output_attentions": ("llama", {"output_attentions": True, "attn_implementation": "eager"}),
    "llama, output_hidden_states": ("llama", {"output_hidden_states": True}),
    "llama, dropout": ("llama", {"attention_dropout": 0.2}),
    "llama, use_cache false": ("llama", {"use_cache": False}),
    "gpt2, no dropout": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt2, return_dict false": ("gpt2", {"return_dict": False}),
    "gpt2, output_attentions": ("gpt2", {"output_attentions": True, "attn_implementation": "eager"}),
    "opt, post-norm, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, dropout": ("gpt_neox", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "mamba, return_dict false": ("mamba", {"return_dict": False}),
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "roberta, not a decoder": ("roberta", {"is_decoder": False}),
    "xlm, not causal": ("xlm", {"causal": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma2, no cap": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "cohere, scale 1": ("cohere", {"logit_scale": 1.0}),
    "phi, dropout": ("phi", {"resid_pdrop": 0.1}),
    "opt, layerdrop": ("opt", {"layerdrop": 0.5, "dropout": 0.0}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
    "mixtral, router logits and jitter": ("mixtral", {"output_router_logits": True, "router_jitter_noise": 0.1}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "llama, more rows than tokens": ("llama", {"vocab_size": 320}),
    # Frequencies that depend on the longest row of a batch; rows of up to 16 tokens are batched with longer ones.
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "phi3, longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 4.0, 6.0, 8.0],
            },
        },
    ),
}
