"""Model configs whose memory is predicted."""

from transformers import OlmoConfig

MIDDLE = OlmoConfig(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, architectures=["OlmoForCausalLM"],
)  # fmt: skip
OLMO_1B = OlmoConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    tie_word_embeddings=False, architectures=["OlmoForCausalLM"],
)  # fmt: skip
