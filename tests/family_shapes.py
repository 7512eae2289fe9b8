"""What sets the families apart in ``config.json``, as changes to that of a small DeepSeek-R1.

Numbers that decide what is computed are those of the releases (Moonlight-16B-A3B-Instruct, Kimi-K2-Thinking; GigaChat3
as far as its shape is described in public); sizes are small.
"""

YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
MOONLIGHT = ONE_GROUP | {
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
}
KIMI = ONE_GROUP | {
    "model_type": "kimi_k2",
    "n_routed_experts": 24,  # no power of two, as 384
    "rope_scaling": YARN | {"factor": 64, "original_max_position_embeddings": 4096},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
}
GIGACHAT = ONE_GROUP | {  # values are as wide as queries and keys, wider than their part without rotation
    "q_lora_rank": None,
    "v_head_dim": 128,
    "rope_scaling": None,
    "rope_theta": 100000,
    "routed_scaling_factor": 1.0,
}
FAMILIES = {"moonlight": MOONLIGHT, "kimi": KIMI, "gigachat": GIGACHAT}
