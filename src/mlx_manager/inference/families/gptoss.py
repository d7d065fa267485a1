from mlx_manager.inference.families.family import Family

GPT_OSS = Family(
    name="gpt-oss",
    model_types=frozenset({"gpt_oss"}),
    channels=True,
    reasoning_tags=(),
    stop_tokens=("<|return|>", "<|call|>", "<|endoftext|>"),
    turn_tokens=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
)
