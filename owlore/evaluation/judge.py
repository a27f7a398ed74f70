"""A model at an OpenAI-compatible endpoint that is asked one question at a time."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from htsr.errors import HtsrError, UsageError

TRIES, FIRST_WAIT, TIMEOUT, TOKENS = 4, 1.0, 300.0, 2048
WORTH_ANOTHER_TRY = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """An endpoint and the model to ask there.

    Args:
        url: Address of the endpoint, http(s)://.../v1.
        model: Name of the model.
        key: API key, which is never shown; None sends none.
        wait: Seconds before the second try; each further wait is twice as long.

    Raises:
        UsageError: The address is not http(s).
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    wait: float = FIRST_WAIT

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise UsageError(f"--judge-url got {self.url!r}, expected http(s)://.../v1")

    @property
    def address(self) -> str:
        """The address of chat completions."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def ask(self, system: str, user: str) -> str:
        """The text of the answer at temperature 0.

        Args:
            system: The system prompt.
            user: The user's message.

        Raises:
            HtsrError: The endpoint cannot be reached, refuses, or replies in another format.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        answer = self._send(request)
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise HtsrError(f"the judge at {self.url} answered {answer[:80]!r}, expected a chat completion") from error

    def _send(self, request: urllib.request.Request) -> bytes:
        """The body of the reply; failures that may be temporary are retried."""
        why = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                with error:
                    why = f"HTTP {error.code} {error.reason}"
                if error.code not in WORTH_ANOTHER_TRY:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why = str(getattr(error, "reason", error))
        raise HtsrError(
            f"the judge at {self.url} gave no answer ({why}); what was judged is kept, run the same command to go on"
        )


def judge_from(url: str | None, model: str | None, key_variable: str | None) -> Judge | None:
    """The judge of the command line.

    Args:
        url: --judge-url.
        model: --judge-model.
        key_variable: --judge-key-env, the environment variable with the key.

    Returns:
        The judge, or None if no option is given.

    Raises:
        UsageError: Only some of the options are given, or the variable is not set.
    """
    if url is None and model is None:
        if key_variable is not None:
            raise UsageError("--judge-key-env was given without --judge-url and --judge-model")
        return None
    if url is None or model is None:
        raise UsageError("got one of --judge-url and --judge-model, expected both")
    if key_variable is not None and not os.environ.get(key_variable):
        raise UsageError(f"--judge-key-env {key_variable}: the variable is not set; expected the endpoint's key in it")
    return Judge(url=url, model=model, key=os.environ.get(key_variable) if key_variable else None)
