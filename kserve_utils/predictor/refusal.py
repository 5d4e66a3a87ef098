"""What a request is refused with: an HTTP status, a gRPC code, a reason."""

from __future__ import annotations

from grpc import StatusCode
from grpc_interceptor.exceptions import GrpcException

_CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    429: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    503: StatusCode.UNAVAILABLE,
}


class Refusal(GrpcException):
    """A request that gets no boxes, and why; KServe's gRPC answers with it as it is.

    Args:
        status: HTTP status of the answer; a gRPC code follows from it.
        reason: what the caller reads; one line, without anything of the picture. It is
            cut after 1,000 characters: a value that it quotes may be 64 MB.
        retry_after: seconds until it is worth asking again.
    """

    def __init__(
        self, status: int, reason: str, retry_after: int | None = None
    ) -> None:
        code = _CODES.get(status, StatusCode.INTERNAL)
        super().__init__(" ".join(reason[:1000].split()), code)
        self.status, self.headers = status, {}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    def __str__(self) -> str:
        return self.details


def bad(reason: str) -> Refusal:
    """400: the request itself is wrong, asking again does not help."""
    return Refusal(400, reason)
