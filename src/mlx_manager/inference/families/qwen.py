from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import json_tags
from mlx_manager.inference.families.tool_formats.tagged import FUNCTION_TAGS

QWEN = Family(
    name="qwen",
    model_types=frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}),
    tool_format=json_tags,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
)

QWEN35 = Family(
    name="qwen3.5",
    model_types=frozenset({"qwen3_5", "qwen3_5_text", "qwen3_5_moe"}),
    tool_format=FUNCTION_TAGS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
)
