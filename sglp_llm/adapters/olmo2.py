"""OLMo 2. Norms follow attention and MLP inside each layer."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(display_name="OLMo 2", mlp_norm="post_feedforward_layernorm", tiny_configs=(TINY_LLAMA,))
