from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats.tagged import ARG_TAGS

GLM = Family(
    name="glm",
    model_types=frozenset({"glm", "glm4", "glm4_moe", "glm4_moe_lite"}),
    tool_format=ARG_TAGS,
    # The next speaker's tag ends the assistant's turn.
    stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
)
