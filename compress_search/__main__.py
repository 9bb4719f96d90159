"""``python -m compress_search``: the command line where its script is not on the path."""

from __future__ import annotations

from compress_search.cli import main

main(prog_name="compress-search")
