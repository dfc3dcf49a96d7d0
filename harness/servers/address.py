"""Where a server is. Its address may hold credentials: they go with requests and appear nowhere else."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from harness.errors import UsageError
from harness.files.shown import without_credentials

ENDPOINT = "openai/"
"""What the name of a model behind a server begins with."""
OPENAI = "https://api.openai.com/v1"
_AT = " at "


def with_server(name: str) -> str:
    """`openai/<model>` as records name it: with the address of a server that is not OpenAI's, since servers give their models
    any name. Raises UsageError where $OPENAI_BASE_URL is no address."""
    here = os.environ.get("OPENAI_BASE_URL")
    where = Address.at(here, "model").shown if here else OPENAI
    return name if _AT in name or where == OPENAI else f"{name}{_AT}{where}"


def model_and_server(name: str) -> tuple[str, str | None]:
    """The model of `openai/<model>`, and of a name as records have it the server, with the credentials that $OPENAI_BASE_URL may
    hold; None where the name does not say one."""
    model, _, where = name.removeprefix(ENDPOINT).partition(_AT)
    return model, with_credentials(where or None)


def with_credentials(kept: str | None) -> str | None:
    """A record keeps where a server is without credentials; $OPENAI_BASE_URL may hold them."""
    here = os.environ.get("OPENAI_BASE_URL")
    return here if here and kept and without_credentials(here).rstrip("/") == kept else kept


@dataclass(frozen=True)
class Address:
    """Where requests go, and what goes with them that nobody may see."""

    url: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    shown: str
    secrets: Sequence[str]

    @classmethod
    def at(cls, address: str, whose: str) -> Address:
        """Raises UsageError, which does not repeat the address, where it is none."""
        wrong = UsageError(
            f"the {whose}'s server has no valid address; give one as in http://HOST:PORT/v1, and in its user name and "
            "password / ? # @ as %2F %3F %23 %40"
        )
        try:
            parts = urlsplit(address.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            raise wrong from None
        if (
            parts.scheme.lower() not in ("http", "https")
            or not host
            or "@" in parts.path + parts.query + parts.fragment
        ):
            raise wrong
        name, word = unquote(parts.username or ""), unquote(parts.password or "")
        basic = base64.b64encode(f"{name}:{word}".encode()).decode()
        place = f"[{host}]" if ":" in host else host
        url = f"{parts.scheme}://{place}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"
        query = dict(parse_qsl(parts.query))
        return cls(
            url,
            query,
            {"Authorization": f"Basic {basic}"} if name or word else {},
            without_credentials(f"{url}?{parts.query}" if parts.query else url),
            [secret for secret in (word or name, parts.password or "", basic, *query.values()) if secret],
        )

    def hide(self, text: str, *more: str) -> str:
        """`text` as it may be shown, whatever of the credentials, or of `more` of them, a server repeats in it."""
        text = re.sub(r"([?&][\w.-]+)=[^\s&'\"]+", r"\1=***", without_credentials(text))
        for secret in sorted({part for s in (*self.secrets, *more) for part in (s, unquote(s))}, key=len, reverse=True):
            if len(secret) > 3:  # else it is a part of usual words, as one below 8 letters may be
                before, behind = (r"(?<!\w)", r"(?!\w)") if len(secret) < 8 else ("", "")
                text = re.sub(f"{before}{re.escape(secret)}{behind}", "***", text)
        return text
