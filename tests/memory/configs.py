"""Model configs whose memory is predicted."""

from transformers import Gemma2Config, LlamaConfig, OlmoConfig, PreTrainedConfig

MIDDLE = OlmoConfig(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, architectures=["OlmoForCausalLM"],
)  # fmt: skip
OLMO_1B = OlmoConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    tie_word_embeddings=False, architectures=["OlmoForCausalLM"],
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip
TWO_KINDS = Gemma2Config(
    vocab_size=3000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, sliding_window=64, architectures=["Gemma2ForCausalLM"],
)  # fmt: skip


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with another number of layers."""
    return type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
