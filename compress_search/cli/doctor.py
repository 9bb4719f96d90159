"""The command that looks at the machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compress_search.cli.common import FilePath, load_study


@click.command()
@click.option("--study", "path", type=FilePath, help="Also look whether this study's database and cluster answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option("--quick", is_flag=True, help="Leave out the half minute that trying torch.compile takes.")
def doctor(path: Path | None, as_json: bool, quick: bool) -> None:
    """Show versions, devices, real kernels, and what is broken.

    A kernel is real where a short timing finds it worth using: it takes at most 1.05 times as long as what it
    stands in for (float32 in the same engine), and weight-only ones, which save memory, at most 1.5 times. Others
    are real where they are there: int8-exact (sums of 8-bit products come out exact), onnx-cuda (ONNX Runtime has
    its CUDA provider) and compile (there is what it needs; the time is an example's, against eager torch). Studies
    whose objectives depend on time are offered what is real. Ends with 1 if something that every study needs is
    broken.

    \b
    Examples:
      compress-search doctor
      compress-search doctor --quick --json
    """
    from compress_search.doctor import examine, require_sound
    from compress_search.report import terminal

    found = examine(load_study(path) if path else None, quick=quick)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        terminal.show(*terminal.doctor_tables(found))
    require_sound(found)
