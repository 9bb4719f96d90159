import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress_search.data.rows import class_name, read
from compress_search.errors import StudyError
from compress_search.study import load_study
from tests import tiny


@pytest.fixture
def study_of(tiny_study, tmp_path):
    """``study_of("t.csv", content)``: a study whose only data is this file."""

    def study(name, content, task="text-classification"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return load_study(tiny_study(task, data={"train": str(path), "validation": None, "test": None}))

    return study


def rewrite(study, split, content):
    """Put other rows, or any text, into a split's file under a study that is loaded already."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    Path(getattr(study.data, split)).write_text(content, encoding="utf-8")


def complaint(study):
    with pytest.raises(StudyError) as caught:
        read(study)
    return caught.value


class TestRead:
    @pytest.mark.parametrize("kind", list(tiny.ROWS))
    def test_every_task(self, tiny_study, kind):
        raw, task = read(load_study(tiny_study(kind)))
        assert (task.name, task.labels) == (tiny.task_of(kind), tiny.labels_of(kind))
        assert task.entities == (kind == "token-classification")
        assert [len(rows) for rows in raw.splits().values()] == [96, 32, 32]
        first = tiny.tiny_rows(kind, 96, 0)[0]
        if kind == "token-classification":
            assert raw.train.texts[0] == first["tokens"]
            assert [task.labels[i] for i in raw.train.labels[0]] == first["tags"]
        elif kind == "text-regression":
            assert (raw.train.texts[0], raw.train.labels[0]) == (first["text"], first["label"])

    def test_integer_labels_are_sorted_as_numbers(self, tiny_study):
        study = load_study(tiny_study())
        rows = [{"text": "x", "label": label} for label in (10, 9, 2, 10)]
        rewrite(study, "train", rows)
        rewrite(study, "validation", rows)
        rewrite(study, "test", rows[:1])
        raw, task = read(study)
        assert task.labels == ("2", "9", "10")
        assert raw.train.labels == [2, 1, 0, 2]

    def test_an_integer_and_its_digits_are_one_class(self, tiny_study):
        study = load_study(tiny_study())
        rewrite(study, "train", [{"text": "x", "label": label} for label in (0, "0", 1, 1.0)])
        rewrite(study, "validation", [{"text": "x", "label": "1"}])
        rewrite(study, "test", [{"text": "x", "label": 0}])
        assert read(study)[0].train.labels == [0, 0, 1, 1]

    def test_columns_may_have_other_names(self, tiny_study):
        study = load_study(tiny_study(data={"text": "review", "label": "stars", "validation": None, "test": None}))
        rewrite(study, "train", [{"review": f"text {i}", "stars": i % 2} for i in range(20)])
        assert read(study)[0].train.texts[0].startswith("text ")

    def test_a_second_text_is_found_by_its_name(self, tiny_study):
        """``text_pair`` is the default column, used where the training data has it."""
        raw, _ = read(load_study(tiny_study("pairs", data={"text_pair": None})))
        assert raw.train.pairs[0] == tiny.tiny_rows("pairs", 96, 0)[0]["text_pair"]

    def test_words_and_tags_of_a_table_are_separated_by_spaces(self, study_of):
        table = "tokens,tags\nada visits oslo,B-PER O B-LOC\nit rains,O O\n"
        study = study_of("t.csv", table, "token-classification")
        raw, task = read(study)
        assert sorted(map(len, [*raw.train.texts, *raw.validation.texts])) == [2, 3]
        assert task.labels == ("B-LOC", "B-PER", "O")

    @pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
    def test_a_cell_with_a_json_list_is_that_list(self, study_of, suffix):
        words, tags = '["ada,", "it\'s 5"]', '["B-PER", "O"]'
        table = {
            "csv": "tokens,tags\n" + '"{}","{}"\n'.format(*(cell.replace('"', '""') for cell in (words, tags))) * 2,
            "tsv": "tokens\ttags\n" + f"{words}\t{tags}\n" * 2,
            "jsonl": f"{json.dumps({'tokens': words, 'tags': tags})}\n" * 2,
        }[suffix]
        raw, task = read(study_of(f"t.{suffix}", table, "token-classification"))
        assert raw.train.texts == [["ada,", "it's 5"]]
        assert task.labels == ("B-PER", "O")

    @pytest.mark.parametrize("text", ["[ ada ]", "[CLS] it , rains", "[Ada, 1843] says", "[1] [2]", "a ['b']"])
    def test_a_sentence_may_begin_with_a_bracket(self, study_of, text):
        tags = " ".join("OX"[i % 2] for i, _ in enumerate(text.split()))
        raw, _ = read(study_of("t.tsv", "tokens\ttags\n" + f"{text}\t{tags}\n" * 2, "token-classification"))
        assert raw.train.texts == [text.split()]

    def test_numbers_of_a_table_are_read_as_numbers(self, study_of):
        table = "text\tlabel\na\t0.5\nb\t-1\nc\t2e-1\n"
        study = study_of("t.tsv", table, "text-regression")
        raw, task = read(study)
        assert sorted([*raw.train.labels, *raw.validation.labels]) == [-1.0, 0.2, 0.5]
        assert task.labels == ()

    def test_the_digest_sees_text_labels_and_order(self, tiny_study):
        study = load_study(tiny_study())
        rows = read(study)[0].train
        again = read(study)[0].train
        backwards = rows.take(range(len(rows))[::-1])
        relabelled = type(rows)(rows.texts, rows.pairs, [1 - label for label in rows.labels])
        assert rows.digest == again.digest
        assert len({rows.digest, backwards.digest, relabelled.digest}) == 3


def held(monkeypatch, labels, names, **columns):
    """Have the hub answer with one data set, whose labels are numbers of these names."""
    feature = datasets.ClassLabel(names=names)
    column = "ner_tags" if isinstance(labels[0], list) else "label"
    rows = datasets.Dataset.from_dict({column: labels, **columns})
    rows = rows.cast_column(column, datasets.Sequence(feature) if column == "ner_tags" else feature)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)


class TestHub:
    """What a hub data set numbers has its names."""

    @pytest.fixture
    def study(self, tiny_study):
        def make(task, **sections):
            data = {"train": "owner/data", "validation": None, "test": None, **sections.pop("data", {})}
            return load_study(tiny_study(task, data=data, **sections))

        return make

    def test_tags_are_entities(self, monkeypatch, study):
        held(monkeypatch, [[1, 2, 0], [0]] * 2, ["O", "B-PER", "I-PER"], tokens=[["ada", "b", "runs"], ["it"]] * 2)
        raw, task = read(study(TOKEN, data={"tags": "ner_tags"}, objectives=["f1", "size_mb"]))
        assert (task.labels, task.entities, task.primary) == (("O", "B-PER", "I-PER"), True, "f1")
        assert task.numbered
        assert raw.train.labels[0] == [1, 2, 0]

    def test_classes_keep_the_data_sets_order(self, monkeypatch, study):
        held(monkeypatch, [0, 1, 2, 0], ["entailment", "neutral", "contradiction"], text=list("abcd"))
        _, task = read(study(TEXT))
        assert (task.labels, task.numbered) == (("entailment", "neutral", "contradiction"), True)
        assert {type(label) for label in task.labels} == {str}

    def test_where_one_does_not_occur_the_places_are_not_the_data_sets(self, monkeypatch, study):
        held(monkeypatch, [2, 0, 2, 0], ["b", "unused", "a"], text=list("wxyz"))
        _, task = read(study(TEXT))
        assert (task.labels, task.numbered) == (("b", "a"), False)

    def test_a_row_without_a_label(self, monkeypatch, study):
        held(monkeypatch, [0, 1, -1], ["no", "yes"], text=list("abc"))
        error = complaint(study(TEXT))
        assert (error.key, error.message) == ("data.train", "owner/data row 3: column 'label' holds no value")

    def test_a_class_is_no_number_to_predict(self, monkeypatch, study):
        held(monkeypatch, [0, 1], ["no", "yes"], text=["a", "b"])
        assert complaint(study(NUMBER)).message == "owner/data row 1: expected a number as label, got 'no'"

    @pytest.mark.parametrize(
        ("names", "order"),
        [(["POSITIVE", "NEGATIVE"], [1, 0]), (["LABEL_0", "LABEL_1"], [0, 1]), (["bad", "good"], [0, 1])],
    )
    def test_a_fine_tuned_teacher_fits(self, monkeypatch, tiny_study, tiny_teacher, tmp_path, names, order):
        from compress_search.teacher.pretrained import match_labels, read_config

        shutil.copytree(tiny_teacher(), tmp_path / "named")
        config = json.loads((tmp_path / "named/config.json").read_text())
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (tmp_path / "named/config.json").write_text(json.dumps(config))
        held(monkeypatch, [0, 1, 0], ["negative", "positive"], text=list("abc"))
        data = {"train": "owner/data", "validation": None, "test": None}
        study = load_study(tiny_study(data=data, teacher={"model": str(tmp_path / "named")}))
        _, task = read(study)
        assert read_config(study, task).num_labels == 2
        assert match_labels(task.labels, names, numbered=task.numbered) == order


class TestHeldOut:
    def test_a_tenth_of_the_training_rows_every_time_the_same(self, tiny_study):
        study = load_study(tiny_study(data={"validation": None}))
        (raw, _), (again, _) = read(study), read(study)
        assert (len(raw.train), len(raw.validation)) == (86, 10)
        assert raw.validation.digest == again.validation.digest
        everything = tiny.tiny_rows(size=96, seed=0)
        assert sorted([*raw.train.texts, *raw.validation.texts]) == sorted(row["text"] for row in everything)

    def test_it_is_no_contiguous_block(self, tiny_study):
        study = load_study(tiny_study(data={"validation": None, "test": None}))
        rewrite(study, "train", [{"text": str(i), "label": i // 50} for i in range(100)])
        held = np.array([int(text) for text in read(study)[0].validation.texts])
        assert (np.diff(held) > 1).any()
        assert held.min() < 50 <= held.max()


TEXT, NUMBER, TOKEN = "text-classification", "text-regression", "token-classification"
GOOD_TEXT = {"text": "x", "label": "positive"}
FAULTS = {
    "missing text column": (TEXT, {"txt": "x", "label": "positive"}, "no column 'text'; there are: txt, label"),
    "missing label column": (TEXT, {"text": "x"}, "no column 'label'; there are: text"),
    "label of null": (TEXT, {"text": "x", "label": None}, "column 'label' holds no value"),
    "label that is no number at all": (TEXT, {"text": "x", "label": float("nan")}, "column 'label' holds no value"),
    "empty label": (TEXT, {"text": "x", "label": " "}, "expected a class, got ' '"),
    "several labels": (TEXT, {"text": "x", "label": ["a", "b"]}, "expected a class, got ['a', 'b']"),
    "number as class": (TEXT, {"text": "x", "label": 3.8}, "task: text-regression predicts numbers"),
    "text of null": (TEXT, {"text": None, "label": "positive"}, "column 'text' holds no value"),
    "text that is none": (TEXT, {"text": 5, "label": "positive"}, "expected text, got 5"),
    "label only here": (TEXT, {"text": "x", "label": "neutral"}, "label 'neutral' does not occur in the training"),
    "word as number": (NUMBER, {"text": "x", "label": "five"}, "expected a number as label, got 'five'"),
    "infinite number": (NUMBER, {"text": "x", "label": float("inf")}, "expected a number as label, got inf"),
    "number too large": (NUMBER, {"text": "x", "label": 10**400}, "expected a number as label, got 1000"),
    "no number, in letters": (
        TEXT,
        {"text": "x", "label": "nan"},
        "expected a class, got 'nan', which stands for none",
    ),
    "no number, as pandas writes it": (TEXT, {"text": "x", "label": "NaN "}, "expected a class, got 'NaN '"),
    "no number among tags": (TOKEN, {"tokens": ["a"], "tags": ["nan"]}, "expected a class, got 'nan'"),
    "half a character": (TEXT, {"text": "x\ud800", "label": "positive"}, "got half a character, '\\ud800'"),
    "half a character in a label": (TEXT, {"text": "x", "label": "\udfff"}, "got half a character, '\\udfff'"),
    "fewer tags": (TOKEN, {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags; expected one for each"),
    "no words": (TOKEN, {"tokens": [], "tags": []}, "column 'tokens' is an empty list"),
    "words that are no list": (TOKEN, {"tokens": 5, "tags": ["O"]}, "column 'tokens': expected a list, got 5"),
    "tag only here": (TOKEN, {"tokens": ["a"], "tags": ["B-ORG"]}, "label 'B-ORG' does not occur in the training"),
}


class TestFaults:
    @pytest.mark.parametrize("fault", list(FAULTS))
    def test_it_names_file_line_key_and_value(self, tiny_study, fault):
        task, row, message = FAULTS[fault]
        study = load_study(tiny_study(task))
        rewrite(study, "validation", [*tiny.tiny_rows(task, 2), row])
        error = complaint(study)
        assert error.key == "data.validation"
        assert "study.yaml:" in str(error)
        assert "validation.jsonl:3: " in str(error)
        assert message in str(error)
        assert "\n" not in str(error)

    @pytest.mark.parametrize(
        ("task", "rows", "message"),
        [
            (TEXT, [GOOD_TEXT] * 3, "every label is 'positive'; expected at least two classes"),
            (NUMBER, [{"text": "x", "label": 1.0}] * 3, "every label is 1.0; expected at least two numbers"),
            (TOKEN, [{"tokens": ["a"], "tags": ["O"]}] * 3, "every label is 'O'; expected at least two tags"),
        ],
    )
    def test_there_must_be_something_to_tell_apart(self, tiny_study, task, rows, message):
        study = load_study(tiny_study(task))
        rewrite(study, "train", rows)
        error = complaint(study)
        assert error.key == "data.train"
        assert message in str(error)

    @pytest.mark.parametrize(
        ("sections", "key"),
        [
            ({"objectives": ["f1", "size_mb"]}, "objectives"),
            ({"constraints": {"f1_drop": "<= 0.1"}}, "constraints"),
        ],
    )
    def test_entity_f1_needs_entities(self, tiny_study, sections, key):
        read(load_study(tiny_study("token-classification", **sections)))
        error = complaint(load_study(tiny_study("pos", **sections)))
        assert error.key.startswith(key)
        assert "needs entities: tags O, B-… and I-…; the data have 'ADJ'" in str(error)

    @pytest.mark.parametrize("cell", ["NaN", "nan"])
    def test_no_value_in_a_table_is_no_class(self, study_of, cell):
        error = complaint(study_of("t.csv", f"text,label\na,x\nb,y\nc,{cell}\n"))
        words = f"expected a class, got '{cell}', which stands for none and can name no class"
        assert (error.key, error.message) == ("data.train", f"t.csv:4: {words}")

    @pytest.mark.parametrize(
        ("cell", "suffix"),
        [
            ("['ada', 'was']", "csv"),
            ("['ada' 'was']", "csv"),
            ("[ada, was]", "csv"),
            ("[0 1]", "csv"),
            ("[\"ada\", 'was']", "tsv"),
            ('"[""ada"", ""was""]"', "tsv"),
        ],
    )
    @pytest.mark.parametrize("column", ["tokens", "tags"])
    def test_a_list_as_a_program_prints_it(self, study_of, cell, suffix, column):
        mark, written = ("\t", cell) if suffix == "tsv" else (",", f'"{cell}"')
        cells = [written, "O O"] if column == "tokens" else ["ada was", written]
        error = complaint(study_of(f"t.{suffix}", f"tokens{mark}tags\n{mark.join(cells)}\n", TOKEN))
        wanted = 'expected words with spaces between them or a JSON list such as ["a", "b"]'
        assert error.key == "data.train"
        assert error.message == f"t.{suffix}:2: column '{column}': {wanted}, got {cell}"

    def test_digits_that_are_no_number_are_a_name(self, study_of):
        _, task = read(study_of("t.csv", f"text,label\na,{'1' * 5000}\nb,2\nc,10\n"))
        assert task.labels == ("10", "1" * 5000, "2")

    def test_a_header_alone_is_no_data(self, study_of):
        error = complaint(study_of("t.csv", "text,label\n"))
        assert error.key == "data.train"
        assert "there are no rows" in str(error)

    def test_malformed_json(self, tiny_study):
        study = load_study(tiny_study())
        rewrite(study, "train", '{"text": "x", "label": 0}\n{"text": \n')
        error = complaint(study)
        assert (error.key, "train.jsonl:2: not JSON" in str(error)) == ("data.train", True)

    def test_the_second_text_must_be_everywhere(self, tiny_study):
        study = load_study(tiny_study("pairs"))
        rewrite(study, "test", [{"text": "x", "label": 0}])
        error = complaint(study)
        assert (error.key, "no column 'text_pair'" in str(error)) == ("data.test", True)

    def test_rows_without_lines_are_counted(self, tiny_study, tmp_path):
        study = load_study(tiny_study())
        path = tmp_path / "data" / "d.parquet"
        pq.write_table(pa.Table.from_pylist([GOOD_TEXT, {"text": "y", "label": None}]), path)
        changed = study.model_copy(update={"data": study.data.model_copy(update={"test": str(path)})})
        assert "d.parquet row 2: column 'label' holds no value" in str(complaint(changed))

    def test_one_row_cannot_be_split(self, tiny_study):
        study = load_study(tiny_study(NUMBER, data={"validation": None, "test": None}))
        rewrite(study, "train", [{"text": "x", "label": 1.0}])
        assert complaint(study).key == "data.train"


@pytest.mark.parametrize(
    ("value", "name"), [("a b", "a b"), (7, "7"), (-1, "-1"), (2.0, "2"), (True, "true"), ("07", "07")]
)
def test_class_names(value, name):
    assert class_name(value) == name
