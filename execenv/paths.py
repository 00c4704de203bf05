"""`PathUri`: the `file:` URIs that stand for every path on the wire (machine).

The rules are section 6 of the protocol: URIs are read as the WHATWG URL standard says, and a path that
has no ordinary URI travels as `file:///%00/bad/path/<base64>`, an opaque token. Everything here is
lexical: no file is looked at, and no operation depends on the operating system except `to_native`.

Where this differs from release 0.169.0, on purpose:

- Absolute native paths are accepted by `parse`; older clients send them.
- A POSIX path whose first name looks like a drive (`/C:/x`), which 0.169.0 cannot express, uses the
  fallback and comes back as it was.
- A drive never hides the host (`file://h/C:/x` keeps `h`), slashes before the first name are kept
  (`file:////a`), and only a drive at the root stops `..`: the current standard, not its older text.
- `|` never stands for the colon of a drive: `file:c|/x` is `/c|/x`, as `file:///c|/x` is everywhere.
- Host names outside ASCII and odd spellings of IPv4 addresses are refused, not converted. No URI with a
  host is a path of a POSIX host anyway.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Iterable

from attrs import frozen

__all__ = ["ForeignPathError", "PathUri", "PathUriError"]

_HOST_OS = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
_FALLBACK = "file:///%00/bad/path/"
_RELATIVE = "invalid URI: relative URL without a base"
_POSIX_ROOT = "file://"

# What stays unescaped in output; `%` does too in a URI, where it may begin an escape.
_SAFE = r"!$&'()*+,\-./0-9:;=@A-Z\[\]^_a-z|~"
_UNSAFE_IN_NATIVE = re.compile(rf"[^{_SAFE}]".encode())
_UNSAFE_IN_URI = re.compile(rf"[^{_SAFE}%]".encode())
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")

# Text that `parse` would give back unchanged, once it is known to hold no dot segment.
_CANONICAL = re.compile(rf"file:///[{_SAFE}]*(?:%(?!00|2[Ee])[{_SAFE}]*)*")
_DOT_SEGMENT = re.compile(r"/\.\.?(?:/|\Z)")
_NATIVE_DOT_SEGMENT = re.compile(rb"/\.\.?(?:/|\Z)")

_BLANKS = "".join(map(chr, range(0x21)))
_REMOVED = dict.fromkeys(map(ord, "\t\n\r"))
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_QUERY_OR_FRAGMENT = re.compile(r"[?#].*", re.DOTALL)
_HOST = re.compile(rb"[!\"$&'()*+,\-.0-9;=A-Z_`a-z{}~]+")
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")

# Only the plain spelling is a drive to the URL standard. No host takes the escaped one for a POSIX name.
_PLAIN_DRIVE = re.compile(r"[A-Za-z]:")
_DRIVE = re.compile(r"[A-Za-z](?::|%3[Aa])")
_FOREIGN = re.compile(rf"file://(?:[^/]|/+{_DRIVE.pattern}(?:/|\Z))")
_WINDOWS_ABSOLUTE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DRIVE_PATH = re.compile(r"([A-Za-z]:)[\\/](.*)", re.DOTALL)
_UNC_PATH = re.compile(r"[\\/]{2}([^\\/]+)[\\/]([^\\/]+)(.*)", re.DOTALL)


class PathUriError(ValueError):
    """The text is no path URI, or the operation has no answer for this one; the message is for the wire."""


class ForeignPathError(ValueError):
    """The URI is well formed but names no path of this host; the message is for the wire."""


@frozen
class PathUri:
    """An absolute path as canonical `file:` URI text.

    Make one with `parse`, `from_native` or `from_windows`, which check; equality compares the text, so
    two spellings of one file (`%2F`, a trailing or doubled slash) are two values. `name`, `parent` and
    `join` work on URI segments: `%2F` does not separate, and a fallback is opaque to them.
    """

    uri: str

    @classmethod
    def parse(cls, text: str) -> PathUri:
        r"""Reads a `file:` URI, or an absolute native path (`/a/b`, `C:\x`, `C:/x`, `\\host\share\f`).

        Dot segments are resolved before any file access; escapes stay as they are written. A native path
        is taken literally: `?`, `#`, `%` and blanks in it belong to the name.

        Raises:
            PathUriError: if the text is neither, with the text of protocol section 6 (code -32602). That
                includes an escaped NUL outside a well-formed fallback. Other schemes are not read beyond
                their name.
        """
        if _CANONICAL.fullmatch(text) and not _DOT_SEGMENT.search(text):
            return cls(text)
        if text.startswith("/"):
            return cls.from_native(_utf8(text))
        if _WINDOWS_ABSOLUTE.match(text):
            return cls.from_windows(text)
        return cls(_canonical_uri(text))

    @classmethod
    def from_native(cls, path: bytes | str) -> PathUri:
        """The URI of an absolute POSIX path; `str` means what it means to `os`.

        `.` and `..` are resolved lexically, as no URI can hold them; any other path comes back from
        `to_native` byte for byte. One with NUL, or with a drive like `C:` for a first name, gets the
        fallback.

        Raises:
            PathUriError: if the path is relative, or a `str` no file name can be (unpaired surrogates).
        """
        try:
            path = os.fsencode(path)
        except UnicodeEncodeError:
            raise PathUriError("invalid URI: unpaired surrogate") from None
        if not path.startswith(b"/"):
            raise PathUriError(_RELATIVE)
        if b"\0" in path:
            return cls(_fallback_uri(path))
        if _NATIVE_DOT_SEGMENT.search(path):
            return cls(_unambiguous(_build_native(_POSIX_ROOT, path.split(b"/"))))
        return cls(_unambiguous(_POSIX_ROOT + _quote(path)))

    @classmethod
    def from_windows(cls, path: str) -> PathUri:
        r"""The URI of an absolute Windows path, from its text alone: `C:\x` or `\\host\share\x`.

        `/` separates like a backslash; `.` and `..` are resolved below the drive or share. The fallback is
        used for `\\?\` and `\\.\` paths, NUL, unpaired surrogates, and hosts a URI would not keep.

        Raises:
            PathUriError: if the path is relative; that includes `C:x` and `\x`, which need a drive.
        """
        split = _split_windows(path)
        if split is None:
            return cls(_fallback_uri(path.encode("utf-16-le", "surrogatepass")))
        root, rest = split
        return cls(_build_native(root, rest.encode().replace(b"\\", b"/").split(b"/")))

    def to_native(self) -> bytes:
        """The path as bytes for this (POSIX) host.

        Raises:
            ForeignPathError: for a drive, a host, or a fallback that this class would not have made. File
                system methods answer -32600 with the message, `process/start` wraps it in its own text and
                answers -32602. A fallback that holds NUL raises this too, with the other message of
                section 6: no caller could use the bytes, and the code is the same. They can be had from
                `fallback_payload`.
        """
        payload = self.fallback_payload
        if payload is not None:
            if not payload.startswith(b"/") or PathUri.from_native(payload) != self:
                raise ForeignPathError(_invalid(self.uri))
            if b"\0" in payload:
                raise ForeignPathError("file name contained an unexpected NUL byte")
            return payload
        if _FOREIGN.match(self.uri):
            raise ForeignPathError(_invalid(self.uri))
        return _unquote(self.uri[len(_POSIX_ROOT) :].encode())

    @property
    def text(self) -> str:
        r"""The path as its own system writes it: `/a/b`, `C:\a`, `\\host\share\a`. A fallback stays a URI."""
        if self.is_fallback:
            return self.uri
        path = os.fsdecode(_unquote(self.uri[len(_POSIX_ROOT) :].encode()))
        if not _FOREIGN.match(self.uri):
            return path
        if path.startswith("/"):
            return path.lstrip("/").replace("/", "\\")
        return "\\\\" + path.replace("/", "\\")

    @property
    def is_fallback(self) -> bool:
        """Whether this is an opaque token for a path that has no ordinary URI."""
        return self.uri.startswith(_FALLBACK)

    @property
    def fallback_payload(self) -> bytes | None:
        """What a fallback wraps, POSIX bytes or UTF-16LE; None for an ordinary URI."""
        return _decode_fallback(self.uri) if self.is_fallback else None

    @property
    def name(self) -> str:
        """The last name, decoded as `os.fsdecode` does; empty at a root and for a fallback."""
        segments = self._split()[1]
        return _unquote(segments[-1].encode()).decode("utf-8", "surrogateescape") if segments else ""

    def parent(self) -> PathUri | None:
        """The directory this is in; None for a fallback and at a root (`/`, a drive, a UNC share)."""
        root, segments = self._split()
        return PathUri(_build(root, segments[:-1])) if segments else None

    def join(self, *segments: str | bytes) -> PathUri:
        r"""This path with relative paths appended; bytes are for names that are not UTF-8.

        `/` separates within a segment, and so does a backslash below a drive or host. `..` removes one
        name and stops at the root, drive or share. Trailing and doubled slashes are dropped.

        Raises:
            PathUriError: if this is a fallback, or a segment is absolute, begins with a drive (below a
                drive or host), or holds NUL or an unpaired surrogate.
        """
        if self.is_fallback:
            raise PathUriError(_invalid(self.uri))
        root, names = self._split()
        for segment in segments:
            names = _append(names, _relative_parts(segment, windows=root != _POSIX_ROOT))
        uri = _build(root, names)
        return PathUri(_unambiguous(uri) if root == _POSIX_ROOT else uri)

    def _split(self) -> tuple[str, list[str]]:
        """The root, without its slash, and the names below it; both stay escaped."""
        if self.is_fallback:
            return self.uri, []
        host, _, path = self.uri[len(_POSIX_ROOT) :].partition("/")
        names = [name for name in path.split("/") if name]
        if names and host:
            return f"file://{host}/{names[0]}", names[1:]
        if names and _DRIVE.fullmatch(names[0]):
            return f"file:///{names[0]}", names[1:]
        return _POSIX_ROOT + host, names

    def __str__(self) -> str:
        return self.uri


def _canonical_uri(text: str) -> str:
    """Reads a URI as the URL standard does, with the refusals of protocol section 6 in its order."""
    text = text.strip(_BLANKS).translate(_REMOVED)
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise PathUriError(_RELATIVE)
    if scheme[1].lower() != "file":
        raise PathUriError(f"unsupported path URI scheme `{scheme[1].lower()}`")
    body = _QUERY_OR_FRAGMENT.sub("", text[scheme.end() :])
    host, path = _split_authority(body.replace("\\", "/"))
    end = text[scheme.end() + len(body) :]
    if end.startswith("?"):
        raise PathUriError("query parameters are not allowed in path URIs")
    if end:
        raise PathUriError("fragments are not allowed in path URIs")
    escaped = _UNSAFE_IN_URI.sub(_escape, _utf8(path)).decode("ascii")
    uri = f"file://{host}/" + "/".join(_resolve_uri(escaped.split("/")))
    if "%00" in uri and _decode_fallback(uri) is None:
        raise PathUriError(_invalid(uri))
    return uri


def _split_authority(body: str) -> tuple[str, str]:
    """The canonical host, empty for this one, and the path without its first slash."""
    if not body.startswith("//"):
        return "", body.removeprefix("/")
    authority, slash, path = body[2:].partition("/")
    if _PLAIN_DRIVE.fullmatch(authority):
        return "", authority + slash + path
    return _canonical_host(authority), path


def _canonical_host(text: str) -> str:
    if text.startswith("["):
        return _canonical_ipv6(text)
    data = _unquote(_utf8(text))
    if data and not _HOST.fullmatch(data):
        raise PathUriError("invalid URI: invalid international domain name")
    host = data.decode("ascii").lower()
    if _ENDS_IN_NUMBER.fullmatch(host) and not _IPV4.fullmatch(host):
        raise PathUriError("invalid URI: invalid IPv4 address")
    return "" if host == "localhost" else host


def _canonical_ipv6(text: str) -> str:
    import ipaddress  # takes longer to import than this module, for hosts that are hardly ever seen

    try:
        if not text.endswith("]") or "%" in text:
            raise ValueError(text)
        return f"[{ipaddress.IPv6Address(text[1:-1]).compressed}]"
    except ValueError:
        raise PathUriError("invalid URI: invalid IPv6 address") from None


def _split_windows(path: str) -> tuple[str, str] | None:
    """The root, as `_build` takes it, and the path below it; None if no URI can say the same."""
    drive = _DRIVE_PATH.fullmatch(path)
    unc = _UNC_PATH.fullmatch(path)
    if drive is None and unc is None:
        raise PathUriError(_RELATIVE)
    if "\0" in path or _SURROGATE.search(path):
        return None
    if drive:
        return f"file:///{drive[1]}", drive[2]
    if unc and _is_plain_share(unc[1], unc[2]):
        return f"file://{unc[1].lower()}/{_quote(unc[2].encode())}", unc[3]
    return None


def _is_plain_share(host: str, share: str) -> bool:
    """Whether a UNC share means the same in a URI; a host `localhost` would turn into no host at all."""
    try:
        return not {host, share} & {".", ".."} and _canonical_host(host) == host.lower()
    except PathUriError:
        return False


def _resolve_uri(segments: list[str]) -> list[str]:
    """Dot segments by the URL standard: an empty name counts as one, a drive at the root stays."""
    resolved: list[str] = []
    plain = ""
    for segment in segments:
        plain = segment.lower().replace("%2e", ".")
        if plain == "..":
            if resolved and not (len(resolved) == 1 and _PLAIN_DRIVE.fullmatch(resolved[0])):
                resolved.pop()
        elif plain != ".":
            resolved.append(segment)
    return [*resolved, ""] if plain in {".", ".."} else resolved


def _append(names: list[str], parts: Iterable[bytes]) -> list[str]:
    """Dot segments as a file system sees them: empty names do not count."""
    names = list(names)
    for part in parts:
        if part == b"..":
            del names[-1:]
        elif part not in {b"", b"."}:
            names.append(_quote(part))
    return names


def _relative_parts(segment: str | bytes, *, windows: bool) -> list[bytes]:
    data = _utf8(segment) if isinstance(segment, str) else segment
    if windows:
        data = data.replace(b"\\", b"/")
    if b"\0" in data:
        raise PathUriError(_invalid(data.decode("utf-8", "replace")))
    if data.startswith(b"/") or (windows and data[:1].isalpha() and data[1:2] == b":"):
        raise PathUriError(
            f"path `{data.decode('utf-8', 'replace')}` must be relative when joining a path URI"
        )
    return data.split(b"/")


def _build(root: str, names: list[str]) -> str:
    return f"{root}/" + "/".join(names)


def _build_native(root: str, parts: list[bytes]) -> str:
    """Keeps a trailing slash, and puts one where a dot segment ended the path: it named a directory."""
    names = _append([], parts)
    trailing = "/" if names and parts[-1] in {b"", b".", b".."} else ""
    return _build(root, names) + trailing


def _unambiguous(uri: str) -> str:
    """The URI of a POSIX path, wrapped if it would be read as a Windows one."""
    return _fallback_uri(_unquote(uri[len(_POSIX_ROOT) :].encode())) if _FOREIGN.match(uri) else uri


def _fallback_uri(payload: bytes) -> str:
    return _FALLBACK + base64.urlsafe_b64encode(payload).rstrip(b"=").decode("ascii")


def _decode_fallback(uri: str) -> bytes | None:
    """The payload, or None unless the text is exactly what `_fallback_uri` makes."""
    if not uri.startswith(_FALLBACK):
        return None
    encoded = uri[len(_FALLBACK) :]
    try:
        payload = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except ValueError:
        return None
    return payload if payload and _fallback_uri(payload) == uri else None


def _invalid(text: str) -> str:
    return f"'{text}' is invalid on '{_HOST_OS}'"


def _utf8(text: str) -> bytes:
    """UTF-8, where a surrogate from `os.fsdecode` or `PathUri.name` is its byte again."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise PathUriError("invalid URI: unpaired surrogate") from None


def _quote(data: bytes) -> str:
    return _UNSAFE_IN_NATIVE.sub(_escape, data).decode("ascii")


def _escape(match: re.Match[bytes]) -> bytes:
    return b"%%%02X" % match[0][0]


def _unquote(data: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), data) if b"%" in data else data
