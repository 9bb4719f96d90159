import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress_search import hub
from compress_search.data.readers import read_source

ROWS = [{"text": "one, two", "label": "a"}, {"text": "größer", "label": "b"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(source):
    return [row for _, row in read_source(source, "train")]


def error_of(source):
    with pytest.raises(ValueError, match=r".") as caught:
        list(read_source(source, "train"))
    return str(caught.value)


class TestFormats:
    def test_jsonl(self, tmp_path):
        source = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
        assert rows_of(source) == ROWS

    def test_csv(self, tmp_path):
        assert rows_of(write(tmp_path / "d.csv", 'text,label\n"one, two",a\r\ngrößer,b\n')) == ROWS

    def test_tsv(self, tmp_path):
        assert rows_of(write(tmp_path / "d.tsv", "text\tlabel\none, two\ta\ngrößer\tb\n")) == ROWS

    def test_parquet(self, tmp_path):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
        assert rows_of(str(tmp_path / "d.parquet")) == ROWS

    def test_a_byte_order_mark_is_no_part_of_the_first_column(self, tmp_path):
        assert rows_of(write(tmp_path / "d.csv", b"\xef\xbb\xbftext,label\nx,a\n")) == [{"text": "x", "label": "a"}]

    def test_quotation_marks_are_text_in_tsv(self, tmp_path):
        source = write(tmp_path / "d.tsv", 'text\tlabel\n"unbalanced\ta\nnext\tb\n')
        assert [row["text"] for row in rows_of(source)] == ['"unbalanced', "next"]

    def test_places_count_lines_and_not_rows(self, tmp_path):
        source = write(tmp_path / "d.jsonl", '\n{"text": "x"}\n\n{"text": "y"}\n')
        assert [place for place, _ in read_source(source, "train")] == ["d.jsonl:2", "d.jsonl:4"]

    def test_a_field_of_many_lines_is_placed_at_its_last(self, tmp_path):
        source = write(tmp_path / "d.csv", 'text,label\n"a\nb",x\nc,y\n')
        assert [place for place, _ in read_source(source, "train")] == ["d.csv:3", "d.csv:4"]


class TestMalformed:
    def test_jsonl_names_line_and_column(self, tmp_path):
        source = write(tmp_path / "d.jsonl", '{"text": "x"}\n{"text": \'y\'}\n')
        assert error_of(source).startswith("d.jsonl:2: not JSON: Expecting value at column 10")

    def test_jsonl_wants_objects(self, tmp_path):
        assert error_of(write(tmp_path / "d.jsonl", "[1, 2]\n")) == "d.jsonl:1: expected a JSON object, got [1, 2]"

    def test_a_row_with_a_field_too_many(self, tmp_path):
        source = write(tmp_path / "d.csv", "text,label\nx,a\none, two,b\n")
        assert error_of(source) == "d.csv:3: 3 fields, the header names 2"

    def test_an_open_quotation(self, tmp_path):
        assert error_of(write(tmp_path / "d.csv", 'text,label\n"x,a\n')).startswith(
            "d.csv:2: unexpected end of data"
        )

    def test_another_encoding(self, tmp_path):
        message = error_of(write(tmp_path / "d.jsonl", '{"text": "größer"}\n'.encode("latin-1")))
        assert message.startswith("d.jsonl: not UTF-8 text: invalid")

    def test_a_damaged_parquet_file(self, tmp_path):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
        content = (tmp_path / "d.parquet").read_bytes()
        assert error_of(write(tmp_path / "d.parquet", content[: len(content) // 2])).startswith(
            "d.parquet: no Parquet"
        )

    def test_a_file_that_is_gone(self, tmp_path):
        assert error_of(str(tmp_path / "d.jsonl")) == "d.jsonl: cannot be read: No such file or directory"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("[" * 100_000, "nested too deeply"),
            ('{"text": ' * 100_000, "nested too deeply"),
            ('{"text": "x", "label": ' + "1" * 5000 + "}", "a number of more than 4300 digits"),
        ],
        ids=["lists", "objects", "digits"],
    )
    def test_json_that_python_does_not_read(self, tmp_path, line, message):
        source = write(tmp_path / "d.jsonl", f'{{"text": "x"}}\n{line}\n')
        assert error_of(source) == f"d.jsonl:2: not JSON: {message}"

    @pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
    def test_a_column_that_is_there_twice(self, tmp_path, suffix, mark):
        source = write(tmp_path / f"d.{suffix}", f"label{mark}text{mark}label\na{mark}x{mark}b\n")
        assert error_of(source) == f"d.{suffix}:1: the header names column 'label' twice"

    def test_columns_without_a_name_are_none_that_is_there_twice(self, tmp_path):
        assert rows_of(write(tmp_path / "d.csv", "text,,\nx,,\n")) == [{"text": "x", "": ""}]


TAGS = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])


class TestHub:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("imdb", ("imdb", None, "train")),
            ("glue:sst2", ("glue", "sst2", "train")),
            ("nyu-mll/glue:sst2:validation", ("nyu-mll/glue", "sst2", "validation")),
            ("imdb::test", ("imdb", None, "test")),
        ],
    )
    def test_the_id_names_configuration_and_split(self, monkeypatch, source, expected):
        asked = []

        def load_dataset(name, configuration, split, streaming):
            assert not streaming
            asked.append((name, configuration, split))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert rows_of(source) == ROWS
        assert asked == [expected]

    @pytest.mark.parametrize("tags", [datasets.Sequence(TAGS), [TAGS]], ids=["sequence", "list"])
    def test_numbers_of_classes_become_their_names(self, monkeypatch, tags):
        features = datasets.Features(
            {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags, "label": TAGS}
        )
        rows = {"tokens": [["ada", "smiles"], ["it"]], "ner_tags": [[1, 0], [0]], "label": [2, -1]}
        held = datasets.Dataset.from_dict(rows, features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held)
        first, second = rows_of("x/y")
        assert first == {"tokens": ["ada", "smiles"], "ner_tags": ["B-PER", "O"], "label": "I-PER"}
        assert first["label"].number == 2
        assert second == {"tokens": ["it"], "ner_tags": ["O"], "label": None}

    @pytest.mark.parametrize("reachable", [True, False])
    def test_a_glance_fetches_no_more_than_it_must(self, monkeypatch, reachable):
        asked = []

        def load_dataset(*_args, split, streaming):
            asked.append(streaming)
            held = datasets.Dataset.from_list(ROWS)
            return held.to_iterable_dataset() if streaming else held

        monkeypatch.setattr(hub, "reachable", lambda: reachable)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert [row for _, row in read_source("x/y", "train", glance=True)] == ROWS
        assert asked == [reachable]

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (
                datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist\nor is private"),
                "Dataset 'x/y' doesn't exist",
            ),
            (datasets.exceptions.DatasetGenerationError("An error occurred"), "An error occurred"),
            (RuntimeError("Dataset scripts are no longer supported"), "Dataset scripts are no longer supported"),
            (ConnectionError(), "ConnectionError"),
        ],
    )
    def test_what_the_hub_does_not_have(self, monkeypatch, error, said):
        def load_dataset(*_args, **_options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert error_of("x/y") == f"cannot load x/y from the hub: {said}"
