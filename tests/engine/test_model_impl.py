"""Networks of Transformers' modules through the whole engine, and the option that chooses the road."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.errors import CheckpointError, ConfigError, ModelError, UnsupportedModel
from quire.models.spec import Decoder, Foreign
from tests.engine.test_oracle import ENGINE, SETTINGS, check_who_makes_way, prompts_of, reference
from tests.models.cases import BY_NAME, VOCAB_SIZE, Case, build_hf
from tests.models.composites import CASES as COMPOSITES
from tests.models.composites import build as build_composite

NUM_OUTPUTS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
BERT = SIZES | {"intermediate_size": 112, "max_position_embeddings": 66, "is_decoder": True}
BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 112,
    "max_position_embeddings": 64,
}
# With windows and scaled embeddings, sinks and biases in experts, values unlike keys, learned positions and transposed
# weights, experts in tensors of their own, a window that is left to a mask, tied weights, states beside attention and
# such that a module forgets between chunks, learned positions that start elsewhere than at 0; and one that has no
# family.
CASES = (
    *(
        BY_NAME[name]
        for name in (
            "Gemma3",
            "GptOss",
            "DeepseekV3",
            "GPT2",
            "Mixtral",
            "Qwen2Moe",
            "Llama-tied",
            "Lfm2",
            "Jamba",
        )
    ),
    Case("Bert", BERT, "BertLMHeadModel"),
    Case("Roberta", BERT),
    *(BY_NAME["Falcon"], Case("Bart", BART)),  # one sequence at a time
    Case("DiffLlama", SIZES | {"intermediate_size": 112, "max_position_embeddings": 64}),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_equals_hugging_face(case: Case, tmp_path: Path) -> None:
    model = build_hf(case, tmp_path)
    prompts = prompts_of(case)
    want = [reference(model, p)[0] for p in prompts]
    for chunk, backend, block_size, caching in SETTINGS:
        options = {
            "max_num_batched_tokens": chunk,
            "attention_backend": backend,
            "block_size": block_size,
            "enable_prefix_caching": caching,
            "model_impl": "transformers",
        }
        with LLM(str(tmp_path), **ENGINE, **options) as llm:
            alone = llm.generate(prompts[-1], GREEDY, use_tqdm=False)
            batch = llm.generate(prompts, GREEDY, use_tqdm=False)
            again = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert alone[0].outputs[0].token_ids == want[-1], options
        for outputs in (batch, again):
            assert [o.outputs[0].token_ids for o in outputs] == want, options
        assert any(o.num_cached_tokens for o in again) == caching


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_who_makes_way_ends_as_if_alone(case: Case, tmp_path: Path) -> None:
    check_who_makes_way(case, tmp_path, model_impl="transformers")


@pytest.mark.parametrize(("name", "cache_bytes"), [("Llama", 192 * 1024), ("Lfm2", 184 * 1024)])
def test_preempted_requests_go_on(name: str, cache_bytes: int, tmp_path: Path) -> None:
    model = build_hf(BY_NAME[name], tmp_path)
    prompts = prompts_of(BY_NAME[name])
    want = [reference(model, p)[0] for p in prompts]
    few = {
        "block_size": 4,
        "attention_backend": "reference",
        "kv_cache_memory_bytes": cache_bytes,
        "max_model_len": 64,
    }
    with LLM(str(tmp_path), **ENGINE, **few, model_impl="transformers") as llm:
        got = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.engine.core.scheduler.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in got] == want


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma3", {}),
        pytest.param("Qwen2Moe", {}, marks=pytest.mark.slow),
        pytest.param("DeepseekV3", {}, marks=pytest.mark.slow),
        pytest.param("Mixtral", {"load_format": "dummy"}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_say_what_one_does(name: str, options: dict[str, str], tmp_path: Path) -> None:
    """By the plan of the modules' authors."""
    build_hf(BY_NAME[name], tmp_path)
    prompts, found = prompts_of(BY_NAME[name]), []
    how = {**ENGINE, **options, "model_impl": "transformers", "max_num_batched_tokens": 16}
    for size in (1, 2):
        with LLM(str(tmp_path), **how, tensor_parallel_size=size) as llm:
            found.append(llm.generate(prompts, GREEDY, use_tqdm=False))
    assert [o.outputs[0].token_ids for o in found[0]] == [o.outputs[0].token_ids for o in found[1]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("GPT2", "made no plan"), ("Falcon", "attend themselves"), ("GptOss", "cuts no layer")],
)
def test_several_processes_are_refused_where_there_is_no_plan(name: str, reason: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is 2.*{reason}"):
        LLM(str(tmp_path), **ENGINE, model_impl="transformers", tensor_parallel_size=2)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    build_hf(BY_NAME["Llama"], tmp_path)
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"auto_map": named}))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of a model ran')")
    with LLM(str(tmp_path), **ENGINE, model_impl="transformers") as llm:
        assert isinstance(llm.spec, Foreign)


def test_the_road_is_chosen_by_the_architecture_and_the_option(tmp_path: Path) -> None:
    build_hf(BY_NAME["Llama"], tmp_path)
    for wanted, kind in (("auto", Decoder), ("native", Decoder), ("transformers", Foreign)):
        with LLM(str(tmp_path), **ENGINE, model_impl=wanted) as llm:
            assert isinstance(llm.spec, kind)


