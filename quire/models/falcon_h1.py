"""Falcon-H1: attention and state spaces side by side in every layer, multipliers everywhere (Zuo et al. 2025)."""

from dataclasses import replace

from quire.errors import ModelError
from quire.models.common import attention, biases, decoder, head_dim, mlp, pre_norm
from quire.models.hf import HF
from quire.models.mamba import HYBRID, scanning
from quire.models.names import Names
from quire.models.spec import Both, Decoder, Norm

RENAMES = (
    (r"^model\.", ""),
    (r"\.self_attn\.", ".mixer.attention."),
    (r"\.mamba\.", ".mixer.states."),
    *HYBRID,
)


def falcon_h1(c: HF) -> tuple[Decoder, Names]:
    """An input's multiplier is left to what is made of the input, which is the same where there is no bias."""
    c.skip("num_logits_to_keep", "mamba_use_mlp")
    norm, into, states_into = (
        Norm(eps=c.number("rms_norm_eps")),
        _factor(c, "attention_in"),
        _factor(c, "ssm_in"),
    )
    c.refuse(into != 1 and bool(c.attention_bias), "attention_in_multiplier with attention_bias")
    c.refuse(states_into != 1 and bool(c.mamba_proj_bias), "ssm_in_multiplier with mamba_proj_bias")
    c.refuse(bool(c.mamba_proj_bias) != bool(c.projectors_bias), "projectors_bias other than mamba_proj_bias")
    scores = _factor(c, "key") * into**2
    scale = None if scores == 1 else head_dim(c) ** -0.5 * scores
    whole = attention(c, num_kv_heads=c.count("num_key_value_heads"), scale=scale, **biases(c))
    gate, down = _factors(c, "mlp_multipliers", 2)
    states = replace(
        scanning(c, norm, c.count("mamba_d_ssm")),
        norm=norm if c.mamba_rms_norm else None,
        norm_first=bool(c.get("mamba_norm_before_gate", True)) and bool(c.mamba_rms_norm),
        scales=tuple(states_into * factor for factor in _factors(c, "ssm_multipliers", 5)),
    )
    both = Both(
        attention=whole,
        states=states,
        attention_scale=into * _factor(c, "attention_out"),
        states_scale=_factor(c, "ssm_out"),
    )
    feed_forward = mlp(c, bias=bool(c.mlp_bias), gate_scale=gate, out_scale=down)
    scales = {"embed_scale": _factor(c, "embedding"), "logit_scale": _factor(c, "lm_head")}
    return decoder(c, pre_norm(both, feed_forward, norm), norm, **scales), Names(renames=RENAMES)


def _factor(c: HF, what: str) -> float:
    return float(c.get(f"{what}_multiplier", 1.0))


def _factors(c: HF, key: str, count: int) -> tuple[float, ...]:
    found = c.get(key) or [1.0] * count
    if len(found) != count:
        raise ModelError(f"config.json: {key} has {len(found)} entries instead of {count}")
    return tuple(map(float, found))
