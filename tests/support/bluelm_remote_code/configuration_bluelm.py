"""Configuration of a tiny BlueLM-like base, as a Hub repo with remote code would carry it."""

from transformers import PretrainedConfig


class BlueLMConfig(PretrainedConfig):
    """Shape of a Llama-layout decoder with a LayerNorm on its embeddings.

    `normalize_given_embeds` says where that LayerNorm sits: False, only token lookups pass through it, and a caller
    of `inputs_embeds` has to apply it; True, whatever enters the blocks does.
    """

    model_type = "BlueLM"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_base=10000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        normalize_given_embeds=False,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_base = rope_base
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.normalize_given_embeds = normalize_given_embeds
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