def test_a_class_without_a_family_takes_the_other_road(tmp_path: Path) -> None:
    build_hf(CASES[-1], tmp_path)
    with LLM(str(tmp_path), **ENGINE) as llm:
        assert isinstance(llm.spec, Foreign)
    with pytest.raises(UnsupportedModel, match="DiffLlamaForCausalLM, so it is not native.*transformers"):
        LLM(str(tmp_path), **ENGINE, model_impl="native")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DeepseekV32", "do not run with another's attention"),
        ("Xverse", "has no XverseForCausalLM that generates text"),
    ],
)
def test_where_others_modules_cannot_run_the_native_road_is_named(
    name: str, reason: str, tmp_path: Path
) -> None:
    build_hf(BY_NAME[name], tmp_path)
    with pytest.raises(UnsupportedModel, match=f"{reason}.*native.*leave out --model-impl"):
        LLM(str(tmp_path), **ENGINE, model_impl="transformers")


def test_where_a_family_refuses_a_value_the_other_road_is_named(tmp_path: Path) -> None:
    case = Case("StableLm", {**BY_NAME["StableLm"].values, "qk_layernorm": True})
    model, prompts = build_hf(case, tmp_path), prompts_of(case)
    with pytest.raises(UnsupportedModel, match="qk_layernorm=True.*not supported.*--model-impl transformers"):
        LLM(str(tmp_path), **ENGINE)
    with LLM(str(tmp_path), **ENGINE, model_impl="transformers") as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [reference(model, p)[0] for p in prompts]


def test_so_it_is_where_only_text_is_native(tmp_path: Path) -> None:
    build_composite(next(case for case in COMPOSITES if case.id == "Gemma3"), tmp_path)
    with pytest.raises(UnsupportedModel, match="several networks.*native.*leave out --model-impl"):
        LLM(str(tmp_path), **ENGINE, model_impl="transformers")


def test_what_others_modules_cannot_do_is_refused(tmp_path: Path) -> None:
    build_hf(BY_NAME["Llama"], tmp_path)
    with pytest.raises(ConfigError, match="deterministic is set.*native"):
        LLM(str(tmp_path), **ENGINE, model_impl="transformers", deterministic=True)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_weights_are_quantized_while_they_load(bits: str, tmp_path: Path) -> None:
    """Tokens are those of the native road, whose products are the same."""
    build_hf(BY_NAME["Qwen3-wide"], tmp_path)
    prompts, got = prompts_of(BY_NAME["Qwen3-wide"]), []
    for wanted in ("native", "transformers"):
        with LLM(str(tmp_path), **ENGINE, model_impl=wanted, quantization=bits) as llm:
            got.append([o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)])
    assert got[0] == got[1]


def test_dummy_weights_need_no_files(tmp_path: Path) -> None:
    build_hf(BY_NAME["Mixtral"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    texts = []
    for _ in range(2):
        with LLM(str(tmp_path), **ENGINE, model_impl="transformers", load_format="dummy") as llm:
            texts.append(llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]
    assert len(texts[0]) == NUM_OUTPUTS


def test_one_that_fails_the_comparison_is_refused_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            transformers.BertConfig(**SIZES, intermediate_size=112, max_position_embeddings=64).to_dict()
            | {"architectures": ["BertLMHeadModel"]}
        )
    )
    options = {**ENGINE, "load_format": "dummy"}
    with pytest.raises(ModelError, match="BertLMHeadModel.*no decoder.*is_decoder"):
        LLM(str(tmp_path), **options)
    with LLM(str(tmp_path), **options, skip_conformance=True) as llm:
        assert llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert any("nobody has checked" in message for message in caplog.messages)


@pytest.mark.parametrize("wanted", ["auto", "native", "transformers"])
def test_one_on_neither_road_is_refused_without_torch(
    wanted: str, model_folder: Path, tmp_path: Path
) -> None:
    """Which takes seconds to import; and without the code that comes with it."""
    raw = json.loads((model_folder / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.NoSuchForCausalLM"}
    changes = {"architectures": ["NoSuchForCausalLM"], "model_type": "no_such", "auto_map": named}
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of a model ran')")
    code = (
        "import sys; from quire import LLM\n"
        "try: LLM(sys.argv[1], model_impl=sys.argv[2])\n"
        "except Exception as error: print(type(error).__name__, error, *{'torch', 'transformers'} & sys.modules.keys())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), wanted], capture_output=True, text=True, check=True
    )
    assert "UnsupportedModel NoSuchForCausalLM takes neither road" in said.stdout
    assert "(native)" in said.stdout
    assert "(transformers)" in said.stdout
    assert said.stdout.rstrip().endswith("is never run")  # and no module's name


@pytest.mark.parametrize("road", ["native", "transformers"])
def test_a_head_of_its_own_where_it_should_be_the_embedding_is_not_overlooked(
    road: str, tmp_path: Path
) -> None:
    """Transformers takes it, with a warning; here config.json has to agree."""
    model, file = build_hf(BY_NAME["Llama-tied"], tmp_path), tmp_path / "model.safetensors"
    stored, prompts = load_file(file), prompts_of(BY_NAME["Llama-tied"])
    table = stored["model.embed_tokens.weight"]
    want = [reference(model, p)[0] for p in prompts]
    save_file(stored | {"lm_head.weight": table.clone()}, file)
    with LLM(str(tmp_path), **ENGINE, model_impl=road) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == want
    save_file(stored | {"lm_head.weight": table.roll(1, 0)}, file)
    if road == "native":
        with pytest.raises(CheckpointError, match="head is not its embedding.*tie_word_embeddings"):
            LLM(str(tmp_path), **ENGINE, model_impl=road)
    with LLM(str(tmp_path), **ENGINE, model_impl=road, hf_overrides={"tie_word_embeddings": False}) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    first = [o.outputs[0].token_ids[0] for o in outputs]
    assert first == [(tokens[0] + 1) % len(table) for tokens in want]
