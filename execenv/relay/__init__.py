"""Both ends of a relay: an environment that cannot be dialled, and who uses it.

`registry.py` asks the registry, with the key of `credentials.py`, at URLs that `addresses.py` reads. The
executor opens its websocket in `rendezvous.py` and serves what comes on it in `executor.py`; the harness does
both in `harness.py`. `streams.py` is what they have in common: channels by stream id, whose frames
(`frames.py`) are encrypted by `noise.py` with the keys of `keys.py`, and counted, acknowledged and sent again
by `reliable.py`. `extras.py` tells what is not installed. What is between the ends is `relay_service/`.
"""
