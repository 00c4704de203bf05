"""Which proxy a request goes through, by the variables that programs agree on. No `await` here."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from attrs import frozen

from execenv.local.urls import HttpUrl, UrlError, parse_http_url


class ProxyError(ValueError):
    """A proxy that cannot be used; the text has no credentials."""


@frozen
class ProxyRules:
    """The proxy of each scheme as it was configured, and the hosts that are reached without one."""

    proxies: dict[str, str]
    bypassed_hosts: frozenset[str] = frozenset()
    bypassed_networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> ProxyRules:
        """Of `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or the same in lower case.

        Not `HTTP_PROXY` in a CGI program: there it is the `Proxy` header of whoever asked.
        """

        def value(name: str) -> str:
            upper = "" if name == "HTTP_PROXY" and "REQUEST_METHOD" in variables else variables.get(name)
            return (upper or variables.get(name.lower()) or "").strip()

        proxies = {
            scheme: proxy
            for scheme in ("http", "https")
            if (proxy := value(f"{scheme.upper()}_PROXY") or value("ALL_PROXY"))
        }
        hosts, networks = set(), []
        for entry in value("NO_PROXY").split(","):
            name = entry.strip().lower()
            try:
                networks.append(ip_network(name.strip("[]"), strict=False))
            except ValueError:
                hosts.add(name.lstrip("."))
        return cls(proxies, frozenset(hosts - {""}), tuple(networks))

    def proxy_for(self, url: HttpUrl) -> HttpUrl | None:
        """The proxy to ask, `None` for the server itself.

        Raises:
            ProxyError: if the one that is configured cannot be used.
        """
        configured = self.proxies.get(url.scheme)
        if not configured or self._is_bypassed(url.host):
            return None
        try:
            return parse_http_url(configured if "://" in configured else f"http://{configured}")
        except UrlError as error:
            raise ProxyError(f"the proxy for {url.scheme} URLs is not a URL: {error}") from None
        except ValueError as error:
            raise ProxyError(f"the proxy for {url.scheme} URLs has an {error}") from None

    def _is_bypassed(self, host: str) -> bool:
        if "*" in self.bypassed_hosts:
            return True
        try:
            address = ip_address(host)
        except ValueError:
            labels = host.rstrip(".").split(".")
            return any(".".join(labels[at:]) in self.bypassed_hosts for at in range(len(labels)))
        return any(address in network for network in self.bypassed_networks)
