"""Table from ``model_type`` in config.json to the file in ``models/`` that runs it.

Plain data without MLX, so that listing the models on this machine need not import it.
"""

MODELS = {
    "apertus": "apertus",
    "bailing_hybrid": "bailing_hybrid",
    "cohere2": "cohere2",
    "cohere2_moe": "cohere2_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5",
    "exaone4": "exaone4",
    "falcon_h1": "falcon_h1",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "deepseek_v3",
    "glm5_next": "glm5_next",
    "glm5_next_text": "glm5_next",
    "glm_moe_dsa": "glm_moe_dsa",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "granite": "granite",
    "granitemoehybrid": "granite",
    "hunyuan_v1_dense": "hunyuan_v1",
    "kimi_k2": "kimi_k2",
    "kimi_k25": "kimi_k2",
    "kimi_linear": "kimi_linear",
    "laguna": "laguna",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2",
    "llama": "llama3",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "minimax_m2": "minimax_m2",
    "mimo_v2_flash": "mimo_v2_flash",
    "ministral3": "mistral3",
    "mistral": "llama3",
    "mistral3": "mistral3",
    "mistral4": "mistral4",
    "muse_glimmer": "muse_glimmer",
    "muse_glimmer_text": "muse_glimmer",
    "nemotron_h": "nemotron_h",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen3",
    "qwen2_5_vl": "qwen3",
    "qwen2_5_vl_text": "qwen3",
    "qwen2_moe": "qwen3_moe",
    "qwen2_vl": "qwen3",
    "qwen2_vl_text": "qwen3",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
    "qwen4_exp": "qwen4_exp",
    "qwen4_exp_text": "qwen4_exp",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "step3p5": "step3p7",
    "step3p7": "step3p7",
}


# Values of model_type that several architectures share; the class that config.json names tells them
# apart
BY_CLASS = {("git", "Grok1ForCausalLM"): "grok2"}

# Text models inside of wrappers whose own model_type stands for another one
BY_TEXT_MODEL = {("mistral3", "mistral4"): "mistral4"}

RUNNABLE = frozenset({*MODELS, *(model_type for model_type, _ in BY_CLASS)})
"""Every ``model_type`` that some file in ``models/`` runs."""
