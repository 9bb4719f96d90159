"""Artefacts exist whole or not at all, move freely, and every engine computes what the network did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from compress_search import Candidate, ExportError, TrialError
from compress_search.encoders import FAMILIES, load, prune_heads, prune_neurons
from compress_search.runtimes import Artifact, engines, load_runner, size_mb
from compress_search.runtimes.deployed import load_deployed
from compress_search.runtimes.engines import padded_width
from compress_search.runtimes.lowering import default_engine, lower
from compress_search.runtimes.onnx_export import export
from compress_search.runtimes.probe import toolchain
from compress_search.tasks import Task
from compress_search.testing import tiny_batches, tiny_candidate

TASKS = {
    "text-classification": Task("text-classification", ("first", "second")),
    "text-regression": Task("text-regression"),
    "token-classification": Task("token-classification", ("O", "B-X", "I-X"), entities=True),
}
CLASSIFICATION = TASKS["text-classification"]
Feed = dict[str, NDArray[np.int64]]


def feed_of(candidate: Candidate, batch_size: int = 5, seed: int = 0) -> Feed:
    batch = next(tiny_batches(candidate, batch_size=batch_size, seed=seed))
    return {name: tensor.numpy() for name, tensor in batch.items() if name not in ("labels", "index")}


def reference(candidate: Candidate, feed: Feed) -> NDArray[np.float32]:
    with torch.no_grad():
        logits = candidate.network(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits
    return np.asarray(logits.float())


def padded(feed: Feed, to: int, pad: int) -> Feed:
    extra = to - feed["input_ids"].shape[1]
    fill = {"input_ids": pad}
    return {k: np.pad(v, ((0, 0), (0, extra)), constant_values=fill.get(k, 0)) for k, v in feed.items()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_sum_and_its_normalisation_stay_apart_on_a_cpu_where_fused_they_are_slower(
    device: str, tmp_path: Path
) -> None:
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", "S", 8]) for name in "xyz"]
    nodes = [
        onnx.helper.make_node("Add", ["x", "y"], ["sum"]),
        onnx.helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["z"]),
    ]
    weights = [onnx.numpy_helper.from_array(np.full(8, v, np.float32), n) for n, v in (("scale", 1), ("shift", 0))]
    graph = onnx.helper.make_graph(nodes, "residual", sides[:2], sides[2:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = engines.session_options(1, device)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it says of every such file that it suits this machine alone
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert found == (["Add", "LayerNormalization"] if device == "cpu" else ["SkipLayerNormalization"])


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_engine_agrees_with_the_network(family: str, task: str, engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate(family, task).replace(runtime={"engine": engine})
    prune_heads(candidate.network, {0: [], 1: [0, 3]})
    prune_neurons(candidate.network, {0: [1, 2], 2: []})
    lower(candidate, tmp_path / "artifact", TASKS[task])
    run = load_runner(tmp_path / "artifact", threads=1)
    for seed, batch_size in enumerate((1, 3, 8)):
        feed = feed_of(candidate, batch_size, seed)
        logits = run(feed)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, reference(candidate, feed), atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_network_that_attends_to_nothing_runs_and_can_be_deployed(engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate("bert").replace(runtime={"engine": engine})
    prune_heads(candidate.network, {layer: [] for layer in range(candidate.subject.layers)})
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    feed = feed_of(candidate, 3)
    expected = reference(candidate, feed)
    np.testing.assert_allclose(load_runner(tmp_path / "artifact", 1)(feed), expected, atol=1e-4, rtol=0)
    form, folder = ("onnx", ".") if engine == "onnxruntime" else ("manifest", "weights")
    run = load_deployed(tmp_path / "artifact" / folder, form, CLASSIFICATION, threads=1)
    np.testing.assert_allclose(run(feed), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_padding_changes_nothing(task: str, engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate("bert", task).replace(runtime={"engine": engine})
    lower(candidate, tmp_path / "artifact", TASKS[task])
    run = load_runner(tmp_path / "artifact", threads=1)
    feed = feed_of(candidate)
    length = feed["input_ids"].shape[1]
    logits, longer = run(feed), run(padded(feed, length + 7, candidate.tokenizer.pad_token_id))
    real = longer[:, :length] if task == "token-classification" else longer
    mask = feed["attention_mask"].astype(bool) if task == "token-classification" else slice(None)
    np.testing.assert_allclose(real[mask], logits[mask], atol=1e-5, rtol=0)
    ignored = run({**feed, "attention_mask": np.ones_like(feed["attention_mask"])})
    assert np.abs(ignored - logits).max() > 1e-3, "the mask must matter where there is padding"


def test_bfloat16_runs_in_torch_and_comes_back_as_float32(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    candidate.network.bfloat16()
    candidate = candidate.replace(subject=candidate.subject.having("torch-only"))
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    feed = feed_of(candidate)
    logits = load_runner(tmp_path / "artifact", threads=1)(feed)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference(candidate, feed), atol=1e-6)
    assert size_mb(tmp_path / "artifact") == pytest.approx(candidate.subject.parameters * 2e-6, rel=0.2)


def test_the_default_engine_follows_device_and_traits() -> None:
    subject = tiny_candidate().subject
    assert default_engine(subject) == "onnxruntime"
    assert default_engine(subject.having("torch-only")) == "torch"
    assert default_engine(subject.having(device="cuda")) == "torch"
    assert default_engine(subject.having("onnx-only", device="cuda")) == "onnxruntime"


def test_the_record_says_what_runs(tmp_path: Path) -> None:
    directory = tmp_path / "artifact"
    lower(tiny_candidate().replace(simulated=True), directory, CLASSIFICATION)
    artifact = Artifact.read(directory)
    assert artifact.engine == "onnxruntime"
    assert artifact.files == ("model.onnx",)
    assert artifact.simulated
    assert Task.from_dict(artifact.task) == CLASSIFICATION
    assert {path.name for path in directory.iterdir()} == {"artifact.json", "model.onnx", "weights"}
    assert size_mb(directory) == (directory / "model.onnx").stat().st_size / 1e6


def test_size_counts_only_what_the_engine_loads(tmp_path: Path) -> None:
    directory = tmp_path / "artifact"
    lower(tiny_candidate().replace(runtime={"engine": "torch"}), directory, CLASSIFICATION)
    assert size_mb(directory) == (directory / "weights/model.safetensors").stat().st_size / 1e6


def test_artifacts_can_be_moved_and_read_by_a_fresh_process(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    lower(candidate, tmp_path / "here", CLASSIFICATION)
    shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    feed = feed_of(candidate)
    np.savez(tmp_path / "feed.npz", **feed)
    script = (
        "import sys, numpy; from pathlib import Path; from compress_search.runtimes import load_runner\n"
        "folder = Path(sys.argv[1]); feed = dict(numpy.load(folder / 'feed.npz'))\n"
        "numpy.save(folder / 'out.npy', load_runner(folder / 'elsewhere', 1)(feed))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), reference(candidate, feed), atol=1e-4)
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "elsewhere").rglob("*.json"))


def test_the_weights_beside_the_onnx_file_are_the_network(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    network, tokenizer = load(tmp_path / "artifact/weights")
    for name, tensor in candidate.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    assert len(tokenizer) == len(candidate.tokenizer)


def test_the_candidate_is_left_as_it_was(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    candidate.network.train()
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    assert candidate.network.training
    assert candidate.network.config._attn_implementation == "sdpa"


def test_lowering_functions_apply_in_order(tmp_path: Path) -> None:
    def named(suffix: str) -> Any:
        def lowering(source: Path, target: Path) -> None:
            model = onnx.load(source)
            model.producer_name += suffix
            onnx.save(model, target)

        return lowering

    candidate = tiny_candidate().replace(lowering=(named("-first"), named("-second")))
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    assert onnx.load(tmp_path / "artifact/model.onnx").producer_name.endswith("-first-second")
    assert load_runner(tmp_path / "artifact", 1)(feed_of(candidate)).shape == (5, 2)


def test_a_failed_lowering_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        lower(tiny_candidate().replace(lowering=(broken,)), tmp_path / "artifact", CLASSIFICATION)
    assert list(tmp_path.iterdir()) == []


def test_lowering_again_replaces_and_survives_a_dead_predecessor(tmp_path: Path) -> None:
    directory = tmp_path / "artifact"
    (tmp_path / ".artifact.tmp/weights").mkdir(parents=True)
    lower(tiny_candidate(), directory, CLASSIFICATION)
    lower(tiny_candidate().replace(runtime={"engine": "torch"}), directory, CLASSIFICATION)
    assert Artifact.read(directory).engine == "torch"
    assert not (directory / "model.onnx").exists()
    assert list(tmp_path.iterdir()) == [directory]


def test_export_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower(tiny_candidate(), tmp_path / "artifact", CLASSIFICATION)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("runtime", "traits", "message"),
    [
        ({"engine": "tensorrt"}, (), "engine 'tensorrt' is unknown: expected one of onnxruntime, torch, compile"),
        ({"engine": "torch"}, ("onnx-only",), "torch cannot run what was lowered"),
        ({"engine": "onnxruntime"}, ("torch-only",), "for torch only"),
        ({"engine": "torch", "attention": "flash"}, (), "attention 'flash' is unknown"),
        ({"engine": "onnxruntime", "attention": "sdpa"}, (), "onnxruntime has no option attention"),
        ({"engine": "torch", "freezing": True}, (), "torch has no option freezing"),
        ({"engine": "torch", "buckets": [16, 8]}, (), r"buckets are ascending widths in tokens, got \[16, 8\]"),
        ({"engine": "torch", "max_length": 0}, (), "max_length is a number of tokens, got 0"),
        ({"engine": "compile"}, ("onnx-only",), "torch cannot run what was lowered"),
    ],
)
def test_impossible_runtimes_are_refused(
    runtime: dict[str, str], traits: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    candidate = tiny_candidate()
    candidate = candidate.replace(runtime=runtime, subject=candidate.subject.having(*traits))
    with pytest.raises(TrialError, match=message):
        lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    assert list(tmp_path.iterdir()) == []


def test_broken_artifacts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"artifact\.json: expected the record of an artefact"):
        load_runner(tmp_path, 1)
    directory = tmp_path / "artifact"
    lower(tiny_candidate(), directory, CLASSIFICATION)
    (directory / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"model\.onnx: no such file"):
        load_runner(directory, 1)
    record = json.loads((directory / "artifact.json").read_text())
    (directory / "artifact.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ExportError, match="expected format 1"):
        Artifact.read(directory)


def test_segments_default_to_zeros(tmp_path: Path) -> None:
    candidate = tiny_candidate("bert")
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    run = load_runner(tmp_path / "artifact", 1)
    feed = feed_of(candidate)
    without = {name: value for name, value in feed.items() if name != "token_type_ids"}
    np.testing.assert_array_equal(run(without), run(feed))


def test_a_timed_study_on_cuda_does_not_run_onnx_on_the_cpu(tmp_path: Path) -> None:
    candidate = tiny_candidate().replace(runtime={"engine": "onnxruntime"})
    timed = candidate.replace(subject=candidate.subject.having("timed", device="cuda"))
    with pytest.raises(TrialError, match="ONNX Runtime has no CUDA provider here"):
        lower(timed, tmp_path / "artifact", CLASSIFICATION)
    there = timed.replace(subject=timed.subject.having("kernel:onnx-cuda"))
    lower(there, tmp_path / "artifact", CLASSIFICATION)
    assert Artifact.read(tmp_path / "artifact").engine == "onnxruntime"


def test_compiling_is_refused_where_it_cannot_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrialError, match=r"cannot run here: there is no C\+\+ compiler no-such-compiler"):
        lower(tiny_candidate().replace(runtime={"engine": "compile"}), tmp_path / "artifact", CLASSIFICATION)


def test_providers_are_asked_for_only_where_they_are_there() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    assert engines.providers_for("cpu", [cuda, cpu]) == [cpu]
    assert engines.providers_for("cuda", [cuda, cpu]) == [cuda, cpu]
    assert engines.providers_for("cuda", ["AzureExecutionProvider", cpu]) == [cpu]


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_buckets_change_the_width_and_nothing_else(task: str, family: str, engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate(family, task)
    for name, runtime in (("plain", {}), ("bucketed", {"buckets": (16, 24)})):
        lower(candidate.replace(runtime={"engine": engine, **runtime}), tmp_path / name, TASKS[task])
    plain, bucketed = (load_runner(tmp_path / name, 1) for name in ("plain", "bucketed"))
    feed = feed_of(candidate)
    widths: list[int] = []
    inner = bucketed.run  # type: ignore[attr-defined]

    def run(batch: Feed) -> NDArray[np.float32]:
        widths.append(batch["input_ids"].shape[1])
        return np.asarray(inner(batch))

    bucketed.run = run  # type: ignore[attr-defined]
    logits, expected = bucketed(feed), plain(feed)
    length = feed["input_ids"].shape[1]
    assert widths == [padded_width(length, (16, 24))]
    assert widths[0] > length
    assert logits.shape == expected.shape
    mask = feed["attention_mask"].astype(bool) if task == "token-classification" else slice(None)
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-5, rtol=0)


def test_a_bucket_is_the_first_that_holds_a_batch() -> None:
    assert [padded_width(length, (8, 16)) for length in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 17]
    assert padded_width(5, ()) == 5


@pytest.mark.parametrize("engine", ["onnxruntime", "torch", pytest.param("compile", marks=pytest.mark.slow)])
def test_one_artefact_runs_every_batch_size_and_length(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BACKEND", "eager")  # traces as Inductor does, and leaves the compiler out
    candidate = tiny_candidate().replace(runtime={"engine": engine})
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    run = load_runner(tmp_path / "artifact", 1)
    for rows, length in ((1, 40), (3, 17)):
        feed = shaped(candidate, rows, length)
        np.testing.assert_allclose(run(feed), reference(candidate, feed), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_graphs_do_no_arithmetic_on_shapes(family: str, tmp_path: Path) -> None:
    candidate = tiny_candidate(family)
    export(candidate.network, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    held = {tensor.name for tensor in graph.initializer}
    assert kinds.count("Reshape") == 4 * candidate.subject.layers
    assert all(node.input[1] in held for node in graph.node if node.op_type == "Reshape")
    assert kinds.count("Shape") <= 1, "the length, where the family cuts its positions to it"
    assert not {"Concat", "Where", "Expand", "Range"} & set(kinds)
    read = {name for node in graph.node for name in node.input} | {"logits"}
    assert all(read.intersection(node.output) for node in graph.node), "what nobody reads is gone"


def shaped(candidate: Candidate, rows: int, length: int) -> Feed:
    ids = np.random.default_rng(length).integers(5, candidate.subject.vocabulary, (rows, length))
    mask = np.ones_like(ids)
    mask[:, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def test_threads_are_the_artefacts_own_and_other_runners_keep_theirs(tmp_path: Path) -> None:
    before, candidate = torch.get_num_threads(), tiny_candidate()
    seen: list[int] = []
    try:
        for name, runtime in (("one", {}), ("two", {"threads": 2})):
            lower(candidate.replace(runtime={"engine": "torch", **runtime}), tmp_path / name, CLASSIFICATION)
        for name in ("two", "one", "two"):
            load_runner(tmp_path / name, threads=1)(feed_of(candidate))
            seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 1, 2]
    lower(candidate.replace(runtime={"threads": 2}), tmp_path / "onnx", CLASSIFICATION)
    session = load_runner(tmp_path / "onnx", threads=1).session  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == 2


@pytest.mark.slow
@pytest.mark.skipif(toolchain() is not None, reason="no C++ compiler here: torch.compile is not exercised")
@pytest.mark.parametrize("buckets", [(), (24,)])
def test_compiled_code_computes_the_same(buckets: tuple[int, ...], tmp_path: Path) -> None:
    candidate = tiny_candidate().replace(runtime={"engine": "compile", "buckets": buckets})
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    run = load_runner(tmp_path / "artifact", 1)
    for rows, length in ((2, 17), (2, 9)):
        feed = shaped(candidate, rows, length)
        np.testing.assert_allclose(run(feed), reference(candidate, feed), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(
    engines.CUDA_PROVIDER not in onnxruntime.get_available_providers(),
    reason="this build of ONNX Runtime has no CUDA provider",
)
def test_onnx_runs_on_cuda(tmp_path: Path) -> None:
    candidate = tiny_candidate()
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    feed = feed_of(candidate)
    run = load_runner(tmp_path / "artifact", 1, "cuda")
    assert run.session.get_providers()[0] == engines.CUDA_PROVIDER  # type: ignore[attr-defined]
    np.testing.assert_allclose(run(feed), reference(candidate, feed), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: torch on CUDA is not exercised")
@pytest.mark.parametrize("engine", ["torch", "compile"])
def test_torch_runs_on_cuda(engine: str, tmp_path: Path) -> None:
    candidate = tiny_candidate().replace(runtime={"engine": engine})
    lower(candidate, tmp_path / "artifact", CLASSIFICATION)
    feed = feed_of(candidate)
    logits = load_runner(tmp_path / "artifact", 1, "cuda")(feed)
    np.testing.assert_allclose(logits, reference(candidate, feed), atol=1e-3)
