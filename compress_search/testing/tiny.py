"""Models of a few thousand weights, data they can learn, and a Context that really trains them.

Owns what a test needs in place of a study. Knows nothing of any particular method.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress_search.candidate import Candidate, Subject
from compress_search.data import without_labels
from compress_search.encoders import attach_crf, read_features, subject_of
from compress_search.method import AuxiliaryTask, Batch
from compress_search.tasks import Task
from compress_search.training import Phase, fit, forward, task_loss

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

WORDS = tuple(f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "ai", "ou"))
"""The 84 words of the tiny language; the first half votes for label 0, the second half for label 1."""

START_LAYERS = 2
"""Layers of the small network that students of the tiny task may start from."""

LABELS = {
    "text-classification": ("first", "second"),
    "text-regression": (),
    "token-classification": ("O", "B-X", "I-X"),
}


def tiny_tokenizer(family: str = "bert") -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of the family's input names and special ids, over :data:`WORDS` and their letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    roberta = "roberta" in family
    special = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    )
    cls, pad, sep, unk, mask = special if roberta else [special[i] for i in (2, 0, 3, 1, 4)]
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    words = Tokenizer(models.WordPiece(ids, unk_token=unk))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    second = 0 if roberta else 1
    words.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:{second} {sep}:{second}",
        special_tokens=[(token, ids[token]) for token in (cls, sep)],
    )
    names = ["input_ids", "attention_mask"]
    if family in ("bert", "electra"):
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        cls_token=cls,
        pad_token=pad,
        sep_token=sep,
        unk_token=unk,
        mask_token=mask,
        model_input_names=names,
    )


def tiny_candidate(
    family: str = "bert",
    task: str = "text-classification",
    layers: int = 4,
    *,
    hidden: int = 32,
    heads: int = 4,
    intermediate: int = 64,
    seed: int = 0,
) -> Candidate:
    """An untrained encoder of this family (bert, roberta, xlm-roberta, electra, distilbert) with the task's head.

    Its weights are drawn wide (standard deviation 0.2) so that outputs differ visibly between inputs.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    tokenizer = tiny_tokenizer(family)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    sizes |= {"intermediate_size": intermediate, "embedding_size": hidden}
    if family == "distilbert":
        sizes = {"n_layers": layers, "n_heads": heads, "dim": hidden, "hidden_dim": intermediate}
    labels = LABELS[task] or ("value",)
    config = AutoConfig.for_model(
        family,
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    config.problem_type = "regression" if task == "text-regression" else None
    token = task == "token-classification"
    auto: Any = AutoModelForTokenClassification if token else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = auto.from_config(config, attn_implementation="sdpa").eval()
    return Candidate(network, tokenizer, subject_of(network, task))


def tiny_batches(
    candidate: Candidate, *, batch_size: int = 8, seed: int = 0, examples: int | None = None
) -> Iterator[Batch]:
    """Batches of the tiny task the candidate's subject names, padded to their longest row; endless by default.

    The text label says which half of :data:`WORDS` holds the majority (its share, for regression); a word of the
    second half opens or continues an entity.
    """
    rng = np.random.default_rng(seed)
    done = 0
    while examples is None or done < examples:
        rows = batch_size if examples is None else min(batch_size, examples - done)
        yield _batch(candidate, rng, np.arange(done, done + rows))
        done += rows


def _batch(candidate: Candidate, rng: np.random.Generator, index: np.ndarray[Any, Any]) -> Batch:
    texts = [rng.choice(len(WORDS), size=int(rng.integers(3, 13))) for _ in index]
    tokenizer = candidate.tokenizer
    encoding = tokenizer([" ".join(WORDS[i] for i in text) for text in texts], padding=True, return_tensors="pt")
    batch: Batch = encoding.data
    if candidate.subject.task == "token-classification":
        labels = torch.full(batch["input_ids"].shape, -100)
        for row, text in enumerate(texts):
            inside = text >= len(WORDS) // 2
            opens = inside & ~np.concatenate([[False], inside[:-1]])
            words = encoding.word_ids(row)
            firsts = [words.index(word) for word in range(len(text))]  # a word can be several pieces
            labels[row, firsts] = torch.as_tensor(np.where(opens, 1, np.where(inside, 2, 0)))
    else:
        share = torch.tensor([(text >= len(WORDS) // 2).mean() for text in texts], dtype=torch.float32)
        labels = share if candidate.subject.task == "text-regression" else (share > 0.5).long()
    return batch | {"labels": labels, "index": torch.as_tensor(index)}


@dataclass
class TinyContext:
    """A working :class:`~compress_search.Context` over the tiny task.

    ``steps`` is the whole training budget of a method, ``examples`` how many its training data have; ``fits``
    records the steps of each call of :meth:`fit`.
    """

    candidate: Candidate
    scratch: Path
    seed: int = 0
    dry: bool = False
    steps: int = 6
    batch_size: int = 8
    examples: int = 64
    fits: list[int] = field(default_factory=list)
    share_spent: float = 0.0
    training: bool = False
    """Whether :meth:`fit` is running now."""

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")
        task = self.candidate.subject.task
        self.task = Task(task, LABELS[task], entities=task == "token-classification")
        self.teacher: nn.Module = deepcopy(self.candidate.network).eval().requires_grad_(False)

    def untrained(self) -> nn.Module | None:
        """The tiny network of the teacher's configuration with other random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network: nn.Module = type(self.candidate.network)(self.candidate.network.config)  # type: ignore[operator]
        attach_crf(network)
        return network.eval()

    def student_start(self) -> nn.Module | None:
        """A network of the candidate's family and width with :data:`START_LAYERS` layers and random weights."""
        config: Any = deepcopy(self.candidate.network.config)
        config.num_hidden_layers = START_LAYERS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network: nn.Module = type(self.candidate.network)(config)  # type: ignore[operator]
        attach_crf(network)
        return network.eval()

    def masked_lm(self) -> nn.Module | None:
        """A language model of the candidate's family and size over the tiny language, with random weights."""
        from transformers import AutoModelForMaskedLM

        config = deepcopy(self.candidate.network.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            network: nn.Module = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
        return network.eval().requires_grad_(False)

    def fit(self, network: nn.Module, **options: Any) -> None:
        """Train on tiny batches for ``share`` of the budget, as the engine's loop does."""
        phase = Phase(**options)
        steps = 0 if self.dry else phase.steps(self.steps, self.share_spent)
        self.share_spent += phase.share
        self.fits.append(steps)
        own = tiny_batches(self.candidate, batch_size=self.batch_size, seed=self.seed + len(self.fits))
        self.training = True
        try:
            fit(
                network,
                phase.batches or own,
                steps,
                phase.loss or self.task_loss,
                learning_rate=1e-3 if phase.learning_rate is None else phase.learning_rate,
                warmup=0.1,
                weight_decay=0.01,
                device=self.device,
                seed=self.seed,
                parameters=phase.parameters,
                beside=phase.beside,
                on_step=phase.on_step,
            )
        finally:
            self.training = False

    def task_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The task's loss on the labels of a batch."""
        return task_loss(self.task)(network, batch)

    def teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits, (B, C) or (B, S, C)."""
        with torch.no_grad():
            return forward(self.teacher, batch)

    def teacher_outputs(self, batch: Batch, features: Collection[str]) -> dict[str, Tensor]:
        """What the teacher computes on the way, by the features' names."""
        with torch.no_grad():
            return read_features(self.teacher, batch, features)

    def training_batches(self) -> Iterator[Batch]:
        """Endless batches of the tiny task, others for each phase."""
        return tiny_batches(self.candidate, batch_size=self.batch_size, seed=self.seed + len(self.fits) + 2000)

    def auxiliary(self) -> list[AuxiliaryTask]:
        """Two further tasks, classes of texts and tags of four times as many, by teachers of random weights."""
        kinds = {"text-classification": self.examples, "token-classification": 4 * self.examples}
        return [self._further(kind, examples, 3000 + 100 * n) for n, (kind, examples) in enumerate(kinds.items())]

    def _further(self, kind: str, examples: int, seed: int) -> AuxiliaryTask:
        teacher, task = tiny_candidate(self.candidate.subject.family, kind, seed=4), Task(kind, LABELS[kind])
        batches = tiny_batches(teacher, batch_size=self.batch_size, seed=self.seed + len(self.fits) + seed)

        def teacher_logits(batch: Batch) -> Tensor:
            with torch.no_grad():
                return forward(teacher.network, batch)

        return AuxiliaryTask(kind, task.outputs, examples, batches, task.loss, teacher_logits)

    def unlabelled(self, batch_size: int, *, once: bool = False) -> Iterator[Batch]:
        """Batches of the tiny task without labels and row numbers, endless or of as many texts as it trains on."""
        number = self.examples if once else None
        return without_labels(
            tiny_batches(self.candidate, batch_size=batch_size, seed=self.seed + 1000, examples=number)
        )

    def calibration(self, examples: int, batch_size: int = 32) -> Iterator[Batch]:
        """Batches of the tiny task, the same ones for the same seed; no more examples than it trains on."""
        number = min(examples, self.examples)
        return tiny_batches(self.candidate, batch_size=batch_size, seed=self.seed, examples=number)

    def layer_latency(self, subject: Subject) -> Callable[[int, int], float]:
        """A made-up machine, on which a layer takes a nanosecond for each of its weights."""
        width = subject.hidden
        return lambda heads, neurons: 1e-6 * width * (4 * heads * subject.head_dim + 2 * neurons)


def tiny_context(
    candidate: Candidate,
    *,
    seed: int = 0,
    dry: bool = False,
    steps: int = 6,
    batch_size: int = 8,
    scratch: Path | None = None,
) -> TinyContext:
    """A context whose teacher is a frozen copy of the candidate.

    Its scratch directory is a temporary one by default, and goes when the context does.
    """
    context = TinyContext(candidate, scratch or Path(tempfile.mkdtemp(prefix="compress-search-")), seed, dry, steps)
    context.batch_size = batch_size
    if scratch is None:
        weakref.finalize(context, shutil.rmtree, context.scratch, ignore_errors=True)
    return context
