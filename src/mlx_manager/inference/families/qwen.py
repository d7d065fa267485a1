from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import json_tags

QWEN = Family(
    name="qwen",
    model_types=frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}),
    tool_format=json_tags,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
)
