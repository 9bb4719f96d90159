"""Writes the quickstart's data: sentences of docstrings of installed libraries, labelled by their library.

    python studies/quickstart_data.py DIRECTORY

Real text without a download: the sources lie in the environment already. They are parsed, never imported. Names
of the libraries are masked. A row is one sentence, or a few neighbouring ones where they are short; it is used
once, one that two libraries share not at all, and all rows of a file are in one split. The same versions give the
same files, byte for byte.
Knows nothing of how a model is trained on them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

# all come with compress-search: by themselves, with torch (networkx, sympy) or with seqeval (sklearn)
LIBRARIES = ("networkx", "plotly", "ray", "sklearn", "sqlalchemy", "sympy", "torch", "transformers")
MASK = "library"
"""What stands where a library was named."""
SPLITS = {"train": 780, "validation": 130, "test": 260}
"""Rows of each library, or fewer where it has no more."""
WORDS = range(25, 61)
"""How long a row is."""
PER_FILE = 30
"""At most so many rows of a file: the more files, the more of a library's subjects are heard."""
BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)
"""What definitions can stand in."""
SKIPPED = {"tests", "testing", "test", "_vendor", "thirdparty", "thirdparty_files", "externals", "generated"}

# long names are masked inside other words too (PyTorch, TorchScript); "ray" would be found in "array"
_INSIDE = re.compile(
    r"\w*?(?:huggingface|matplotlib|networkx|numpy|pandas|plotly|scikit|scipy|sklearn|sqlalchemy|sympy|tensorflow"
    r"|torch|transformers)",
    re.IGNORECASE,
)
_WORD = re.compile(r"\b_*(?:aten|hf|np|nx|pd|px|ray|rllib|sa|sk|sp|tf|tune)(?:\b|(?=_))", re.IGNORECASE)
_RAY = re.compile(r"\b_*Ray(?=[A-Z])")
_MARKUP = re.compile(r":\w+(?::\w+)*:`~?\.?([^`<]*)[^`]*`|``?([^`]+)``?_*|\[`?~?([^\]`]+)`?\](?:\([^)]*\))?")
_NO_PROSE = re.compile(r"^\s*(>>>|\.\.|\||\+-|- |\* |[A-Z]\w+:\s)|::\s*$|\n\s*[-=~]{3,}|^\s*\w+ ?: ", re.MULTILINE)
_PROSE = re.compile(r"[A-Z][^<>{}\[\]|=\\]*[.!?]")
_END = re.compile(r"(?<=[a-z)][.!?])\s+(?=[A-Z])")


class Row(NamedTuple):
    """A text and where it stands."""

    text: str
    label: str
    file: str

    @property
    def key(self) -> str:
        """What makes it the same as another: its letters."""
        return re.sub(r"[^a-z]+", " ", self.text.lower()).strip()


def sources(library: str) -> list[tuple[str, Path]]:
    """The library's modules as (path below the library, path), in an order that depends on names alone."""
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{library} is not installed: install compress-search first")
    root = Path(spec.submodule_search_locations[0])
    found = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    kept = [(f"{library}/{name.as_posix()}", path) for name, path in found if not SKIPPED & set(name.parts)]
    return sorted(kept, key=lambda pair: _shuffle(pair[0]))


def docstrings(source: str) -> Iterator[str]:
    """Every docstring of a module's source; none where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        # nothing is documented inside an expression, and most of a module is expressions
        waiting += (child for child in ast.iter_child_nodes(node) if isinstance(child, BLOCKS))


def passages(docstring: str) -> Iterator[str]:
    """Neighbouring sentences of a paragraph of plain prose, joined until they are long enough."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        passage = ""
        for sentence in sentences(paragraph):
            passage = f"{passage} {sentence}".lstrip()
            if len(passage.split()) >= WORDS.start:
                if len(passage.split()) in WORDS:
                    yield passage
                passage = ""


def sentences(paragraph: str) -> Iterator[str]:
    """Its sentences of five to forty words; none where it is code, a table, a signature or a list."""
    if _NO_PROSE.search(paragraph):
        return
    plain = _MARKUP.sub(lambda match: next(filter(None, match.groups()), ""), " ".join(paragraph.split()))
    for sentence in _END.split(plain):
        if 5 <= len(sentence.split()) <= 40 and _PROSE.fullmatch(sentence):
            yield sentence


def mask(text: str) -> str:
    """The text with the names of all libraries replaced by one neutral word."""
    for pattern in (_INSIDE, _RAY, _WORD):
        text = pattern.sub(MASK, text)
    return text


def read(library: str) -> list[Row]:
    """Different rows of a library, a few of each file, from as many files as it takes to fill the splits."""
    enough = round(1.2 * sum(SPLITS.values()))  # some are other libraries' too
    rows: dict[str, Row] = {}
    for name, path in sources(library):
        texts = chain.from_iterable(map(passages, docstrings(path.read_text(encoding="utf-8", errors="replace"))))
        found = {row.key: row for row in (Row(mask(text), library, name) for text in texts)}
        rows.update(islice(((key, row) for key, row in found.items() if key not in rows), PER_FILE))
        if len(rows) >= enough:
            break
    return list(rows.values())


def unshared(found: Iterable[Row]) -> list[Row]:
    """The rows that only one library has."""
    found = list(found)
    libraries = Counter(row.key for row in found)
    return [row for row in found if libraries[row.key] == 1]


def split(found: Iterable[Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Rows of one library in splits of these sizes, every file in the split that is furthest from full."""
    files: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        files[row.file].append(row)
    parts: dict[str, list[Row]] = {name: [] for name in sizes}
    for group in files.values():
        emptiest = min(sizes, key=lambda name: len(parts[name]) / sizes[name])
        parts[emptiest] += group
    return {name: part[: sizes[name]] for name, part in parts.items()}


def build() -> dict[str, list[Row]]:
    """The three splits, shuffled."""
    with ProcessPoolExecutor() as pool:
        found = unshared(chain.from_iterable(pool.map(read, LIBRARIES)))
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for library in LIBRARIES:
        for name, part in split((row for row in found if row.label == library), SPLITS).items():
            parts[name] += part
    return {name: sorted(part, key=lambda row: _shuffle(row.text)) for name, part in parts.items()}


def _shuffle(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(directory: Path) -> dict[str, Counter[str]]:
    """Write ``<split>.jsonl`` and return how many rows each library has in each split."""
    parts = build()
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = (json.dumps(row._asdict(), ensure_ascii=False) for row in part)
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: Counter(row.label for row in part) for name, part in parts.items()}


def main(arguments: list[str]) -> None:
    """Write the files and say what is in them."""
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    for name, counts in write(Path(arguments[0])).items():
        print(f"{name}: {counts.total()} rows, " + ", ".join(f"{label} {counts[label]}" for label in LIBRARIES))


if __name__ == "__main__":
    main(sys.argv[1:])
