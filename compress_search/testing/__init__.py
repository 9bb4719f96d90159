"""What authors of methods test with: the plugin contract, tiny models and a Context that works.

Owns the public names; the engine imports nothing of it.
"""

from __future__ import annotations

from compress_search.testing.contract import CheckResult, MethodContract, check_method, checks
from compress_search.testing.rehearsal import ContractBroken
from compress_search.testing.tiny import TinyContext, tiny_batches, tiny_candidate, tiny_context, tiny_tokenizer

__all__ = [
    "CheckResult",
    "ContractBroken",
    "MethodContract",
    "TinyContext",
    "check_method",
    "checks",
    "tiny_batches",
    "tiny_candidate",
    "tiny_context",
    "tiny_tokenizer",
]
