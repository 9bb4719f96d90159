import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_search.data import read
from compress_search.errors import StudyError
from compress_search.study import load_study
from compress_search.teacher import pretrained
from compress_search.teacher.pretrained import (
    files_digest,
    load_pretrained,
    match_labels,
    read_config,
    reorder_logits,
)
from tests import tiny


class TestMatchLabels:
    @pytest.mark.parametrize(
        ("labels", "names", "expected"),
        [
            (["a", "b"], ["a", "b"], [0, 1]),
            (["a", "b", "c"], ["c", "a", "b"], [1, 2, 0]),
            (["negative", "positive"], ["POSITIVE", "NEGATIVE"], [1, 0]),
            (["a", "A"], ["A", "a"], [1, 0]),
            (["0", "1", "2"], ["x", "y", "z"], [0, 1, 2]),
            (["0", "1"], ["LABEL_0", "LABEL_1"], [0, 1]),
            (["1", "2"], ["2", "1"], [1, 0]),
            ([], ["LABEL_0"], [0]),
        ],
    )
    def test_the_same_names(self, labels, names, expected):
        assert match_labels(labels, names) == expected

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
            (["e", "n", "c"], [0, 1, 2]),
            (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
        ],
    )
    def test_labels_that_the_data_set_numbers(self, names, expected):
        labels = ["entailment", "neutral", "contradiction"]
        assert match_labels(labels, names, numbered=True) == expected

    def test_some_names_in_common_are_no_order(self):
        with pytest.raises(ValueError, match="are not those of the data"):
            match_labels(["O", "B-PER"], ["o", "B-person"], numbered=True)

    @pytest.mark.parametrize(
        ("labels", "names", "message"),
        [
            (["a", "b"], ["a", "b", "c"], r"the model has 3 outputs \(a, b, c\), the data have 2 classes \(a, b\)"),
            (["a", "b"], ["LABEL_0", "LABEL_1"], r"\(LABEL_0, LABEL_1\) are not those of the data \(a, b\): name"),
            (["a", "b"], ["a", "c"], "are not those of the data"),
            (["a", "b"], ["B", "b"], "are not those of the data"),
            ([], ["a", "b"], "2 outputs .*the data have a number to predict"),
        ],
    )
    def test_other_names(self, labels, names, message):
        with pytest.raises(ValueError, match=message):
            match_labels(labels, names)


@pytest.fixture
def loaded(tiny_study):
    """``loaded(study)``: the network and the tokenizer of a study file, and its task."""

    def load(path):
        study = load_study(path)
        _, task = read(study)
        config = read_config(study, task)
        return (*load_pretrained(study, pretrained.directory_of(study), config, task), task)

    return load


