"""What can go wrong, by who can put it right. Rendered once, in `api.errors` and `protocols`.

MLXManagerError
├── RequestError              the client can: ask differently
│   ├── InvalidField          a value is wrong, or a field cannot be honoured
│   ├── ContextTooLong        the prompt leaves no room for one token
│   │   └── PromptTooLarge    the prompt's keys and values do not fit this machine's share for the model
│   ├── Conflict              what is there already stands against it
│   ├── ModelNotFound         nothing here answers to that name
│   ├── NotFound              what the request names is not, or no longer, kept here
│   └── HubRefused            the Hub wants a token, another one, or its terms accepted
├── BackendError              another backend can, or the same one later
│   ├── Overloaded            too many wait already, or the server is draining
│   │   └── NotEnoughMemory   there is no room now for what the request needs
│   ├── ModelLoadFailed       the model is there and would not load
│   │   └── ModelTooLarge     there is never room for it
│   ├── TimedOut              it took longer than it may
│   ├── NotSaved              the database could not take a change, and is as it was
│   ├── HubUnavailable        the Hub did not answer as it should, or nobody may ask it
│   └── StorageFull           the disk has no room for it
└── EngineFault               we have to: the engine failed while it served this request
"""

from collections.abc import Sequence


class MLXManagerError(Exception):
    """Its text is meant for the client: it names what is wrong and no path, address or class of ours."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(MLXManagerError):
    pass


class InvalidField(RequestError):
    """`param` is the path as the client wrote it (`messages[2].content`); `code` is the OpenAI code for it."""

    def __init__(self, message: str, *, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(RequestError):
    """`where` is the path of the text that is too long, where there are several."""

    def __init__(self, *, limit: int, tokens: int, where: str | None = None) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} tokens. "
            "Please reduce the length of the messages." + ("" if where is None else f" The text that is too long is '{where}'.")
        )
        self.limit = limit
        self.tokens = tokens
        self.where = where


class PromptTooLarge(ContextTooLong):
    def __init__(self, *, tokens: int, limit: int) -> None:
        RequestError.__init__(
            self,
            f"The prompt's {tokens} tokens do not fit the memory that this server has for the model's keys and values, which is enough "
            f"for {limit}. Please reduce the length of the messages, or raise --kv-cache-gib.",
        )
        self.tokens = tokens
        self.limit = limit
        self.where = None


class ModelNotFound(RequestError):
    def __init__(self, model: str, available: Sequence[str]) -> None:
        names = ", ".join(available)
        super().__init__(
            f"The model '{model}' does not exist here. " + (f"Available models: {names}." if names else "There are no models yet.")
        )
        self.model = model


class NotFound(RequestError):
    """`param` is the field that names it, if it is one of the body."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Conflict(RequestError):
    """`param` is the field that clashes."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "conflict") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class HubRefused(RequestError):
    pass


class BackendError(MLXManagerError):
    pass


class Overloaded(BackendError):
    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotEnoughMemory(Overloaded):
    """Both in bytes; what is `needed` is named in the message."""

    def __init__(self, what: str, *, needed: int, available: int) -> None:
        super().__init__(
            f"{what} needs {gigabytes(needed)}, and only {gigabytes(available)} are available. Please try again later.", retry_after_s=10
        )
        self.needed = needed
        self.available = available


class ModelLoadFailed(BackendError):
    pass


class ModelTooLarge(ModelLoadFailed):
    """Both in bytes."""

    def __init__(self, model: str, *, needed: int, limit: int) -> None:
        super().__init__(f"The model '{model}' needs {gigabytes(needed)}, and all models together may take {gigabytes(limit)}.")
        self.needed = needed
        self.limit = limit


class TimedOut(BackendError):
    pass


class NotSaved(BackendError):
    def __init__(self, why: str, *, is_full: bool) -> None:
        super().__init__(f"The change could not be saved ({why}). Nothing was changed.")
        self.is_full = is_full


class HubUnavailable(BackendError):
    """`is_offline`: this machine is not to ask, so that trying again is of no use. `retry_after_s` is what the Hub said, in seconds."""

    def __init__(self, message: str, *, is_offline: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.is_offline = is_offline
        self.retry_after_s = retry_after_s


class StorageFull(BackendError):
    pass


class EngineFault(MLXManagerError):
    pass


def gigabytes(num_bytes: int) -> str:
    """For a message: of what is small, enough digits to tell sizes apart."""
    return f"{num_bytes / 1e9:.{1 if num_bytes >= 1e9 else 3}f} GB"
