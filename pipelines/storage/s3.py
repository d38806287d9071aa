"""Amazon S3, and what speaks its protocol (AWS_ENDPOINT_URL): boto3, with its usual credentials or none at all."""

import functools
import os
from collections.abc import Iterator
from typing import Any

import boto3.session
import botocore.client
import botocore.exceptions
from botocore import UNSIGNED

from pipelines.schema import Status
from pipelines.storage.address import bucket_and_key, place_of
from pipelines.storage.store import CONNECT_S, STALL_S, Listed, Piece, StorageFailure, drained, refusal, retried

_CHUNK_BYTES = 1 << 16
_CONNECTIONS = 32
_PAGE_OBJECTS = 1000  # the most that S3 gives


_ON_THE_WAY = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,  # also where nobody listens
    botocore.exceptions.IncompleteReadError,
)


@functools.lru_cache(maxsize=1)
def _client(pid: int) -> Any:
    """The client of this process: a forked one must not go on with its parent's connections."""
    session = boto3.session.Session()
    config = botocore.client.Config(
        signature_version=None if session.get_credentials() else UNSIGNED,  # public buckets
        retries={"total_max_attempts": 1},  # we ask again ourselves, alike for all stores
        connect_timeout=CONNECT_S,
        read_timeout=STALL_S,
        max_pool_connections=_CONNECTIONS,
    )
    return session.client("s3", config=config)


def fetch(uri: str, start: int, length: int) -> Piece:
    """A range of an object.

    Raises:
        StorageFailure: There is none.
    """
    bucket, key = bucket_and_key(uri)
    try:
        found = _ask("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
    except _OutOfRange:
        found = _ask("head_object", Bucket=bucket, Key=key)
        return Piece(b"", found["ContentLength"], found["ETag"].strip('"'))
    try:
        data = drained(found["Body"].iter_chunks(_CHUNK_BYTES))
    except botocore.exceptions.BotoCoreError as error:
        raise _failure(error) from None
    finally:
        found["Body"].close()
    size_bytes = int(found["ContentRange"].rpartition("/")[2])
    return Piece(data, size_bytes, found["ETag"].strip('"'))


def listing(prefix: str) -> Iterator[Listed]:
    """Objects whose keys begin so, page by page.

    Raises:
        StorageFailure: A bucket that is not there or not ours to list.
    """
    bucket, key = bucket_and_key(prefix)
    token: dict[str, str] = {}
    while True:
        wanted = {"Bucket": bucket, "Prefix": key, "MaxKeys": _PAGE_OBJECTS} | token
        page = retried(functools.partial(_ask, "list_objects_v2", **wanted), place_of(prefix))
        for found in page.get("Contents", ()):
            yield Listed(f"s3://{bucket}/{found['Key']}", found["Size"], found["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


class _OutOfRange(Exception):  # noqa: N818 - an answer
    """The object ends before the range begins."""


def _ask(operation: str, **arguments: Any) -> dict[str, Any]:
    try:
        return getattr(_client(os.getpid()), operation)(**arguments)
    except botocore.exceptions.ClientError as error:
        answer = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if answer == 416:
            raise _OutOfRange from None
        raise refusal(answer, error.response.get("Error", {}).get("Code", "")) from None
    except botocore.exceptions.BotoCoreError as error:
        raise _failure(error) from None


def _failure(error: botocore.exceptions.BotoCoreError) -> StorageFailure:
    """What went wrong on the way. Only its kind is told: messages hold addresses."""
    name = type(error).__name__
    if isinstance(error, botocore.exceptions.ReadTimeoutError | botocore.exceptions.ConnectTimeoutError):
        return StorageFailure(Status.TIMEOUT, f"S3 does not answer in time: {name}", transient=True)
    transient = isinstance(error, _ON_THE_WAY)
    return StorageFailure(Status.MISSING, f"S3 cannot be asked: {name}", transient=transient)
