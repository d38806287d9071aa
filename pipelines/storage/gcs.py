"""Google Cloud Storage over its JSON interface, with application default credentials or none at all."""

import functools
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import google.auth
import google.auth.exceptions
import google.auth.transport.requests
import requests

from pipelines.schema import Status
from pipelines.storage.address import bucket_and_key, place_of
from pipelines.storage.store import CONNECT_S, STALL_S, Listed, Piece, StorageFailure, refusal, retried
from pipelines.storage.web import get_range

_SCOPES = ["https://www.googleapis.com/auth/devstorage.read_only"]


def fetch(uri: str, start: int, length: int) -> Piece:
    """A range of an object.

    Raises:
        StorageFailure: There is none.
    """
    bucket, key = bucket_and_key(uri)
    url = f"{_objects(bucket)}/{quote(key, safe='')}?alt=media"
    try:
        return get_range(_session(os.getpid()), url, start, length, ["X-Goog-Generation"])
    except google.auth.exceptions.GoogleAuthError as error:
        raise _unauthorized(error) from None


def listing(prefix: str) -> Iterator[Listed]:
    """Objects whose names begin so, page by page.

    Raises:
        StorageFailure: A bucket that is not there or not ours to list.
    """
    bucket, key = bucket_and_key(prefix)
    token = ""
    while True:
        page = retried(functools.partial(_page, bucket, key, token), place_of(prefix))
        for found in page.get("items", ()):
            yield Listed(f"gs://{bucket}/{found['name']}", int(found["size"]), found["generation"])
        token = page.get("nextPageToken", "")
        if not token:
            return


def _page(bucket: str, prefix: str, token: str) -> dict[str, Any]:
    fields = {"prefix": prefix, "pageToken": token, "fields": "nextPageToken,items(name,size,generation)"}
    try:
        response = _session(os.getpid()).get(_objects(bucket), params=fields, timeout=(CONNECT_S, STALL_S))
        if response.status_code != 200:
            raise refusal(response.status_code, response.reason or "")
        return response.json()
    except google.auth.exceptions.GoogleAuthError as error:
        raise _unauthorized(error) from None
    except (requests.RequestException, ValueError) as error:
        raise StorageFailure(Status.MISSING, f"GCS cannot be asked: {type(error).__name__}", transient=True) from None


def _objects(bucket: str) -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")  # as Google's own libraries
    return f"{host}/storage/v1/b/{bucket}/o"


@functools.lru_cache(maxsize=1)
def _session(pid: int) -> requests.Session:
    """Connections of this process."""
    if "STORAGE_EMULATOR_HOST" in os.environ:
        return requests.Session()
    try:
        credentials, _ = google.auth.default(scopes=_SCOPES)
    except google.auth.exceptions.DefaultCredentialsError:
        return requests.Session()  # public buckets
    return google.auth.transport.requests.AuthorizedSession(credentials)


def _unauthorized(error: Exception) -> StorageFailure:
    return StorageFailure(Status.MISSING, f"no access to GCS: {type(error).__name__}")
