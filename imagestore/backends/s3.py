"""A store in a bucket of an S3-compatible server, through boto3.

Credentials come the way that boto3's users expect (environment, profile, config files, instance roles).
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions as failures
import urllib3.exceptions
from botocore.config import Config

from imagestore.backends.protocol import Data, Etag, Object, ObjectStat, check_key, pieces
from imagestore.backends.web import STATUS, range_header, receive_range
from imagestore.backends.wrappers import Retried
from imagestore.errors import (
    Conflict,
    Corrupt,
    Denied,
    Invalid,
    NotFound,
    StoreError,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_READ_BYTES = 256 << 10
log = logging.getLogger(__name__)
_STATUS = STATUS | {412: Conflict, 501: Unsupported}
_CODES = {"QuotaExceeded": 507, "XMinioStorageFull": 507, "RequestTimeout": 503, "NotImplemented": 501}
_CODES |= {"RequestTimeTooSkewed": 403, "ExpiredToken": 403}
"""Errors that come under another status than they mean."""


class S3:
    """Objects below `prefix` in a bucket, one request per verb (a listing: one per 1,000 keys).

    Which conditions hold (`conditions`: none, put, or delete, which means both) is known from the caller or from
    `memory`, or found out by a probe the first time that it matters: reading never asks.
    """

    read_only = False

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
    ) -> None:
        config = Config(
            signature_version="s3v4",
            # Retrying is Retried's; boto3's checksum trailers are not understood by every server.
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        )
        authorities = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        try:
            session = boto3.session.Session(profile_name=profile, region_name=region)
            region = session.region_name or "us-east-1"
            self._client: S3Client = session.client(
                "s3", endpoint_url=endpoint_url, region_name=region, config=config, verify=authorities
            )
        except (failures.BotoCoreError, ValueError) as err:
            raise Invalid(f"s3://{bucket}: {err}") from err
        self._client.meta.events.register("after-call.s3", self._note_time)
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self.address = f"{self._client.meta.endpoint_url}/{bucket}"
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self.known: str | None = None
        self.memory: Any = None
        """A `store.index.LocalIndex`, if this machine is to remember what a probe found."""
        self._probing = threading.RLock()
        self._skew_s: float | None = None

    @property
    def conditional(self) -> bool:
        return self.conditions != "none"

    @property
    def conditions(self) -> str:
        """Raises what a probe meets."""
        with self._probing:
            kept = self.memory.recall("conditions") if self.memory and self.known is None else {}
            if kept.get(self.address) in ("put", "delete"):
                self.known = kept[self.address]
            if self.known is None:
                self.known = Retried(self).repeat(self._probe)
                if self.known == "none":
                    log.warning("%s has no conditional writes: one writer at a time may use it", self.address)
                elif self.memory:
                    self.memory.remember("conditions", kept | {self.address: self.known})
            return self.known

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        if length == 0:
            return Object(b"", self.stat(key))
        with self._errors(key):
            answer = self._client.get_object(**self._at(key), **range_header(start, length))  # type: ignore[arg-type]
            # By what it sent, not by 206: `rclone serve s3` sends the range under a 200.
            size, said = answer["ContentLength"], answer.get("ContentRange", "")
            # botocore's own read() waits for all of it, however slowly it comes.
            stream: Any = answer["Body"]._raw_stream  # type: ignore[attr-defined]
            parts = iter(lambda: stream.read1(_READ_BYTES), b"")
            with contextlib.closing(answer["Body"]):
                data, whole = receive_range(parts, start, length, size, said, f"{self.url}/{key}")
            return Object(data, ObjectStat(key, whole, _etag(answer), answer["LastModified"].timestamp()))

    def stat(self, key: str) -> ObjectStat:
        with self._errors(key):
            answer = self._client.head_object(**self._at(key))
            modified_s = answer["LastModified"].timestamp()
            return ObjectStat(key, answer["ContentLength"], _etag(answer), modified_s)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    yield ObjectStat(key, entry["Size"], _etag(entry), entry["LastModified"].timestamp())

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        body = b"".join(pieces(data))
        conditions: dict[str, Any] = {}
        if (if_match is not None or if_none_match) and self.conditional:
            conditions = {"IfNoneMatch": "*"} if if_match is None else {"IfMatch": f'"{if_match}"'}
        with self._errors(key):
            try:
                answer = self._client.put_object(**self._at(key), Body=body, **conditions)
            except failures.ClientError as err:
                # If-Match on what is not there (any more) is a 404, unless the bucket itself is gone.
                if conditions and err.response["Error"]["Code"] in ("NoSuchKey", "404"):
                    raise Conflict(f"{self.url}/{key} was removed by another writer") from err
                raise
            return ObjectStat(key, len(body), _etag(answer), self.now())

    def delete(self, key: str, *, if_match: Etag = None) -> None:
        if if_match is not None and self.conditions == "put":
            raise Unsupported(f"{self.url} has no conditional deletes")
        conditional = if_match is not None and self.conditional
        condition: dict[str, Any] = {"IfMatch": f'"{if_match}"'} if conditional else {}
        try:
            with contextlib.suppress(NotFound), self._errors(key):
                self._client.delete_object(**self._at(key), **condition)
        except Conflict:
            # What is not there matches no etag for some servers; for us it is deleted.
            with contextlib.suppress(NotFound):
                self.stat(key)
                raise

    def now(self) -> float:
        """The server's clock as of its last answer, and the time since."""
        if self._skew_s is None:
            with self._errors(""):
                self._client.head_bucket(Bucket=self._bucket)
        return time.monotonic() + (self._skew_s or 0.0)

    def close(self) -> None:
        self._client.close()

    def _probe(self) -> str:
        """Find out with an object of its own which conditions hold (7 requests). From the start if one is lost."""
        key, self.known = f"probe/{secrets.token_hex(8)}", "delete"
        try:
            etag = self.put(key, b"1", if_none_match=True).etag
            wrong = etag[:-4] + ("0000" if etag[-4:] != "0000" else "1111")
            created = self._refuses(lambda: self.put(key, b"2", if_none_match=True))
            if not (self._refuses(lambda: self.put(key, b"3", if_match=wrong)) and created):
                return "none"
            self.put(key, b"4", if_match=etag)
            return "delete" if self._refuses(lambda: self.delete(key, if_match=wrong)) else "put"
        except (Conflict, Unsupported, Invalid):
            return "none"
        finally:
            with contextlib.suppress(StoreError):
                Retried(self).delete(key)
            self.known = None

    @staticmethod
    def _refuses(action: Any) -> bool:
        try:
            action()
        except (Conflict, Unsupported) as err:
            return isinstance(err, Conflict)
        return False

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _note_time(self, http_response: Any, **_: Any) -> None:
        date = http_response.headers.get("date")
        if date:
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                self._skew_s = parsedate_to_datetime(date).timestamp() - time.monotonic()

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}"
        try:
            yield
        except failures.ClientError as err:
            status = int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code = err.response["Error"].get("Code", "")
            kind = _STATUS.get(_CODES.get(code, status), Unavailable)
            if code == "NoSuchBucket":
                raise NotFound(f"{self.address}: there is no such bucket", hint="make it first") from err
            text = "no such object" if kind is NotFound else err.response["Error"].get("Message") or code
            raise kind(f"{where}: {text}") from err
        except (failures.NoCredentialsError, failures.PartialCredentialsError, failures.SSLError) as err:
            raise Denied(f"{where}: {err}") from err
        except failures.ParamValidationError as err:
            raise Invalid(f"{where}: {err}") from err
        except (failures.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as err:
            raise Unavailable(f"{where}: {err}") from err
        except (KeyError, ValueError, TypeError, OverflowError) as err:
            # boto3 believes headers without a look.
            raise Corrupt(f"{where}: the server answers nonsense: {err}") from err


def _etag(answer: Any) -> str:
    """Without quotes, which some servers send with some verbs only."""
    return str(answer["ETag"]).strip('"')
