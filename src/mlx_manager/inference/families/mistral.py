from mlx_manager.inference.families.family import BRACKETS, THINK, Family
from mlx_manager.inference.families.tool_formats import mistral

MISTRAL = Family(
    name="mistral",
    model_types=frozenset({"mistral", "mixtral", "ministral3", "mistral3"}),
    tool_format=mistral,
    reasoning_tags=(THINK, BRACKETS),
    stop_tokens=("</s>",),
)
