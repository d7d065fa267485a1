from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import marked_pythonic

LFM = Family(
    name="lfm",
    model_types=frozenset({"lfm2", "lfm2_moe", "lfm2-vl"}),
    tool_format=marked_pythonic,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
)
