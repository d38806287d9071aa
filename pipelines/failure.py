"""The one exception of reading and decoding: caught in one place and turned into a row."""

from pipelines.schema import Status


class DecodeFailure(Exception):  # noqa: N818 - becomes a row
    """A video, or a clip of it, that cannot be shown.

    Attributes:
        status: The row's status.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status

    def __reduce__(self) -> tuple[type["DecodeFailure"], tuple[Status, str]]:
        return type(self), (self.status, str(self))


class FFmpegFailure(DecodeFailure):
    """One that another build of FFmpeg may not share: a decoder is missing, or refuses the data."""
