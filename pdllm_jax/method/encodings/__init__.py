"""Step 4: encodings, ways to compute the KV of the chosen chunks. `base.py` has the protocol."""

from __future__ import annotations

from pdllm_jax.method.encodings.base import Encoded, EncodeRequest, Encoding, Independent
from pdllm_jax.method.encodings.bridge import Bridge, BridgeTokens
from pdllm_jax.method.encodings.joint import Joint, QueryConditioned

ENCODINGS: dict[str, type[Encoding]] = {
    encoding.name: encoding for encoding in (Independent, QueryConditioned, Joint, Bridge)
}

__all__ = ["ENCODINGS", "Bridge", "BridgeTokens", "EncodeRequest", "Encoded", "Encoding"]
