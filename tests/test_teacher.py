import pytest
import torch
from safetensors.torch import save_file

from compress_search import training
from compress_search.data import read, tokenize
from compress_search.encoders import subject_of
from compress_search.errors import NotFinite, StudyError
from compress_search.study import load_study
from compress_search.tasks import Task
from compress_search.teacher import load_teacher, prepare_teacher, teacher_subject, untrained
from compress_search.training import evaluate
from tests import tiny

FROM_SCRATCH = {
    "model": None,
    "architecture": {"layers": 1, "hidden": 32, "heads": 4, "intermediate": 64, "vocabulary": 100},
    "fine_tune": {"epochs": 2, "learning_rate": 3.0e-3, "batch_size": 16},
}


@pytest.fixture
def prepared(tmp_path):
    """``prepared(path)``: the teacher's directory, its task and its raw rows."""

    def prepare(path, **options):
        study = load_study(path)
        raw, task = read(study)
        return prepare_teacher(study, raw, task, tmp_path / "cache", **options)

    return prepare


class TestSubject:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    @pytest.mark.parametrize("kind", ["text-classification", "text-regression", "token-classification"])
    def test_it_is_what_the_weights_say(self, tiny_study, prepared, kind, family):
        path = tiny_study(kind, family=family)
        study = load_study(path)
        _, task = read(study)
        subject = teacher_subject(study, task)
        network, _ = load_teacher(prepared(path))
        assert subject == subject_of(network, task.name)
        assert subject.parameters == sum(p.numel() for p in network.parameters())

    def test_from_scratch(self, tiny_study, prepared):
        path = tiny_study(teacher=FROM_SCRATCH)
        study = load_study(path)
        _, task = read(study)
        network, tokenizer = load_teacher(prepared(path))
        assert teacher_subject(study, task) == subject_of(network, task.name)
        assert len(tokenizer) == 100

    def test_it_reads_no_weights_and_leaves_no_trace(self, tiny_study, tmp_path):
        path = tiny_study()
        save_file({}, tmp_path / "teacher" / "model.safetensors")
        before = sorted(tmp_path.rglob("*"))
        study = load_study(path)
        teacher_subject(study, read(study)[1])
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_bad_teacher_is_refused_here_already(self, tiny_study, tmp_path):
        path = tiny_study()
        tiny.tiny_teacher(tmp_path / "teacher", "pos")
        study = load_study(path)
        with pytest.raises(StudyError, match="no head for text-classification"):
            teacher_subject(study, read(study)[1])


