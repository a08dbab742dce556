"""The operations that layers call: references, with every kernel of this machine registered beside them."""

from quire.kernels.cpu import ops as _cpu  # noqa: F401  (importing it registers its kernels)
from quire.kernels.reference import act, act_mul, layer_norm, linear, norm_rope, pack_linear, rms_norm

__all__ = ["act", "act_mul", "layer_norm", "linear", "norm_rope", "pack_linear", "rms_norm"]
