"""Writes the quickstart's data: sentences from docstrings of installed libraries, labelled by their library.

    python studies/quickstart_data.py DIRECTORY

Real text without a download: the sources lie in the environment already. They are parsed, never imported. Names
of the libraries are masked, a sentence is used once, one that two libraries share not at all, and all sentences
of a file are in one split. The same versions give the same files, byte for byte.
Knows nothing of how a model is trained on them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

# all come with compress-search: by themselves, with torch (networkx, sympy) or with seqeval (sklearn)
LIBRARIES = ("networkx", "plotly", "ray", "sklearn", "sqlalchemy", "sympy", "torch", "transformers")
MASK = "library"
"""What stands where a library was named."""
SPLITS = {"train": 750, "validation": 125, "test": 250}
"""Sentences of each library, or fewer where it has no more."""
PER_FILE = 10
"""At most so many sentences of a file: the more files, the more of a library's subjects are heard."""
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


class Sentence(NamedTuple):
    """One sentence and where it stands."""

    text: str
    label: str
    file: str

    @property
    def key(self) -> str:
        """What makes it the same sentence as another: its letters."""
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
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def sentences(docstring: str) -> Iterator[str]:
    """Sentences of twelve to forty words in plain prose: no code, tables, signatures or headings."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if _NO_PROSE.search(paragraph):
            continue
        plain = _MARKUP.sub(lambda match: next(filter(None, match.groups()), ""), " ".join(paragraph.split()))
        for sentence in _END.split(plain):
            if 12 <= len(sentence.split()) <= 40 and _PROSE.fullmatch(sentence):
                yield sentence


def mask(sentence: str) -> str:
    """The sentence with the names of all libraries replaced by one neutral word."""
    for pattern in (_INSIDE, _RAY, _WORD):
        sentence = pattern.sub(MASK, sentence)
    return sentence


def read(library: str) -> Iterator[Sentence]:
    """Different sentences of a library, a few of each file."""
    seen: set[str] = set()
    for name, path in sources(library):
        texts = chain.from_iterable(map(sentences, docstrings(path.read_text(encoding="utf-8", errors="replace"))))
        found = {sentence.key: sentence for sentence in (Sentence(mask(text), library, name) for text in texts)}
        fresh = list(islice((sentence for key, sentence in found.items() if key not in seen), PER_FILE))
        seen.update(sentence.key for sentence in fresh)
        yield from fresh


def unshared(found: Iterable[Sentence]) -> list[Sentence]:
    """The sentences that only one library has."""
    found = list(found)
    libraries = Counter(sentence.key for sentence in found)
    return [sentence for sentence in found if libraries[sentence.key] == 1]


def split(found: Iterable[Sentence], sizes: Mapping[str, int]) -> dict[str, list[Sentence]]:
    """Sentences of one library in splits of these sizes, every file in the split that is furthest from full."""
    files: dict[str, list[Sentence]] = defaultdict(list)
    for sentence in found:
        files[sentence.file].append(sentence)
    parts: dict[str, list[Sentence]] = {name: [] for name in sizes}
    for group in files.values():
        emptiest = min(sizes, key=lambda name: len(parts[name]) / sizes[name])
        parts[emptiest] += group
    return {name: part[: sizes[name]] for name, part in parts.items()}


def build() -> dict[str, list[Sentence]]:
    """The three splits, shuffled."""
    enough = round(1.2 * sum(SPLITS.values()))
    found = unshared(sentence for library in LIBRARIES for sentence in islice(read(library), enough))
    parts: dict[str, list[Sentence]] = {name: [] for name in SPLITS}
    for library in LIBRARIES:
        for name, part in split((s for s in found if s.label == library), SPLITS).items():
            parts[name] += part
    return {name: sorted(part, key=lambda sentence: _shuffle(sentence.text)) for name, part in parts.items()}


def _shuffle(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(directory: Path) -> dict[str, Counter[str]]:
    """Write ``<split>.jsonl`` and return how many sentences each library has in each split."""
    parts = build()
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        rows = (json.dumps(sentence._asdict(), ensure_ascii=False) for sentence in part)
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {name: Counter(sentence.label for sentence in part) for name, part in parts.items()}


def main(arguments: list[str]) -> None:
    """Write the files and say what is in them."""
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    for name, counts in write(Path(arguments[0])).items():
        print(
            f"{name}: {counts.total()} sentences of {len(counts)} libraries, {min(counts.values())} or more of each"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
