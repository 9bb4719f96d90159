"""Rounding weights to few bits: which values a matrix may take, how many bytes they need, and gradients past it.

Owns the formulas, pure functions of tensors. Knows nothing of networks, files or searches. The uniform grids are
those of ONNX Runtime's own quantizers, so that weights rounded here come out of those unchanged.

Sources: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference; Li et al. 2016, Ternary Weight Networks; Rastegari et al. 2016, XNOR-Net; Zhang et al. 2020, TernaryBERT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["signed", "block", "affine", "ternary", "binary"]
Share = Literal["tensor", "channel"] | int
"""Which weights of a matrix (outputs, inputs) share a scale: all, a row, or so many neighbours in a row."""

TERNARY_THRESHOLD = 0.7
"""Weights below this part of the mean magnitude become zero [Li et al. 2016, section 2.3]."""

CLIP = 2.5
"""Beyond this magnitude a ternary or binary weight takes no gradient, as in TernaryBERT's code."""

CODEBOOK: dict[Kind, tuple[int, ...]] = {"ternary": (-1, 0, 1), "binary": (-1, 1)}
"""The codes of the grids that have no kernel."""


@dataclass(frozen=True)
class Grid:
    """The values code · scale that the weights of a matrix may take.

    ``signed``: codes from −m to m, scale max|w| / m, where m = 2^(bits−1) − 1 (64 when ``reduced``, so that pairs
    of products fit 16 bits). ``block``: codes from −2^(bits−1) to 2^(bits−1) − 1, and the scale takes the weight of
    the largest magnitude to the lowest code. ``affine``: codes from −z to 2^bits − 1 − z, with a zero point z and a
    scale that spread all codes between the extremes of the weights, 0 among them. ``ternary``: −α, 0, α, with α the
    mean magnitude beyond the threshold. ``binary``: ±α, with α the mean magnitude; it alone has no zero.
    """

    kind: Kind
    bits: int
    share: Share = "channel"
    reduced: bool = False

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code; of ``affine`` grids before their zero points are taken off."""
        if self.kind in CODEBOOK:
            return -1, 1
        if self.kind == "affine":
            return 0, (1 << self.bits) - 1
        half = 1 << (self.bits - 1)
        if self.kind == "block":
            return -half, half - 1
        bound = 64 if self.reduced else half - 1
        return -bound, bound

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (rows, n) and scales (rows, 1) of a matrix, a row for each scale; groups are padded with zeros."""
        rows = _rows(weight, self.share)
        scales = self._scales(rows)
        if self.kind == "ternary":
            return rows.sign() * (rows.abs() > _threshold(rows)), scales
        if self.kind == "binary":
            return torch.where(rows < 0, -1.0, 1.0).to(rows), scales
        zeros = self._zeros(rows, scales)
        return ((rows / scales).round() + zeros).clamp(*self.codes) - zeros, scales

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values on the grid, in the shape (outputs, inputs) of the matrix."""
        codes, scales = self.encode(weight)
        return _matrix(codes * scales, weight)

    def scales(self, weight: Tensor) -> Tensor:
        """The size of a step at each weight, in the matrix's shape."""
        rows = _rows(weight, self.share)
        return _matrix(self._scales(rows).abs().expand_as(rows), weight)

    def inside(self, weight: Tensor) -> Tensor:
        """Whether each weight lies in the clip range: no further than half a step beyond the outermost codes."""
        if self.kind in CODEBOOK:
            return weight.abs() <= CLIP
        rows = _rows(weight, self.share)
        low, high = self.codes
        scales = self._scales(rows)
        steps = rows / scales + self._zeros(rows, scales)
        return _matrix((steps >= low - 0.5) & (steps <= high + 0.5), weight)

    def stored_bits(self, outputs: float, inputs: float) -> float:
        """Bits of such a matrix in a file, scales included; sizes may be means."""
        number = outputs * inputs
        scales = 1 if self.share == "tensor" else outputs
        if self.kind in CODEBOOK:
            return 8 * math.ceil(number / digits(len(CODEBOOK[self.kind]))) + 32 * scales
        if isinstance(self.share, int):
            groups = math.ceil(inputs / self.share)
            zeros = 8 * math.ceil(groups * self.bits / 8) if self.kind == "affine" else 0
            return outputs * (groups * (self.share * self.bits + 32) + zeros)
        return number * self.bits + scales * (32 + 8)  # a zero point beside each scale

    def _scales(self, rows: Tensor) -> Tensor:
        magnitudes = rows.abs()
        if self.kind == "binary":
            return magnitudes.mean(dim=1, keepdim=True)  # 0 where all weights are: no code of it is
        if self.kind == "ternary":
            kept = magnitudes > _threshold(rows)
            scales = (magnitudes * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        elif self.kind == "signed":
            scales = magnitudes.amax(dim=1, keepdim=True) / self.codes[1]
        elif self.kind == "affine":
            low, high = rows.amin(dim=1, keepdim=True).clamp(max=0), rows.amax(dim=1, keepdim=True).clamp(min=0)
            scales = (high - low) / self.codes[1]
        else:
            scales = rows.gather(1, magnitudes.argmax(dim=1, keepdim=True)) / self.codes[0]
        return torch.where(scales == 0, torch.ones_like(scales), scales)  # nothing but zeros: any scale will do

    def _zeros(self, rows: Tensor, scales: Tensor) -> Tensor:
        """The code of 0, of each row (rows, 1); only ``affine`` grids choose one."""
        if self.kind != "affine":
            return torch.zeros_like(scales)
        return (-rows.amin(dim=1, keepdim=True).clamp(max=0) / scales).round().clamp(*self.codes)


def digits(levels: int) -> int:
    """How many codes of so many levels fit a byte: 8 of two, 5 of three."""
    return int(math.log(256.5, levels))


def pack(codes: Tensor, levels: int) -> Tensor:
    """Codes 0 … levels − 1 as digits of bytes, the first one lowest; the last byte is filled with zeros."""
    width = digits(levels)
    flat = F.pad(codes.flatten().long(), (0, -codes.numel() % width)).view(-1, width)
    places: Tensor = levels ** torch.arange(width)
    return (flat * places).sum(dim=1).to(torch.uint8)


def unpacked(levels: int) -> Tensor:
    """The codes that each byte stands for, (levels ** width, width): the inverse of :func:`pack`, row by row."""
    width = digits(levels)
    places: Tensor = levels ** torch.arange(width)
    return torch.arange(levels**width)[:, None] // places % levels


def straight_through(weight: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """``values`` going forward; going backward a gradient of 1 for ``weight`` where ``inside`` holds, else of 0."""
    return values.detach() + (weight - weight.detach()) * inside


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """A matrix rounded to its grid with a straight-through gradient; zeros on a grid that has one stay zeros."""
    inside = grid.inside(weight)
    if grid.kind != "binary":
        inside = inside & (weight != 0)
    return straight_through(weight, grid.round(weight), inside)


def fake_quantize_activations(x: Tensor, bits: int = 8) -> Tensor:
    """Activations rounded to 2^bits levels between their extremes, 0 among them: DynamicQuantizeLinear's at 8."""
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    most = (1 << bits) - 1
    scale = (high - low) / most
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, most)
    values = ((x / scale).round() + zero).clamp(0, most) - zero
    return straight_through(x, values * scale, torch.ones_like(x, dtype=torch.bool))


def _threshold(rows: Tensor) -> Tensor:
    return TERNARY_THRESHOLD * rows.abs().mean(dim=1, keepdim=True)


def _rows(weight: Tensor, share: Share) -> Tensor:
    """One row for each scale."""
    if share == "tensor":
        return weight.reshape(1, -1)
    if share == "channel":
        return weight
    return F.pad(weight, (0, -weight.shape[1] % share)).view(-1, share)


def _matrix(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_rows`, padding dropped."""
    return rows.reshape(len(like), -1)[:, : like.shape[1]]
