"""The middle of a relay, for who hosts one: a registry and a rendezvous on one port."""
