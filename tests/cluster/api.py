"""The Kubernetes API for a rig and its tests: one kept connection, dicts in and out, no client library.

What is tested brings a client of its own; checking it with the same one would hide that one's faults.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 10.0


class ApiError(Exception):
    """The API server refused; `reason` is its machine-readable word, such as NotFound."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason


class Api:
    """The API as one user sees it."""

    def __init__(
        self, url: str, *, ca_file: Path, token: str, timeout_s: float = TIMEOUT_S
    ) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "",
            parts.port,
            timeout=timeout_s,
            context=ssl.create_default_context(cafile=ca_file),
        )
        self._token = token
        self._one_at_a_time = threading.Lock()  # asynchronous tests ask from threads

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def create(self, path: str, what: Any) -> Any:
        return self.call("POST", path, what)

    def patch(self, path: str, what: Any) -> Any:
        """Change the fields named, by JSON merge patch; None removes one."""
        return self.call("PATCH", path, what, content_type="application/merge-patch+json")

    def delete(self, path: str, *, grace_s: int | None = None) -> Any:
        return self.call(
            "DELETE", path, None if grace_s is None else {"gracePeriodSeconds": grace_s}
        )

    def call(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json"
    ) -> Any:
        """Send one request; return the answer's JSON, or its text where it is not JSON.

        Raises:
            ApiError: the server refused.
            OSError: it did not answer.
        """
        data = None if body is None else json.dumps(body)
        with self._one_at_a_time:
            kept = self._connection.sock is not None
            try:
                response, text = self._exchange(method, path, data, content_type)
            except OSError as error:
                if not kept or isinstance(error, TimeoutError):
                    raise
                # A kept connection ends with the API server it was made to, or for being idle.
                response, text = self._exchange(method, path, data, content_type)
        is_json = response.headers.get_content_type() == "application/json"
        answer = json.loads(text) if is_json else text
        if response.status >= HTTPStatus.BAD_REQUEST:
            status = answer if isinstance(answer, dict) else {}
            raise ApiError(response.status, status.get("reason", ""), status.get("message", text))
        return answer

    def _exchange(
        self, method: str, path: str, data: str | None, content_type: str
    ) -> tuple[http.client.HTTPResponse, str]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": content_type}
        try:
            self._connection.request(method, path, data, headers)
            response = self._connection.getresponse()
            return response, response.read().decode()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()
