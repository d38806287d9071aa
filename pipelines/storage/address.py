"""Addresses of files: what of them may be shown and stored, and what is only for reading."""

import hashlib
from urllib.parse import urlsplit

# Where a file at such an address is read by `pipelines.storage`, and not from a disk.
REMOTE_SCHEMES = frozenset({"s3", "gs", "http", "https"})


def scheme_of(uri: str) -> str:
    """The scheme of an address, "" of a path."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else ""


def is_remote(uri: str) -> bool:
    """Whether the file is elsewhere."""
    return scheme_of(uri) in REMOTE_SCHEMES


def is_web(uri: str) -> bool:
    """Whether it is an http(s) address, the only kind that has a query."""
    return scheme_of(uri) in ("http", "https")


def public_address(uri: str) -> str:
    """The address without what may be a secret: user and password, query and fragment.

    This is what identifies a video and what is stored and shown. Keys of object stores and paths stand as they are:
    there a "?" is a letter.
    """
    if not is_remote(uri):
        return uri
    scheme, _, rest = uri.partition("://")
    if is_web(uri):
        rest = rest.partition("#")[0].partition("?")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// or gs:// address."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def place_of(uri: str) -> str:
    """Bucket or host of a file that is elsewhere, for people."""
    scheme, _, rest = public_address(uri).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def extension(uri: str) -> str:
    """Of the file's name, in lower case, with its dot; "" where there is none."""
    path = urlsplit(public_address(uri)).path if is_web(uri) else uri
    name = path.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def hash64(*parts: object) -> int:
    """64 bits that stand for an address or an identity where a million of them are held."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
