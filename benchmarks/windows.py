"""How many requests fit in a KV cache that gives up what lies behind windows, computed from its layout.

python -m benchmarks.windows
"""

from quire.attention.groups import cache_layout
from quire.models.registry import decoder_spec
from quire.scheduler.near import Extent

GIB, BLOCK_SIZE, ITEM_BYTES = 40, 64, 2
LENGTHS = (8_192, 32_768, 131_072)
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262_208,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000,
    "rope_local_base_freq": 10_000,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131_072,
    "rope_theta": 150_000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": True,
    "swiglu_limit": 7.0,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
NETWORKS = {"Gemma 3 27B": GEMMA, "GPT-OSS 120B": GPT_OSS, "Mistral 7B v0.1": MISTRAL}


def num_requests(config: dict[str, object], length: int, *, gives_up: bool) -> int:
    """Requests of `length` tokens, each of which is computing its newest one."""
    spec, _ = decoder_spec(config)
    layout = cache_layout(spec, BLOCK_SIZE, ITEM_BYTES, max_length=length if gives_up else None)
    extent = Extent(layout.near, BLOCK_SIZE, max_batched_tokens=1)
    return GIB * 2**30 // (layout.block_bytes * extent.num_blocks(length))


def main() -> None:
    print(f"requests in {GIB} GiB, whole and now | {' | '.join(f'{length:,}' for length in LENGTHS)}")
    for name, config in NETWORKS.items():
        found = [
            f"{num_requests(config, length, gives_up=False)}, {num_requests(config, length, gives_up=True)}"
            for length in LENGTHS
            if length <= int(str(config["max_position_embeddings"]))
        ]
        print(f"{name} | {' | '.join(found)}")


if __name__ == "__main__":
    main()