class TestPrepare:
    def test_the_second_call_makes_nothing(self, tiny_study, prepared, monkeypatch):
        first = prepared(tiny_study(teacher=FROM_SCRATCH))
        monkeypatch.setattr("compress_search.teacher.fit", lambda *_, **__: pytest.fail("trained again"))
        assert prepared(tiny_study(teacher=FROM_SCRATCH)) == first

    def test_the_directory_is_one_of_transformers(self, tiny_study, prepared):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        directory = prepared(tiny_study())
        network = AutoModelForSequenceClassification.from_pretrained(directory)
        assert network.config.id2label == {0: "negative", 1: "positive"}
        assert len(AutoTokenizer.from_pretrained(directory)) == len(tiny.tiny_vocabulary())

    def test_whatever_decides_the_teacher_changes_its_place(self, tiny_study, prepared):
        def variant(architecture=None, fine_tune=None, **sections):
            teacher = {
                **FROM_SCRATCH,
                "architecture": {**FROM_SCRATCH["architecture"], **(architecture or {})},
                "fine_tune": {**FROM_SCRATCH["fine_tune"], "epochs": 0.1, **(fine_tune or {})},
            }
            return prepared(tiny_study(teacher=teacher, **sections))

        places = [
            variant(),
            variant(architecture={"layers": 2}),
            variant(architecture={"vocabulary": 101}),
            variant(fine_tune={"learning_rate": 1e-3}),
            variant(fine_tune={"layer_drop": 0.2}),
            variant(data={"max_length": 30}),
            variant(search={"seed": 1}),
            variant(training={"weight_decay": 0.2}),
            prepared(tiny_study()),
        ]
        assert len(set(places)) == len(places)
        assert variant(search={"trials": 7}, training={"epochs": 9}, measure={"repeats": 9}) == places[0]

    def test_the_data_count_only_where_they_are_learnt_from(self, tiny_study, prepared, tmp_path):
        kept, trained = prepared(tiny_study()), prepared(tiny_study(teacher=FROM_SCRATCH))
        other = str(tiny.write_jsonl(tmp_path / "other.jsonl", tiny.tiny_rows(size=80, seed=9)))
        assert prepared(tiny_study(data={"train": other})) == kept
        assert prepared(tiny_study(teacher=FROM_SCRATCH, data={"train": other})) != trained

    def test_the_files_of_a_model_count_and_not_their_folder(self, tiny_study, prepared, tmp_path):
        first = prepared(tiny_study())
        tiny.tiny_teacher(tmp_path / "elsewhere")
        assert prepared(tiny_study(teacher={"model": "elsewhere"})) == first
        network = tiny.tiny_network()
        with torch.no_grad():
            network.classifier.bias.add_(1)
        network.save_pretrained(tmp_path / "elsewhere")
        assert prepared(tiny_study(teacher={"model": "elsewhere"})) != first

    def test_a_failure_leaves_no_teacher_behind(self, tiny_study, prepared, tmp_path, monkeypatch):
        diverging = training.task_loss(Task("text-classification", tiny.labels_of("text-classification")))
        monkeypatch.setattr("compress_search.teacher.task_loss", lambda _: lambda *a: diverging(*a) * float("inf"))
        with pytest.raises(NotFinite):
            prepared(tiny_study(teacher=FROM_SCRATCH))
        assert not list((tmp_path / "cache").glob("*/config.json"))

    def test_a_text_too_small_for_its_vocabulary(self, tiny_study, prepared):
        teacher = {**FROM_SCRATCH, "architecture": {"vocabulary": 5000}}
        with pytest.raises(StudyError, match="the training text yields only") as caught:
            prepared(tiny_study(teacher=teacher))
        assert caught.value.key == "teacher.architecture.vocabulary"


class TestUntrained:
    def both(self, path):
        study = load_study(path)
        _, task = read(study)
        return [untrained(study, task) for _ in range(2)]

    def test_a_pretrained_encoder_starts_with_its_own_weights_and_one_random_head(self, tiny_study, tmp_path):
        first, second = self.both(tiny_study(teacher={"fine_tune": {}}))
        saved = tiny.tiny_network().bert.encoder.state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in first.bert.encoder.state_dict().items())
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())

    def test_training_starts_from_just_this(self, tiny_study, prepared):
        teacher = {
            **FROM_SCRATCH,
            "fine_tune": {**FROM_SCRATCH["fine_tune"], "epochs": 0.01, "learning_rate": 1e-9},
        }
        path = tiny_study(teacher=teacher)
        start, _ = self.both(path)
        trained, _ = load_teacher(prepared(path))
        for name, value in start.state_dict().items():
            torch.testing.assert_close(value, trained.state_dict()[name], rtol=0, atol=1e-7)

    def test_of_a_model_that_came_trained_nothing_is_known(self, tiny_study):
        assert self.both(tiny_study()) == [None, None]