def complaint(path, loaded):
    with pytest.raises(StudyError) as caught:
        loaded(path)
    assert "study.yaml:" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def edit(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


class TestLoad:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    @pytest.mark.parametrize("kind", ["text-classification", "text-regression", "token-classification"])
    def test_a_fine_tuned_model_is_kept_bit_for_bit(self, tiny_study, loaded, kind, family):
        network, tokenizer, _ = loaded(tiny_study(kind, family=family))
        expected = tiny.tiny_network(kind, family).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
        assert ("token_type_ids" in tokenizer("the film")) == (family in ("bert", "electra"))

    def test_half_precision_weights_are_widened(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        tiny.tiny_network().half().save_pretrained(tmp_path / "teacher")
        assert loaded(path)[0].dtype == torch.float32

    @pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
    def test_labels_in_another_order_are_put_in_the_datas(self, tiny_study, tmp_path, loaded, kind):
        path = tiny_study(kind)
        names = list(tiny.labels_of(kind))[::-1]
        edit(tmp_path / "teacher" / "config.json", id2label=dict(enumerate(names)), label2id=None)
        network, tokenizer, task = loaded(path)
        inputs = tokenizer("the film was good", return_tensors="pt")
        with torch.no_grad():
            expected = tiny.tiny_network(kind)(**inputs).logits.flip(-1)
            torch.testing.assert_close(network(**inputs).logits, expected)
        assert tuple(network.config.id2label.values()) == task.labels
        assert network.config.label2id == {label: i for i, label in enumerate(task.labels)}

    def test_names_of_numbered_classes_are_kept(self, tiny_study, tmp_path, loaded):
        """Integer labels are positions; what they are called is only to be learnt from the model."""
        path = tiny_study("pairs")
        edit(tmp_path / "teacher" / "config.json", id2label={0: "different", 1: "same"}, label2id=None)
        assert loaded(path)[0].config.id2label == {0: "different", 1: "same"}

    def test_byte_level_pieces_of_single_words_bring_their_space(self, tiny_study, tmp_path, loaded):
        from tokenizers import ByteLevelBPETokenizer
        from transformers import RobertaTokenizer

        trained = ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        text = ["the film was good"] * 9
        trained.train_from_iterator(text, vocab_size=300, special_tokens=special, show_progress=False)
        trained.save_model(str(tmp_path))
        path = tiny_study("token-classification", family="roberta")
        merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
        vocabulary = json.loads((tmp_path / "vocab.json").read_text())
        tiny.tiny_network("token-classification", "roberta", vocab_size=300).save_pretrained(tmp_path / "teacher")
        for file in (tmp_path / "teacher").glob("tokenizer*"):
            file.unlink()
        RobertaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(tmp_path / "teacher")
        _, tokenizer, _ = loaded(path)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(["film", "was"], is_split_into_words=True).input_ids)
        assert pieces == ["<s>", "Ġfilm", "Ġwas", "</s>"]


class TestFineTuned:
    """What is asked of a model when it is to be trained here."""

    def headless(self, folder, **changes):
        from transformers import AutoModel

        AutoModel.from_config(tiny.tiny_config(**changes)).save_pretrained(folder)
        tiny.tiny_tokenizer().save_pretrained(folder)

    def test_a_head_is_added_the_same_for_the_same_seed(self, tiny_study, tmp_path, loaded):
        path = tiny_study(teacher={"fine_tune": {}})
        self.headless(tmp_path / "teacher")
        (first, _, task), (again, _, _) = loaded(path), loaded(path)
        assert first.classifier.out_features == task.outputs
        assert torch.equal(first.classifier.weight, again.classifier.weight)
        assert tuple(first.config.id2label.values()) == task.labels

    def test_a_head_for_other_labels_is_replaced(self, tiny_study, tmp_path, loaded):
        path = tiny_study("token-classification", teacher={"fine_tune": {}})
        tiny.tiny_teacher(tmp_path / "teacher", "pos")
        network, _, task = loaded(path)
        assert network.classifier.out_features == task.outputs == 4

    def test_the_head_alone_may_be_missing(self, tiny_study, tmp_path, loaded):
        path = tiny_study(teacher={"fine_tune": {}})
        weights = load_file(tmp_path / "teacher" / "model.safetensors")
        del weights["bert.encoder.layer.1.output.dense.weight"], weights["classifier.weight"]
        save_file(weights, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
        message = "the weights lack 1 tensors, such as bert.encoder.layer.1.output.dense.weight"
        assert message in str(complaint(path, loaded))


class TestFaults:
    def test_an_unsupported_family(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        edit(tmp_path / "teacher" / "config.json", model_type="gpt2")
        error = complaint(path, loaded)
        assert error.key == "teacher.model"
        assert "'gpt2' are not supported: expected bert, roberta, xlm-roberta, electra or distilbert" in str(error)

    @pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
    def test_no_head_and_no_fine_tuning(self, tiny_study, tmp_path, loaded, architecture):
        path = tiny_study()
        edit(tmp_path / "teacher" / "config.json", architectures=[architecture])
        error = complaint(path, loaded)
        assert (error.key, f"{architecture} has no head for text-classification" in str(error)) == (
            "teacher.model",
            True,
        )

    def test_another_number_of_labels(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        tiny.tiny_teacher(tmp_path / "teacher", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={})
        assert "the model has 3 outputs (a, b, c), the data have 2 classes" in str(complaint(path, loaded))

    def test_several_labels_at_once(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        edit(tmp_path / "teacher" / "config.json", problem_type="multi_label_classification")
        assert "several labels at once" in str(complaint(path, loaded))

    def test_no_tokenizer(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        for file in (tmp_path / "teacher").glob("tokenizer*"):
            file.unlink()
        assert "no tokenizer beside the model" in str(complaint(path, loaded))

    def test_a_damaged_tokenizer(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        (tmp_path / "teacher" / "tokenizer.json").write_text("{")
        assert "cannot load the tokenizer" in str(complaint(path, loaded))

    def test_a_tokenizer_of_another_model(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        tiny.tiny_network(vocab_size=50).save_pretrained(tmp_path / "teacher")
        pieces = len(tiny.tiny_vocabulary())
        assert f"the tokenizer has {pieces} pieces, the model embeds only 50" in str(complaint(path, loaded))

    def test_weights_cut_short(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        file = tmp_path / "teacher" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        assert "cannot load the weights" in str(complaint(path, loaded))

    def test_no_weights(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        (tmp_path / "teacher" / "model.safetensors").unlink()
        assert "no weights beside config.json" in str(complaint(path, loaded))

    def test_weights_in_several_files(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        (tmp_path / "teacher" / "model.safetensors").unlink()
        tiny.tiny_network().save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
        assert len(list((tmp_path / "teacher").glob("model-*.safetensors"))) > 1
        tensors = loaded(path)[0].state_dict()
        assert all(torch.equal(tensors[name], other) for name, other in tiny.tiny_network().state_dict().items())

    def test_weights_that_are_no_numbers(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        network = tiny.tiny_network()
        with torch.no_grad():
            network.classifier.weight[0, 0] = torch.nan
        network.save_pretrained(tmp_path / "teacher")
        assert "classifier.weight holds infinities or no numbers" in str(complaint(path, loaded))

    def test_weights_of_another_shape(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        edit(tmp_path / "teacher" / "config.json", intermediate_size=48)
        assert "cannot load the weights" in str(complaint(path, loaded))

    @pytest.mark.parametrize(("family", "longest"), [("bert", 68), ("roberta", 67), ("distilbert", 68)])
    def test_longer_texts_than_the_model_reads(self, tiny_study, loaded, family, longest):
        loaded(tiny_study(family=family, data={"max_length": longest}))
        error = complaint(tiny_study(family=family, data={"max_length": longest + 1}), loaded)
        assert (error.key, f"at most {longest} tokens" in str(error)) == ("data.max_length", True)

    def test_a_configuration_that_is_none(self, tiny_study, tmp_path, loaded):
        path = tiny_study()
        (tmp_path / "teacher" / "config.json").write_text("{")
        assert "cannot read the model's configuration" in str(complaint(path, loaded))


class TestHub:
    def test_a_name_is_fetched(self, tiny_study, tmp_path, monkeypatch, loaded):
        tiny.tiny_teacher(tmp_path / "hub")
        asked = []

        def snapshot_download(name, **options):
            asked.append((name, options["allow_patterns"]))
            return str(tmp_path / "hub")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        study = load_study(tiny_study(teacher={"model": "someone/model"}))
        assert pretrained.directory_of(study) == tmp_path / "hub"
        assert asked == [("someone/model", ["*.json", "*.txt", "*.model", "*.safetensors"])]

    def test_old_weights_are_fetched_where_there_are_no_others(self, tiny_study, tmp_path, monkeypatch):
        (tmp_path / "hub").mkdir()
        asked = []

        def snapshot_download(name, **options):
            asked.append(options["allow_patterns"][-1])
            return str(tmp_path / "hub")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        pretrained.directory_of(load_study(tiny_study(teacher={"model": "someone/model"})))
        assert asked == ["*.safetensors", "pytorch_model*.bin"]

    def test_a_name_that_is_not_there(self, tiny_study, loaded):
        error = complaint(tiny_study(teacher={"model": "nobody/nothing"}), loaded)
        assert (error.key, "cannot read the model's configuration" in str(error)) == ("teacher.model", True)


def test_reordered_logits_are_those_of_the_other_labels():
    network = tiny.tiny_network("token-classification")
    inputs = tiny.tiny_tokenizer()("ada sees oslo", return_tensors="pt")
    order = [2, 0, 3, 1]
    with torch.no_grad():
        before = network(**inputs).logits
        reorder_logits(network, order)
        assert torch.equal(network(**inputs).logits, before[..., order])


def test_the_digest_sees_what_decides_a_model_and_nothing_else(tmp_path):
    folder = tiny.tiny_teacher(tmp_path / "teacher")
    before = files_digest(folder)
    (folder / "README.md").write_text("words")
    assert files_digest(folder) == before
    edit(folder / "config.json", layer_norm_eps=1e-6)
    assert files_digest(folder) != before
