"""What Anthropic's clients call a failure: its status decides."""

from collections.abc import Mapping
from types import MappingProxyType

_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
        529: "overloaded_error",
    }
)


def error_type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_details(param: str | None, code: str | None) -> Mapping[str, str] | None:
    """What stands in `error.details` for the SDKs to act on. Their tool runners begin a thread with every run; told by this
    code that there are none, they go on without."""
    if (param, code) == ("thread", "unsupported_parameter"):
        return {"error_code": "thread_unsupported_request"}
    return None
