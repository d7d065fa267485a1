from mlx_manager.inference.families.family import LONGCAT_THINK, THINK, Family
from mlx_manager.inference.families.tool_formats.tagged import LONGCAT as LONGCAT_CALLS

LONGCAT = Family(
    name="longcat",
    model_types=frozenset({"longcat_flash", "longcat_flash_ngram"}),
    tool_format=LONGCAT_CALLS,
    reasoning_tags=(THINK, LONGCAT_THINK),
)
