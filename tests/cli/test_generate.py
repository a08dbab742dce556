"""`run`, `chat` and `bench` with a tiny model, from the command line to its output."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Quire

SMALL = ("--max-model-len", "256", "--max-num-seqs", "8")


def test_run_is_what_the_engine_generates(quire: Quire, tiny: str) -> None:
    from quire import LLM, SamplingParams

    done = quire("run", tiny, "The writer", "--max-tokens", "20", "--temperature", "0", *SMALL)
    assert done.returncode == 0
    with LLM(tiny, max_model_len=256, max_num_seqs=8) as llm:
        expected = llm.generate("The writer", SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert done.stdout.rstrip("\n") == expected[0].outputs[0].text
    num_input = len(expected[0].prompt_token_ids)
    assert re.search(rf"{num_input} tokens in, 20 out, [\d.]+ tok/s, first token after \d+ ms", done.stderr)


def test_run_reads_standard_input(quire: Quire, tiny: str) -> None:
    words = ("--max-tokens", "8", "--temperature", "0", *SMALL)
    assert (
        quire("run", tiny, "-", *words, input="The sea").stdout
        == quire("run", tiny, "The sea", *words).stdout
    )


def test_run_stops_at_a_text(quire: Quire, tiny: str) -> None:
    words = ("run", tiny, "The sea", "--max-tokens", "30", "--temperature", "0", *SMALL)
    whole = quire(*words).stdout
    letter = whole.strip()[10]
    assert quire(*words, "--stop", letter).stdout.rstrip("\n") == whole[: whole.index(letter)]


def test_run_with_a_seed_is_repeatable(quire: Quire, tiny: str) -> None:
    words = ("run", tiny, "The sea", "--max-tokens", "20", "--temperature", "1.5", *SMALL)
    assert quire(*words, "--seed", "5").stdout == quire(*words, "--seed", "5").stdout
    assert quire(*words, "--seed", "5").stdout != quire(*words, "--seed", "6").stdout


def test_an_empty_prompt_is_refused(quire: Quire, tiny: str) -> None:
    done = quire("run", tiny, "", *SMALL)
    assert done.returncode == 2
    assert "error: the prompt is empty" in done.stderr


def test_chat_answers_each_line(quire: Quire, tiny: str) -> None:
    words = ("chat", tiny, "--max-tokens", "8", "--temperature", "0", *SMALL)
    one = quire(*words, input="hello\n").stdout
    assert one.strip()
    forgotten = quire(*words, input="hello\n/reset\nhello\n/quit\nhello\n").stdout
    assert forgotten == one + one
    remembered = quire(*words, input="hello\nhello\n").stdout
    assert remembered.startswith(one)
    assert remembered != one + one
    assert quire(*words, "--system", "Be brief.", input="hello\n").stdout != one


def test_chat_goes_on_after_a_conversation_has_become_too_long(quire: Quire, tiny: str) -> None:
    words = ("chat", tiny, "--max-tokens", "4", "--temperature", "0", *SMALL)
    done = quire(*words, input=f"{'sea ' * 400}\nhello\n")
    assert done.returncode == 0
    assert "error: " in done.stderr
    assert done.stdout == quire(*words, input="hello\n").stdout


def test_a_trace_replays(quire: Quire, tiny: str, folder: Path) -> None:
    trace = str(folder / "trace")
    assert quire("run", tiny, "The sea", "--max-tokens", "8", "--trace-file", trace, *SMALL).returncode == 0
    done = quire("replay", trace)
    assert done.returncode == 0
    assert re.fullmatch(r"[1-9]\d* steps checked\n", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["quire", "hf"])
def test_bench_throughput(quire: Quire, tiny: str, folder: Path, backend: str) -> None:
    path = folder / "out.json"
    lengths = ("--input-len", "12", "--output-len", "6", "--num-prompts", "5", "--random-range-ratio", "0.5")
    done = quire(
        "bench", "throughput", tiny, *lengths, "--backend", backend, "--output-json", str(path), *SMALL
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["num_requests"] == 5
    assert found["dtype"] == "float32"
    assert found["elapsed_time"] > 0
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(found["total_num_tokens"] / found["elapsed_time"])
    assert found["bound_percent"] > 0
    assert ("cache_waste_percent" in found) == (backend == "quire")
    assert re.search(
        r"Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ output tokens/s", done.stdout
    )


@pytest.mark.slow
def test_bench_latency(quire: Quire, tiny: str, folder: Path) -> None:
    path = folder / "out.json"
    words = ("--input-len", "8", "--output-len", "4", "--batch-size", "2", "--num-iters", "4")
    dummy = ("--num-iters-warmup", "1", "--load-format", "dummy", "--output-json", str(path))
    done = quire("bench", "latency", tiny, *words, *dummy, *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert len(found["latencies"]) == 4
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 4)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]


def test_bench_with_transformers_refuses_quantization(quire: Quire, tiny: str) -> None:
    done = quire("bench", "throughput", tiny, "--backend", "hf", "--quantization", "int8", *SMALL)
    assert done.returncode != 0
    assert "quantization is int8; the backend hf" in done.stderr
    done = quire("bench", "throughput", tiny, "--backend", "hf", "--kv-cache-dtype", "int8", *SMALL)
    assert done.returncode != 0
    assert "kv_cache_dtype is int8; the backend hf" in done.stderr
