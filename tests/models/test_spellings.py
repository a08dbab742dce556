"""Names that checkpoints in the wild have, beside those that Hugging Face writes."""

import pytest

from quire.models.registry import decoder_spec
from tests.models.cases import BY_NAME, config_of

GATE, CORRECTION = "layers.1.mlp.gate.weight", "layers.1.mlp.gate.e_score_correction_bias"
SPELLINGS = (
    ("HYV3", "mlp.router.gate.weight", GATE),
    ("HYV3", "mlp.gate.weight", GATE),
    ("HYV3", "mlp.expert_bias", CORRECTION),
    ("HYV3", "mlp.e_score_correction_bias", CORRECTION),
    ("HYV3", "mlp.shared_mlp.up_proj.weight", "layers.1.mlp.shared.up_proj.weight"),
    ("HYV3", "mlp.shared_experts.up_proj.weight", "layers.1.mlp.shared.up_proj.weight"),
    ("MiniMaxM2", "block_sparse_moe.gate.weight", GATE),
    ("MiniMaxM2", "block_sparse_moe.e_score_correction_bias", CORRECTION),
    ("MiniMaxM2", "block_sparse_moe.experts.3.w2.weight", "layers.1.mlp.experts.3.down_proj.weight"),
    ("ExaoneMoe", "mlp.e_score_correction_bias", CORRECTION),
    ("ExaoneMoe", "mlp.gate.e_score_correction_bias", CORRECTION),
    ("Ernie4_5_Moe", "mlp.moe_statics.e_score_correction_bias", CORRECTION),
    ("Ernie4_5_Moe", "mlp.gate.moe_statics.e_score_correction_bias", CORRECTION),
    ("GraniteMoe", "block_sparse_moe.router.layer.weight", GATE),
    ("HunYuanMoEV1", "mlp.gate.wg.weight", GATE),
    ("Flint", "self_attn.softmax_offset", "layers.1.mixer.sinks"),
    ("Flint", "self_attn.sinks", "layers.1.mixer.sinks"),
    ("Afmoe", "mlp.expert_bias", CORRECTION),
    ("Afmoe", "mlp.router.gate.weight", GATE),
    ("Laguna", "mlp.experts.e_score_correction_bias", CORRECTION),
    ("Laguna", "mlp.gate.e_score_correction_bias", CORRECTION),
    ("Laguna", "mlp.shared_expert.up_proj.weight", "layers.1.mlp.shared.up_proj.weight"),
    ("Kolibri1", "moe.router.expert_bias", CORRECTION),
    ("Kolibri1", "mlp.gate.e_score_correction_bias", CORRECTION),
    ("Kolibri1", "post_ffn_norm.weight", "layers.1.mlp_post_norm.weight"),
    ("MiMoV2Flash", "self_attn.attention_sink_bias", "layers.1.mixer.sinks"),
    ("Step3p5", "moe.router_bias", CORRECTION),
    ("Step3p5", "moe.gate.weight", GATE),
    ("Step3p5", "moe.up_proj.weight", "layers.1.mlp.experts.0.up_proj.weight"),
    ("Step3p5", "share_expert.up_proj.weight", "layers.1.mlp.shared.up_proj.weight"),
    ("Step3p5", "self_attn.g_proj.weight", "layers.1.mixer.gate_proj.weight"),
    ("GraniteMoeSWA", "block_sparse_moe.router.layer.weight", GATE),
    ("GraniteMoeSWA", "block_sparse_moe.router.weight", GATE),
)
IGNORED = (
    ("ExaoneMoe", "mtp.layers.0.mlp.up_proj.weight"),
    ("Ernie4_5_Moe", "model.mtp_block.0.mlp.up_proj.weight"),
    ("MiMo", "model.mtp_layers.0.mlp.up_proj.weight"),
    ("Mellum", "mtp.layers.0.mlp.up_proj.weight"),
    ("HYV3", "model.layers.4.mlp.up_proj.weight"),
    ("Glm4MoeLite", "model.layers.4.eh_proj.weight"),
    ("Gemma4", "model.layers.4.self_attn.v_proj.weight"),
    ("Gemma4", "model.layers.5.self_attn.k_norm.weight"),
    ("DeepseekV32", "model.layers.4.self_attn.indexer.wk.weight"),
    ("GlmMoeDsa", "model.layers.4.self_attn.indexer.wk.weight"),
    ("MiMoV2Flash", "model.mtp.layers.0.mlp.up_proj.weight"),
    ("Step3p5-published", "model.layers.4.transformer.shared_head.norm.weight"),
    ("Step3VL", "vision_model.embeddings.position_embedding.weight"),
    ("Zamba", "model.layers.4.shared_transf.self_attn.q_proj.weight"),
    ("Zamba2", "model.layers.4.shared_transformer.self_attn.q_proj.weight"),
    ("Step3VL", "vit_downsampler2.bias"),
)


@pytest.mark.parametrize(("case", "theirs", "ours"), SPELLINGS)
def test_spellings(case: str, theirs: str, ours: str) -> None:
    _, names = decoder_spec(config_of(BY_NAME[case]))
    name = names.ours(f"model.layers.1.{theirs}")
    assert (names.in_stack(name, 1) or [name]) == [ours]


@pytest.mark.parametrize(("case", "theirs"), IGNORED)
def test_what_does_not_make_the_next_token_is_left_out(case: str, theirs: str) -> None:
    _, names = decoder_spec(config_of(BY_NAME[case]))
    assert names.is_ignored(names.ours(theirs))
