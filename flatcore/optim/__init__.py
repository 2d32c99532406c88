"""Training towards flat minima: optimizers and regularisers."""

__all__: list[str] = []
