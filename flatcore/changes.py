"""What is looked at before every product for a change since the last one; the extension does it, because a product of
a small net takes less time than the same in Python.

versions(tensors): bytes that change when one of the tensors is changed in place or given new storage.
of_modules(model, loss): the versions of a model's parameters; those of its buffers, and of the loss' tensors where that
    is a module; which modules there are, and their modes.
Comparison(before, now): of tensors with copies of them, by their bytes; on a GPU begun here, and waited for by
    ``equal()``.
"""

from __future__ import annotations

from flatcore._C import changes

Comparison = changes.Comparison
of_modules = changes.of_modules
versions = changes.versions

__all__ = ["Comparison", "of_modules", "versions"]
