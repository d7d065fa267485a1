from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats.marked import KIMI as KIMI_CALLS

KIMI = Family(
    name="kimi",
    model_types=frozenset({"kimi_k2", "kimi_k25", "kimi_linear"}),
    tool_format=KIMI_CALLS,
    stop_tokens=("<|im_end|>", "[EOS]"),
    turn_tokens=("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
)
