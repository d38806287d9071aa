"""One video of an archive."""

from dataclasses import dataclass

from pipelines.storage.address import public_address


class ArchiveError(ValueError):
    """An archive that cannot be listed; one line that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One video of an archive.

    Attributes:
        uri: Absolute path or address, for reading; never to be stored or shown, since an address may be signed.
        label: Class, "" where the archive names none.
        split: "train", "val", "test" or whatever the table says; "" where it says nothing.
        size_bytes, version: Identity of the file, where the listing tells; version "" where it does not.
    """

    uri: str
    label: str = ""
    split: str = ""
    size_bytes: int = 0
    version: str = ""

    @property
    def address(self) -> str:
        """What names the video wherever something is written: the uri without its signature."""
        return public_address(self.uri)
