"""What a request is refused with: an HTTP status, a gRPC code, a reason."""

from __future__ import annotations

import grpc

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Refusal(Exception):
    """A request that gets no boxes, and why.

    Args:
        status: HTTP status of the answer.
        reason: what the caller reads; one line, without anything of the picture.
        retry_after: seconds until it is worth asking again.
    """

    def __init__(
        self, status: int, reason: str, retry_after: int | None = None
    ) -> None:
        super().__init__(" ".join(reason.split()))
        self.status = status
        self.retry_after = retry_after

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status that means the same."""
        return _CODES.get(self.status, grpc.StatusCode.INTERNAL)

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer: Retry-After, if there is one."""
        return (
            {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        )


def bad(reason: str) -> Refusal:
    """400: the request itself is wrong, asking again does not help."""
    return Refusal(400, reason)
