"""Whether the Hugging Face hub answers, asked once, before the libraries that fetch from it are let loose.

They try for half a minute, and print every attempt, before they say that there is no connection. Knows nothing of
models or data sets.
"""

from __future__ import annotations

from functools import cache

SECONDS = 5.0
"""How long to wait for an answer, whatever it is."""


@cache
def reachable() -> bool:
    """Whether the hub answers; False where HF_HUB_OFFLINE says not to ask. What was fetched before is there anyway.

    Proxies and certificates are those that the libraries themselves use.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # no name, no route, no certificate, offline mode: every layer has errors of its own
        return False
    return True
