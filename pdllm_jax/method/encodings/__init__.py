"""Step 4: encodings, what chunk KV is computed from. `base.py` says how to write one."""

from __future__ import annotations

from pdllm_jax.method.encodings.base import Encoding
from pdllm_jax.method.encodings.bridge import Bridge, BridgeTokens
from pdllm_jax.method.encodings.independent import Independent
from pdllm_jax.method.encodings.joint import Joint
from pdllm_jax.method.encodings.query_conditioned import QueryConditioned

ENCODINGS: dict[str, type[Encoding]] = {
    encoding.name: encoding for encoding in (Independent, QueryConditioned, Joint, Bridge)
}

__all__ = [
    "ENCODINGS",
    "Bridge",
    "BridgeTokens",
    "Encoding",
    "Independent",
    "Joint",
    "QueryConditioned",
]
