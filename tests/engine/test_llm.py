"""What users of `LLM` rely on."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.errors import ConfigError, EngineDead, InvalidRequest, PromptTooLong
from quire.scheduler.trace import TraceError, replay
from quire.types import BeamSearchParams, OutputKind
from tests.engine.conftest import OPTIONS
from tests.models.cases import BY_NAME, build_hf
from tests.poison import poison
from tests.tiny_tokenizer import make_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def generate(llm: LLM, prompt: object, **params: object) -> object:
    base = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return llm.generate(prompt, SamplingParams(**base | params), use_tqdm=False)[0]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [
        "one",
        "a much longer prompt than the first",
        {"prompt": "two"},
        {"prompt_token_ids": [5, 6, 7]},
        [8, 9],
    ]
    lengths = [12, 1, 5, 3, 9]
    params = [replace(GREEDY, max_tokens=n) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert [o.prompt for o in outputs] == ["one", prompts[1], "two", None, None]
    assert [o.prompt_token_ids for o in outputs[3:]] == [[5, 6, 7], [8, 9]]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    output = generate(llm, "hello", skip_special_tokens=False)
    assert output.outputs[0].text == llm.get_tokenizer().decode(
        output.outputs[0].token_ids, skip_special_tokens=False
    )


def test_stop_string_ends_the_text_before_it_or_after_it(llm: LLM) -> None:
    whole = generate(llm, "hello", max_tokens=20)
    text = whole.outputs[0].text
    stop = text[7:9]
    first = text.index(stop)
    cut = generate(llm, "hello", max_tokens=20, stop=stop).outputs[0]
    kept = generate(llm, "hello", max_tokens=20, stop=[stop], include_stop_str_in_output=True).outputs[0]
    assert (cut.text, kept.text) == (text[:first], text[: first + 2])
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.outputs[0].token_ids[: len(cut.token_ids)]


def test_stop_token_is_reported_and_waits_for_min_tokens(llm: LLM) -> None:
    tokens = generate(llm, "hello").outputs[0].token_ids
    stop = tokens[4]
    ended = generate(llm, "hello", stop_token_ids=[stop]).outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.token_ids == tokens[: tokens.index(stop) + 1]
    later = generate(llm, "hello", stop_token_ids=[stop], min_tokens=9).outputs[0].token_ids
    assert stop not in later[:9] and len(later) >= 9


def test_end_of_sequence_ends_unless_ignored(llm: LLM) -> None:
    eos = sorted(llm.engine.inputs.eos_token_ids)[0]
    forced = {"logit_bias": {eos: 100}}
    ended = generate(llm, "hello", ignore_eos=False, **forced).outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([eos], "stop", None)
    assert generate(llm, "hello", **forced).outputs[0].token_ids == [eos] * 12


def test_allowed_tokens_and_bad_words_bound_the_output(llm: LLM) -> None:
    allowed = generate(llm, "hello", allowed_token_ids=[10, 11, 12]).outputs[0].token_ids
    assert set(allowed) <= {10, 11, 12}
    text = generate(llm, "hello", max_tokens=20).outputs[0].text
    assert text[3] not in generate(llm, "hello", max_tokens=20, bad_words=[text[3]]).outputs[0].text


def test_n_gives_different_sequences_that_share_the_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)
    first, second = llm.generate(["abc " * 6] * 2, params, use_tqdm=False)
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in first.outputs}) > 1
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]


def test_unseeded_requests_differ_and_runs_repeat(model_folder: Path) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(str(model_folder), **OPTIONS, seed=5) as llm:
            runs.append([o.outputs[0].token_ids for o in llm.generate(["hello"] * 3, params, use_tqdm=False)])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3


def test_logprobs_hold_the_sampled_token_first_and_the_likeliest(llm: LLM) -> None:
    output = generate(llm, "hello", temperature=1.0, seed=1, logprobs=3, prompt_logprobs=2)
    completion = output.outputs[0]
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        ids = list(entry)
        assert ids[0] == token and len(entry) in (3, 4)
        assert {e.rank for e in entry.values()} >= {1, 2, 3}
        assert entry[token].decoded_token is not None
    total = sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
    assert math.isclose(completion.cumulative_logprob, total, rel_tol=1e-6)
    assert output.prompt_logprobs[0] is None
    assert [next(iter(e)) for e in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_the_whole_vocabulary_needs_permission(llm: LLM, model_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="max_logprobs is 20"):
        generate(llm, "hello", logprobs=-1)
    with LLM(str(model_folder), **OPTIONS, max_logprobs=-1) as free:
        entry = generate(free, "hello", logprobs=-1).outputs[0].logprobs[0]
    assert len(entry) == 104
    assert math.isclose(sum(math.exp(e.logprob) for e in entry.values()), 1, rel_tol=1e-5)


def test_prefix_hits_are_reported_and_change_nothing(llm: LLM) -> None:
    prompt = [20 + i % 7 for i in range(23)]
    cold, warm = generate(llm, prompt), generate(llm, prompt)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 20)
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
    salted = generate(llm, {"prompt_token_ids": prompt, "cache_salt": "other"})
    assert salted.num_cached_tokens == 0


def test_beams_leave_cached_only_what_their_salt_finds(llm: LLM) -> None:
    prompt = [60 + i % 9 for i in range(23)]
    salted = {"prompt_token_ids": prompt, "cache_salt": "of beams"}
    llm.beam_search([salted], BeamSearchParams(beam_width=2, max_tokens=1))
    assert [generate(llm, one).num_cached_tokens for one in (prompt, salted)] == [0, 20]


def test_stream_deltas_add_up(llm: LLM) -> None:
    params = replace(GREEDY, output_kind=OutputKind.DELTA)
    pieces = list(llm.stream("hello", params))
    want = generate(llm, "hello").outputs[0]
    assert len(pieces) > 1 and pieces[-1].finished and not pieces[0].finished
    assert "".join(p.outputs[0].text for p in pieces) == want.text
    assert sum((p.outputs[0].token_ids for p in pieces), []) == want.token_ids


def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("hello there", replace(GREEDY, max_tokens=30))
    next(stream)
    assert llm.engine.core.stats().used_blocks > 0
    stream.close()
    llm.engine.step()
    assert llm.engine.idle and llm.engine.core.stats().used_blocks == 0


def test_chat_renders_the_template_and_batches_conversations(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    [alone] = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert alone.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    several = llm.chat([conversation, [{"role": "user", "content": "bye"}]], GREEDY, use_tqdm=False)
    assert several[0].outputs[0].token_ids == alone.outputs[0].token_ids
    prefilled = [*conversation, {"role": "assistant", "content": "well"}]
    [continued] = llm.chat(
        prefilled, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True
    )
    assert continued.prompt.endswith("<|im_start|>assistant\nwell")
    _, turn = llm.engine.inputs.turn(
        prefilled, None, add_generation_prompt=False, continue_final_message=True
    )
    assert turn.continued == "well"
    [own] = llm.chat(conversation, GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}!")
    assert own.prompt == "hi!"


def test_beam_search_equals_an_exhaustive_search(llm: LLM) -> None:
    [wide] = llm.beam_search("abc", BeamSearchParams(beam_width=104, max_tokens=2, ignore_eos=True))
    scores = [b.cum_logprob for b in wide.sequences]
    assert scores == sorted(scores, reverse=True)
    [narrow] = llm.beam_search("abc", BeamSearchParams(beam_width=3, max_tokens=2, ignore_eos=True))
    assert len(narrow.sequences) == 3
    prompt = llm.get_tokenizer().encode("abc")
    for beam in narrow.sequences:
        assert beam.tokens[: len(prompt)] == prompt and len(beam.tokens) == len(prompt) + 2
    assert narrow.sequences[0].cum_logprob <= wide.sequences[0].cum_logprob + 1e-4


def test_metrics_count_what_happened(model_folder: Path) -> None:
    with LLM(str(model_folder), **OPTIONS) as llm:
        llm.generate(["hello", "world"], GREEDY, use_tqdm=False)
        values = {(m.name, m.labels.get("finished_reason")): m for m in llm.get_metrics()}
    assert values["vllm:generation_tokens_total", None].value == 24
    assert values["vllm:prompt_tokens_total", None].value == 10
    assert values["vllm:request_success_total", "length"].value == 2
    assert values["vllm:num_requests_running", None].value == 0
    assert values["vllm:time_to_first_token_seconds", None].count == 2


def test_the_context_ends_an_unbounded_request(llm: LLM) -> None:
    output = generate(llm, "hello", max_tokens=None)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == llm.config.max_model_len
    assert output.outputs[0].finish_reason == "length"


BAD_REQUESTS = {
    "empty text": ("", {}, "empty"),
    "empty ids": ([[]], {}, "empty"),
    "unknown id": ([[5, 104]], {}, "0 to 103"),
    "negative id": ([[-1]], {}, "0 to 103"),
    "not an id": ([[1.5]], {}, "not a token id"),
    "unknown key": ([{"text": "hi"}], {}, "unknown keys"),
    "no prompt": ([{}], {}, "'prompt'"),
    "stop id": ("hi", {"stop_token_ids": [104]}, "0 to 103"),
    "bias id": ("hi", {"logit_bias": {400: 1.0}}, "0 to 103"),
    "allowed id": ("hi", {"allowed_token_ids": [400]}, "0 to 103"),
    "logprobs": ("hi", {"logprobs": 21}, "max_logprobs is 20"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_and_the_llm_goes_on(llm: LLM, name: str) -> None:
    prompt, params, message = BAD_REQUESTS[name]
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    assert llm.engine.idle
    assert len(generate(llm, "hello").outputs[0].token_ids) == 12


def test_an_overlong_prompt_is_refused_with_its_length(llm: LLM) -> None:
    limit = llm.config.max_model_len
    with pytest.raises(PromptTooLong) as caught:
        llm.generate(["fine", [5] * limit], GREEDY, use_tqdm=False)
    assert (caught.value.num_tokens, caught.value.limit) == (limit, limit)
    with pytest.raises(PromptTooLong, match="at least 7693 tokens > 63"):
        generate(llm, "x" * 100_000)
    assert len(generate(llm, "hello").outputs[0].token_ids) == 12


def test_parameters_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 entries for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY], use_tqdm=False)


def test_an_unknown_option_names_the_close_ones() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM("anywhere", max_num_seq=3)


def test_one_not_a_number_fails_one_request(model_folder: Path) -> None:
    with LLM(str(model_folder), **OPTIONS) as llm:
        poison(llm.engine.core.runner.model, 42)
        bad, good = llm.generate([[5, 42], [5, 6]], GREEDY, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert good.outputs[0].finish_reason == "length"


def test_a_closed_llm_says_so(model_folder: Path) -> None:
    llm = LLM(str(model_folder), **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        generate(llm, "hello")


def test_a_recorded_run_replays(model_folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with LLM(
        str(model_folder), **OPTIONS, trace_file=str(trace), max_num_batched_tokens=16, max_num_seqs=3
    ) as llm:
        llm.generate(["a prompt of some length", "b", "c"], GREEDY, use_tqdm=False)
    lines = trace.read_text().splitlines(keepends=True)
    assert replay(lines) > 12
    plans = [i for i, line in enumerate(lines) if line.startswith('["plan"')]
    altered = [*lines[: plans[2]], lines[plans[3]], *lines[plans[2] + 1 :]]
    with pytest.raises(TraceError, match=f"line {plans[2] + 1}"):
        replay(altered)


def test_sequences_of_a_request_share_the_prompts_blocks(model_folder: Path) -> None:
    for caching in (True, False):
        with LLM(str(model_folder), **OPTIONS, enable_prefix_caching=caching) as llm:
            prompt = [5 + i % 40 for i in range(41)]  # ten full blocks of four, and one token
            params = SamplingParams(n=8, temperature=1.0, seed=1, max_tokens=3, ignore_eos=True)
            llm.engine.add(llm.engine.inputs.request(prompt, params, request_id="many"))
            most = 0
            while not llm.engine.idle:
                llm.engine.step()
                most = max(most, llm.engine.core.stats().used_blocks)
        assert 10 < most <= 10 + 8


def test_a_lower_priority_number_runs_first(model_folder: Path) -> None:
    with LLM(str(model_folder), **OPTIONS, max_num_seqs=1) as llm:
        for name, priority in (("first", 0), ("late", 5), ("urgent", -1)):
            request = llm.engine.inputs.request("hello", GREEDY, request_id=name, priority=priority)
            llm.engine.add(request)
        ended = []
        while not llm.engine.idle:
            ended += [o.request_id for o in llm.engine.step() if o.finished]
    assert ended == ["urgent", "first", "late"]


def test_what_is_sampled_has_the_models_distribution(llm: LLM) -> None:
    """Chi-square of 4,000 first tokens against the exact probabilities of the 12 likeliest at temperature 1.5."""
    prompt, draws, temperature, k = "hello", 4000, 1.5, 12
    exact = generate(llm, prompt, max_tokens=1, logprobs=k).outputs[0].logprobs[0]
    weights = {t: math.exp(e.logprob / temperature) for t, e in exact.items()}
    total = sum(weights.values())
    params = SamplingParams(n=draws, temperature=temperature, top_k=k, seed=2, max_tokens=1, detokenize=False)
    [output] = llm.generate(prompt, params, use_tqdm=False)
    counts = Counter(o.token_ids[0] for o in output.outputs)
    assert set(counts) <= set(weights)
    chi_square = sum((counts[t] - draws * w / total) ** 2 / (draws * w / total) for t, w in weights.items())
    assert chi_square < 31.26  # exceeded once in a thousand times with 11 degrees of freedom


def test_text_never_shows_half_a_character(tmp_path: Path) -> None:
    build_hf(replace(BY_NAME["Qwen3"], values=BY_NAME["Qwen3"].values | {"vocab_size": 300}), tmp_path)
    make_tokenizer(tmp_path, 300)
    with LLM(str(tmp_path), **OPTIONS) as llm:
        tokens = llm.get_tokenizer().encode("naïve 🙂")
        params = SamplingParams(
            temperature=1.5, seed=1, max_tokens=40, output_kind=OutputKind.DELTA, ignore_eos=True
        )
        pieces = [o.outputs[0].text for o in llm.stream({"prompt_token_ids": tokens}, params)]
        whole = (
            generate(llm, {"prompt_token_ids": tokens}, temperature=1.5, seed=1, max_tokens=40)
            .outputs[0]
            .text
        )
    assert "".join(pieces) == whole


def test_an_output_that_cannot_be_read_fails_one_request(llm: LLM) -> None:
    engine = llm.engine
    for name in ("bad", "good"):
        engine.add(engine.inputs.request("hello", GREEDY, request_id=name))
    engine.requests.open["bad"].sequences[0].detokenizer._tokenizer = None  # reading the next token raises
    ended = {}
    while not engine.idle:
        ended.update({o.request_id: o.outputs[0] for o in engine.step() if o.finished})
    assert (ended["bad"].finish_reason, ended["good"].finish_reason) == ("error", "length")
    assert len(ended["good"].token_ids) == 12
    assert engine.core.stats().used_blocks == 0
