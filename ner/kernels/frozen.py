"""Products with weights that do not train, in the layout that oneDNN computes them in.

This file is the only one that calls private operators of PyTorch. `FrozenWeights.supports` says where they exist;
elsewhere, and with `kernels: plain`, the plain product is taken.
"""

import os

import torch

from ner.precision import cpu_has_bfloat16

# oneDNN compiles a product for each new shape and keeps 1,024 of them. An epoch's batches have more shapes than that,
# so that with the default each is compiled again in every epoch.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")


class FrozenWeights:
    """The weights of linear layers that read the same input, joined and laid out once instead of at each product.

    oneDNN reorders a weight [out, in] for each product, a fifth of the time of a small one. Here the weight and, for
    the gradient of the input, its transpose are reordered once, and again when the weight is replaced or changed.
    A change through `.data` leaves no trace and is noticed only when an adapter is merged or taken off with it.
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._weights: list[torch.Tensor] = []
        self._reordered: torch.Tensor | None = None  # [out, in]
        self._reordered_transpose: torch.Tensor | None = None  # [in, out]
        self._zero_bias: torch.Tensor | None = None  # [in]

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Return whether weights like this one have a layout of their own on this machine."""
        return (
            weight.device.type == "cpu"
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu_has_bfloat16()))
        )

    def update(self, weights: list[torch.Tensor], has_adapter: bool) -> bool:
        """Take over these weights, each [out_i, in]; return False where they train or have no layout of their own."""
        if any(weight.requires_grad for weight in weights) or not self.supports(weights[0]):
            return False
        key = has_adapter, [(weight.data_ptr(), weight._version) for weight in weights]
        if key != self._key:
            self._key = key
            # Kept alive, so that no other weight can come to lie at the same address.
            self._weights = [weight.detach() for weight in weights]
            self._reordered = torch.ops.mkldnn._reorder_linear_weight(torch.cat(self._weights), None)
            self._reordered_transpose = None
        return True

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x Wᵀ + b: x [rows, in], b [out] or None → [rows, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._reordered, bias, "none", [], "")

    def product_of_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """Return dy W: dy [rows, out] → [rows, in]."""
        if self._reordered_transpose is None:
            transpose = torch.cat(self._weights).t().contiguous()
            self._reordered_transpose = torch.ops.mkldnn._reorder_linear_weight(transpose, None)
            # With a bias, even of zeros, this is the product that a forward pass has compiled already.
            self._zero_bias = transpose.new_zeros(len(transpose))
        return torch.ops.mkldnn._linear_pointwise(dy, self._reordered_transpose, self._zero_bias, "none", [], "")
