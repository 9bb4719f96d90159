"""What authors of methods test with: the plugin contract, tiny models and a Context that works.

Owns the public names; nothing here is imported by the engine.
"""

from __future__ import annotations

from compress_search.testing.tiny import TinyContext, tiny_batches, tiny_candidate, tiny_context, tiny_tokenizer

__all__ = ["TinyContext", "tiny_batches", "tiny_candidate", "tiny_context", "tiny_tokenizer"]
