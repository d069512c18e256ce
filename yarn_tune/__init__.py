"""yarn_tune: learn RoPE's scale and the attention temperature of a frozen model."""
