"""What can go wrong, by whose fault it is. Messages name the value, the limit and the way out."""


class QuireError(Exception):
    """Base of every error that Quire raises on purpose."""


class InvalidRequest(QuireError, ValueError):
    """One request asks for something impossible; nothing else is affected.

    Attributes:
        param: the name of the offending field, if it is one field.
    """

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a single output token.

    Attributes:
        num_tokens: tokens in the prompt.
        limit: the most tokens (prompt and output together) that a request may have.
    """

    def __init__(self, message: str, *, num_tokens: int, limit: int):
        super().__init__(message, param="prompt")
        self.num_tokens, self.limit = num_tokens, limit


class ConfigError(QuireError, ValueError):
    """An option has a value that cannot work, alone or together with the model or the machine."""


class ModelError(QuireError):
    """The model cannot be served: unknown architecture, bad config.json, bad weights."""


class UnsupportedModel(ModelError):
    """No family describes this architecture, or it asks for a feature that is not there."""


class CheckpointError(ModelError):
    """A checkpoint's files are missing, damaged, or do not fit the network. Names file and tensor."""


class CapacityError(QuireError):
    """The machine has too little memory for what was asked."""


class RequestFailed(QuireError):
    """The engine accepted a request and could not finish it, for example because its logits were NaN."""


class RequestCancelled(RequestFailed):
    """Whoever runs the server ended the request."""


class EngineCrash(RequestFailed):
    """The engine died each time it computed this request, in the end while it computed nothing else."""


class Overloaded(QuireError):
    """There is no room for a request now; nothing of it was computed.

    Attributes:
        retry_after_s: when there is expected to be room again.
        scope: "tenant" if others may still be served, else "server".
        reason: the limit that was reached, by its name.
    """

    def __init__(self, message: str, *, retry_after_s: int, scope: str, reason: str):
        super().__init__(message)
        self.retry_after_s, self.scope, self.reason = retry_after_s, scope, reason


class EngineDead(QuireError):
    """The engine stopped; no request can be served until it is started again."""


class PeerLost(QuireError):
    """Another process of this one's group died or did not answer in time. The group has to be started again."""
