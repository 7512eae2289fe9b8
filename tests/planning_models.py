"""config.json of public models (only the keys that sizes depend on) and the published feasibility table."""

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT_16B = {
    key: value for key, value in DEEPSEEK_V3.items() if key not in ("quantization_config", "num_nextn_predict_layers")
} | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "topk_group": 1,
    "vocab_size": 163840,
}

# nodes of 8 GPUs, sequence parallel, strategy, micro batch, published verdict
PUBLISHED = [
    (16, 8, "zero3_offload", 2, True),
    (32, 8, "zero3_offload", 1, True),
    (32, 4, "zero3_offload", 1, True),
    (32, 1, "zero3_offload", 1, True),
    (32, 4, "zero3_offload", 2, True),
    (32, 1, "zero3_offload", 2, False),
    (32, 4, "zero3", 1, False),
    (32, 1, "zero3", 1, False),
]
