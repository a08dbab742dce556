"""GPT-OSS: sinks in every softmax, every other layer local, experts with biases and clamped gates."""

from quire.models.common import attention, decoder, layer_types, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import MLP, Block, Decoder, MoE, Norm

ALPHA, LIMIT = 1.702, 7.0  # that gates are computed with


def gpt_oss(c: HF) -> tuple[Decoder, Names]:
    """Experts are stored transposed, side by side, gates and ups in turn."""
    for key, known in (("swiglu_alpha", ALPHA), ("swiglu_limit", LIMIT)):
        c.refuse((value := c.get(key, known)) != known, f"{key}={value}")
    c.need("rope_parameters", "rope_scaling")  # Hugging Face's own default is a YaRN of one model
    c.skip("hidden_act", "experts_per_token", "initial_context_length")  # one is not used, others repeat
    norm, hidden = Norm(eps=c.number("rms_norm_eps")), c.count("intermediate_size")
    sliding, local = c.get("sliding_window", 128), layer_types(c, lambda i: i % 2 == 0)
    size, bias = c.count("head_dim"), bool(c.get("attention_bias", True))
    rotary = rope(c, size, theta=150_000.0)
    moe = MoE(
        num_experts=c.count("num_local_experts", "num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=MLP(hidden=hidden, act="swiglu_oai", bias=True),
        router_bias=True,
    )

    def block(i: int) -> Block:
        window = sliding or None if local[i] else None
        own = {"head_dim": size, "rope": rotary, "window": window, "bias": bias, "out_bias": bias}
        return pre_norm(attention(c, sinks=True, **own), moe, norm)

    names = Names(
        renames=(*LLAMA, (r"\.router\.", ".gate.")),
        splits={"gate_up_proj": Split({"gate_proj": hidden, "up_proj": hidden}, per_group=hidden)},
        transposed=("gate_up_proj", "down_proj"),
        stacked=(*STACKED, (r"\.experts\.(gate_up_proj|down_proj)_bias$", r".experts.{}.\1.bias")),
    )
    return decoder(c, block, norm), names
