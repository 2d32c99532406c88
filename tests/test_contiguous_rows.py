"""Directions that a caller lays as columns become rows in one piece."""

from __future__ import annotations

import pytest
import torch
from untouched import one_thread

from flatcore._C import engine

__all__ = ["one_thread"]

# Shapes (K, P): nothing, one, below, at and above the columns that are copied at a time, several threads' worth.
SHAPES = [(0, 5), (3, 0), (1, 1), (1, 1023), (7, 1024), (8, 1025), (65, 3000), (2, 100_001)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_strides(shape: tuple[int, int], dtype: torch.dtype) -> None:
    K, P = shape
    columns = torch.arange(K * P).reshape(P, K).to(dtype)
    wide = torch.arange(2 * K * 3 * P).reshape(3 * P, 2 * K).to(dtype)
    for rows in (columns.T, wide[::3, ::2].T, columns[:, :1].expand(P, K).T, wide.T[:K, P : 2 * P]):
        copy = engine.contiguous_rows(rows, 0)
        assert copy.is_contiguous()
        assert torch.equal(copy, rows)
        assert copy.numel() == 0 or copy.data_ptr() != rows.data_ptr()


@pytest.mark.usefixtures("one_thread")
def test_one_thread() -> None:
    columns = torch.randn(100_001, 3)
    assert torch.equal(engine.contiguous_rows(columns.T, 0), columns.T)


def test_inference_mode() -> None:
    with torch.inference_mode():
        columns = torch.randn(100_001, 3)
        assert torch.equal(engine.contiguous_rows(columns.T, 0), columns.T)
    assert torch.equal(engine.contiguous_rows(columns.T, 0), columns.T)


def test_views_of_negatives() -> None:
    """torch negates lazily: what lies in memory is the negative of what the view shows."""
    columns = torch.randn(1030, 3, dtype=torch.complex128).conj().imag
    for rows in (columns.T, torch._neg_view(torch.randn(3, 1030))):
        assert rows.is_neg()
        copy = engine.contiguous_rows(rows, 0)
        assert not copy.is_neg()
        assert torch.equal(copy, rows.clone())


def test_too_many() -> None:
    with pytest.raises(RuntimeError, match="overflow"):
        engine.contiguous_rows(torch.ones(16, 1).expand(16, 2**57 + 16384).T, 0)
