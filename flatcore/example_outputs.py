"""The loss' second derivative in the outputs of each example, as cotangents to sweep back from."""

from __future__ import annotations

import torch
from torch import Tensor

from flatcore._C import engine
from flatcore.capture import ProbedProgram
from flatcore.vectors import Layout


class Outputs:
    """The loss' second derivative S_n in the outputs of the examples of one batch, taken apart.

    value: the program's value that stands for the outputs: of a cross-entropy its logits, else the cut.
    """

    def __init__(
        self, program: ProbedProgram, state: engine.Linearization, examples: int, layout: Layout
    ) -> None:
        self._state, self._examples = state, examples
        self._dtype, self._device = layout.dtype, layout.device
        self._loss = program.cross_entropy
        self._number = program.ops.index(self._loss) if self._loss is not None else -1
        # Of no use: what is the same for all probes, and targets of negative weight, whose S_n has no real root.
        fixed = self._loss is not None and state.adjoint(self._loss.output) is None
        if self._loss is not None and (fixed or bool((self._probabilities()[1] < 0).any())):
            self._loss = None
        head = self._loss.inputs[0] if self._loss is not None else program.cut[0]
        assert head is not None
        self.value, self._shape = head, program.values[head].shape

    def factors(self) -> list[tuple[float, Tensor]]:
        """Signs s and cotangents (outputs, *shape), sum over both of s a_nj a_njᵀ = S_n."""
        if self._loss is not None:
            rows, classes = self._roots()
            # One row of an example at a time.
            each = rows.reshape(self._examples, -1, classes, classes)
            outputs = each.shape[1] * classes
            apart = torch.zeros(
                *each.shape[1:3],
                self._examples,
                *each.shape[1:2],
                classes,
                dtype=each.dtype,
                device=each.device,
            )
            for row in range(each.shape[1]):
                apart[row, :, :, row] = each[:, row].transpose(0, 1)
            return [(1.0, apart.reshape(outputs, *self._shape).to(self._dtype))]
        outputs = torch.Size(self._shape).numel() // self._examples
        columns = torch.eye(outputs, dtype=self._dtype, device=self._device).unsqueeze(1)
        columns = columns.expand(outputs, self._examples, outputs)
        curvature = self._state.cut_curvature(columns.reshape(outputs, *self._shape).contiguous())
        S = curvature.reshape(outputs, self._examples, outputs).permute(1, 0, 2).double()
        values, vectors = torch.linalg.eigh((S + S.mT) / 2)
        rounding = 16 * outputs * torch.finfo(self._dtype).eps * values.abs().max()
        roots = vectors * values.abs().sqrt().unsqueeze(1)  # (examples, outputs, j)
        found = []
        for sign, kept in ((1.0, values > 0), (-1.0, values < -rounding)):
            used = kept.any(0)  # eigenvalues are in order: the same places in most examples
            if used.any():
                columns = (roots * kept.unsqueeze(1))[:, :, used].permute(2, 0, 1)
                found.append((sign, columns.reshape(-1, *self._shape).to(self._dtype)))
        return found

    def sampled(self, seed: int, first: int, K: int, first_example: int) -> Tensor | None:
        """Cotangents a_kn (K, *shape) of random signs, whose mean a_kn a_knᵀ is S_n; None where that takes more than
        random signs."""
        if self._loss is None:
            return None
        p, weights = self._probabilities()
        count = p.numel() // self._examples
        signs = engine.output_signs(p, seed, first, K, first_example, self._examples, count)
        draws = signs.reshape(K, *p.shape) * (weights.unsqueeze(-1) * p).sqrt()
        return (draws - p * draws.sum(-1, keepdim=True)).reshape(K, *self._shape).to(self._dtype)

    def _roots(self) -> tuple[Tensor, int]:
        """Of a cross-entropy's S = w (diag p - p pᵀ) = sum_j w p_j (e_j - p) (e_j - p)ᵀ in every row of logits:
        (rows, j, classes)."""
        p, weights = self._probabilities()
        classes = p.shape[-1]
        apart = torch.eye(classes, dtype=p.dtype, device=p.device) - p.reshape(-1, 1, classes)
        return apart * (weights.unsqueeze(-1) * p).reshape(-1, classes, 1).sqrt(), classes

    def _probabilities(self) -> tuple[Tensor, Tensor]:
        assert self._loss is not None and self._loss.inputs[1] is not None
        mass = self._state.value(self._loss.inputs[1])
        mass = mass if self._loss.inputs[2] is not None else mass.sum(-1)
        weights = self._state.adjoint(self._loss.output) * mass
        return self._state.saved(self._number)[0].double(), weights.double()