class TestTraining:
    def test_layers_are_skipped_and_none_is_missing_after(self, tiny_study, prepared):
        def network(rate):
            fine_tune = {**FROM_SCRATCH["fine_tune"], "layer_drop": rate}
            architecture = {**FROM_SCRATCH["architecture"], "layers": 3}
            path = tiny_study(teacher={**FROM_SCRATCH, "architecture": architecture, "fine_tune": fine_tune})
            return load_teacher(prepared(path))[0]

        kept, dropped = (network(rate).state_dict() for rate in (0.0, 0.5))
        assert kept.keys() == dropped.keys()
        assert not torch.equal(kept["classifier.weight"], dropped["classifier.weight"])

    def score(self, path, prepared, cache):
        study = load_study(path)
        raw, task = read(study)
        network, tokenizer = load_teacher(prepared(path))
        split = tokenize(raw, tokenizer, study, task, cache)["validation"]
        return task.score(*evaluate(network, split, task))[task.primary]

    @pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
    def test_from_scratch_it_learns_the_task(self, tiny_study, prepared, tmp_path, kind):
        teacher = {**FROM_SCRATCH, "fine_tune": {"epochs": 15, "learning_rate": 5.0e-3, "batch_size": 16}}
        assert self.score(tiny_study(kind, teacher=teacher), prepared, tmp_path / "cache") > 0.9

    def test_a_pretrained_encoder_learns_the_task(self, tiny_study, prepared, tmp_path):
        from transformers import AutoModel

        teacher = {"fine_tune": {"epochs": 15, "learning_rate": 5.0e-3, "batch_size": 16}}
        path = tiny_study(teacher=teacher)
        AutoModel.from_config(tiny.tiny_config()).save_pretrained(tmp_path / "teacher")
        assert self.score(path, prepared, tmp_path / "cache") > 0.9

    def test_the_settings_are_the_studys(self, tiny_study, prepared, monkeypatch):
        seen = {}

        def record(network, batches, steps, loss, **options):
            seen.update(options, steps=steps, batch=len(next(batches)["index"]))
            training.fit(network, batches, 1, loss, **options)

        monkeypatch.setattr("compress_search.teacher.fit", record)
        settings = {"epochs": 2.5, "learning_rate": 7.0e-4, "batch_size": 12}
        done = []
        path = tiny_study(
            teacher={**FROM_SCRATCH, "fine_tune": settings},
            training={"warmup": 0.3, "weight_decay": 0.04},
            search={"seed": 11},
        )
        prepared(path, on_progress=done.append)
        assert (seen["steps"], seen["batch"], seen["learning_rate"]) == (20, 12, 7e-4)
        assert (seen["warmup"], seen["weight_decay"], seen["seed"], seen["device"]) == (0.3, 0.04, 11, "cpu")
        assert done == [1]


class TestLoadTeacher:
    def test_it_is_frozen_and_deterministic(self, tiny_study, prepared):
        network, tokenizer = load_teacher(prepared(tiny_study()))
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert network.config._attn_implementation == "sdpa"
        inputs = tokenizer("the film was good", return_tensors="pt")
        assert torch.equal(network(**inputs).logits, network(**inputs).logits)

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_the_tokenizer_remembers_what_the_network_takes(self, tiny_study, prepared, family):
        network, tokenizer = load_teacher(prepared(tiny_study("pairs", family=family)))
        inputs = tokenizer("the film", "was good", return_tensors="pt")
        assert network(**inputs).logits.shape == (1, 2)
        assert ("token_type_ids" in inputs) == (family in ("bert", "electra"))


def test_a_real_encoder(shared, tiny_study, prepared):
    """The shared sentence encoder gets a head, and is found again as it was left."""
    model = shared / "models" / "all-minilm-l6-v2"
    if not model.is_dir():
        pytest.skip(f"REAL ENCODER MISSING: {model}")
    path = tiny_study(teacher={"model": str(model), "fine_tune": {"epochs": 0.1, "batch_size": 8}})
    network, tokenizer = load_teacher(prepared(path))
    assert sum(p.numel() for p in network.bert.parameters()) == 22_713_216
    assert network.classifier.out_features == 2
    assert tokenizer.model_input_names == ["input_ids", "attention_mask", "token_type_ids"]
