"""The Fisher-Rao norm: the parameters' own length in the Fisher metric."""

from __future__ import annotations

import time

from flatcore.measures.ascent import flat_parameters
from flatcore.measures.derived import check_objective
from flatcore.measures.result import Measure
from flatcore.objective import Objective
from flatcore.operators import GGN, GradientCovariance

__all__ = ["fisher_rao"]


def fisher_rao(objective: Objective, *, empirical: bool = False) -> Measure:
    """thetaᵀ F theta, F the Fisher information of the model at the data's inputs; the squared norm, no root taken.

    Liang, Poggio, Rakhlin and Stokes, "Fisher-Rao Metric, Geometry, and Complexity of Neural Networks", AISTATS 2019.
    F is the Gauss-Newton matrix, which is the Fisher matrix of labels drawn from the model for a cross-entropy, and for
    half the squared error with unit variance. ``empirical``: (1/n) sum g gᵀ over the data's labels instead.

    For a net without biases whose activations are homogeneous, with L weight layers, <theta, df/dtheta> = L f: the
    value is L² E_x Var_{k ~ p} f_k, empirical L² E (<p, f> - f_y)². With biases or normalisation that does not hold
    (constants for single architectures are in use elsewhere; the definition needs none).

    Units: those of the mean loss; with a sum over n examples n times this, and for mean squared error as torch takes it
    2 / outputs times that of half the squared error; ``empirical`` the squares of these factors.
    Cost: one quadratic form, half of a product or less.
    Invariant to scaling neurons and layers (all parameters of theirs selected), and whatever else is linear in the
    parameters and leaves the function. Not invariant to: the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments and for losses without a Gauss-Newton matrix.
    """
    began = time.perf_counter()
    objective = check_objective(objective)
    A = GradientCovariance(objective, centered=False) if empirical else GGN(objective)
    return Measure(
        value=float(A.quadratic_form(flat_parameters(objective))),
        stderr=0.0,
        by_layer=None,
        definition=f"thetaᵀ F theta, F {'= (1/n) sum g gᵀ' if empirical else 'the Gauss-Newton matrix'}",
        matvecs=1,
        name="Fisher-Rao norm",
        seconds=time.perf_counter() - began,
    )
