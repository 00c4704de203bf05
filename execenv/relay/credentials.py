"""The API key of an executor: where it is kept, and which registries may see it (relay.md §1.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from attrs import field, frozen

from execenv.errors import UsageError
from execenv.relay.addresses import InvalidUrl, parse_base_url, parse_url
from execenv.targets import MAX_TOKEN, is_token, read_token

VARIABLES = ("EXECENV_API_KEY", "CODEX_API_KEY")
"""In the order in which they are looked at."""

TRUSTED_DOMAINS = ("openai.com", "openai.org")


@frozen
class ApiKey:
    """An API key, or the file that holds it.

    Attributes:
        variable: the one that it was found in; `None` if it came otherwise.
    """

    bearer_token: str | None = field(default=None, repr=False)
    bearer_token_file: str | None = None
    bearer_token_env: None = None
    variable: str | None = None

    def read(self) -> str:
        """The key. A file is read now, so a new key there needs no restart.

        Raises:
            ConnectFailed: if the file has none; names it, and says nothing of what it holds.
        """
        return read_token(self) or ""


def find_api_key(
    *, file: str | None = None, stdin: BinaryIO | None = None, environ: Mapping[str, str]
) -> ApiKey:
    """The API key from the first that is there: the file, stdin (read to its end), `EXECENV_API_KEY`,
    `CODEX_API_KEY`. There is no argument for the key itself: all users of a machine can see those.

    Raises:
        UsageError: if there is none, or what is there is no key; does not quote it.
        ConnectFailed: if the file cannot be read, or holds none.
    """
    if file is not None:
        key = ApiKey(bearer_token_file=file)
        key.read()
        return key
    if stdin is not None:
        text = stdin.read(MAX_TOKEN + 1).decode(errors="replace")
        return ApiKey(_checked(text, "stdin"))
    for name in VARIABLES:
        if environ.get(name, "").strip():
            return ApiKey(_checked(environ[name], f"the variable {name}"), variable=name)
    raise UsageError(
        "the registry wants an API key: give --api-key-file or --api-key-stdin, or set "
        + " or ".join(VARIABLES)
    )


def _checked(text: str, source: str) -> str:
    key = text.strip()
    if not is_token(key) or len(key) > MAX_TOKEN:
        raise UsageError(f"{source} holds no API key: it should be one line of ASCII")
    return key


def check_destination(base_url: str, allow: Sequence[str] = ()) -> None:
    """See that the registry at that base URL may be shown an API key: the domains of `TRUSTED_DOMAINS` and
    those below them, by `https://`; this machine; and what is allowed.

    Args:
        allow: registries of one's own, each `HOST` or `HOST:PORT`, by `https://`: exactly that host, and port
            443 where none is named.

    Raises:
        UsageError: if it may not, is no URL, or if one of `allow` is none.
    """
    allowed = [_allowed(text) for text in allow]
    base = parse_base_url(base_url)
    if base.is_loopback:
        return
    domains = any(base.host == domain or base.host.endswith(f".{domain}") for domain in TRUSTED_DOMAINS)
    if not domains and (base.host, base.port) not in allowed:
        raise UsageError(
            f"an API key is not shown to the registry {base}: if that is yours, add --allow-registry "
            f"{base.authority}"
        )


def _allowed(text: str) -> tuple[str, int]:
    problem = f"--allow-registry takes HOST or HOST:PORT, and not {text!r}"
    if "://" in text or "/" in text or "?" in text or "@" in text:
        raise UsageError(problem)
    try:
        address = parse_url(f"https://{text}", ("https",))
    except InvalidUrl as error:
        raise UsageError(f"{problem}: it {error}") from None
    return address.host, address.port


def api_key_headers(key: ApiKey, base_url: str, allow: Sequence[str] = ()) -> Callable[[], Mapping[str, str]]:
    """What shows the key to one registry, for `open_registry`. The one way from a key to a header.

    Raises:
        UsageError: if that registry may not see it, see `check_destination`.
    """
    check_destination(base_url, allow)
    return lambda: {"authorization": f"Bearer {key.read()}"}
