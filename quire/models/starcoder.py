"""StarCoder 2: layer norms and biases, a plain feed-forward layer, all layers local."""

from quire.models.common import attention, decoder, mlp, pre_norm, tied_by_default
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Decoder, Norm


def starcoder2(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(kind="layer", eps=c.number("norm_epsilon"), bias=True)
    bias = bool(c.get("use_bias", True))
    attn = attention(c, window=c.sliding_window, bias=bias, out_bias=bias)
    renames = (*LLAMA, (r"\.c_fc\.", ".up_proj."), (r"\.c_proj\.", ".down_proj."))
    block = pre_norm(attn, mlp(c, gated=False, bias=bias), norm)
    return decoder(c, block, norm, tied=tied_by_default(c)), Names(renames=renames)
