"""`quire bench serve` against a server of the tests' own, whole: options in, table, JSON and exit code out."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quire.checkpoint.source import resolve
from quire.text.tokenizer import Tokenizer
from tests.cli.conftest import Done, Quire
from tests.cli.peer import MODEL, Manners, Peer, serving
from tests.cli.test_prompts import byte_backend
from tests.cli.test_report import KEYS

SHORT = ("--random-input-len", "6", "--random-output-len", "4", "--disable-tqdm", "--seed", "1")
WRITTEN = {
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("demo").folder)


def bench(quire: Quire, peer: Peer, *words: str, count: int = 8) -> Done:
    base = ("bench", "serve", "--port", str(peer.port), "--num-prompts", str(count))
    return quire(*base, "--tokenizer", "demo", *SHORT, *words)


def saved(quire: Quire, peer: Peer, folder: Path, *words: str, count: int = 8) -> dict[str, Any]:
    where = ("--save-result", "--result-dir", str(folder), "--result-filename", "found.json")
    done = bench(quire, peer, *where, *words, count=count)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert isinstance(found, dict)
    return found


def test_the_table(quire: Quire) -> None:
    with serving(Manners()) as peer:
        done = bench(quire, peer)
    assert done.returncode == 0
    assert done.stdout.startswith("============ Serving Benchmark Result ============\n")
    for row in (
        "Successful requests:                     8",
        "Failed requests:                         0",
        "Total input tokens:                      56",  # the peer says 7 each
        "Total generated tokens:                  32",
    ):
        assert row in done.stdout
    assert "Mean TPOT (ms):" in done.stdout
    assert "E2EL" not in done.stdout


def test_the_keys_are_vllms(quire: Quire, folder: Path) -> None:
    words = ("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99.9")
    with serving(Manners()) as peer:
        found = saved(quire, peer, folder, *words, "--metadata", "machine=mine", "run=3")
    assert found.keys() == KEYS | WRITTEN | {"refused", "machine", "run"}
    assert (found["model_id"], found["num_prompts"], found["request_rate"]) == (MODEL, 8, "inf")
    assert (found["completed"], found["total_output_tokens"], found["request_goodput"]) == (8, 32, None)
    assert found["run"] == "3"
    assert found["mean_e2el_ms"] >= found["mean_ttft_ms"] > 0


def test_details_have_an_entry_for_each_request(quire: Quire, folder: Path) -> None:
    with serving(Manners(refuse={2: (503, {"error": {"message": "full"}})})) as peer:
        found = saved(quire, peer, folder, "--save-detailed", "--max-concurrency", "1")
    assert found["generated_texts"] == [" 0 1 2 3"] * 2 + [""] + [" 0 1 2 3"] * 5
    assert found["output_lens"] == [4, 4, 0, 4, 4, 4, 4, 4]
    assert [len(gaps) for gaps in found["itls"]] == [3, 3, 0, 3, 3, 3, 3, 3]
    assert [bool(error) for error in found["errors"]] == [i == 2 for i in range(8)]
    assert found["start_times"] == sorted(found["start_times"])


def test_chat(quire: Quire, folder: Path) -> None:
    with serving(Manners()) as peer:
        found = saved(quire, peer, folder, "--backend", "openai-chat")
        heads = {head.splitlines()[0] for head in peer.heads}
    assert heads == {"POST /v1/chat/completions HTTP/1.1"}
    assert found["total_output_tokens"] == 32
    assert all(len(body["messages"][0]["content"]) > 6 for body in peer.bodies)


def test_what_is_sent(quire: Quire, tokenizer: Tokenizer) -> None:
    with serving(Manners(tokenizer=tokenizer)) as peer:
        done = quire(
            *("bench", "serve", "--base-url", f"http://127.0.0.1:{peer.port}/", "--num-prompts", "3", *SHORT),
            *("--ignore-eos", "--temperature", "0", "--extra-body", '{"priority": 2}'),
            *("--header", "Authorization=Bearer a=b", "--header", "X-Y=z"),
        )
    assert done.returncode == 0, done.stderr
    assert [len(tokenizer.encode(body.pop("prompt"))) for body in peer.bodies] == [6] * 3
    assert peer.bodies[0] == {
        "model": MODEL,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "priority": 2,
    }
    for head in peer.heads:
        assert f"\r\nHost: 127.0.0.1:{peer.port}\r\n" in head
        assert "\r\nAuthorization: Bearer a=b\r\nX-Y: z\r\n" in head


@pytest.mark.parametrize(("backend", "special"), [("openai", True), ("openai-chat", False)])
def test_lengths_count_what_the_server_adds(quire: Quire, folder: Path, backend: str, special: bool) -> None:
    """A completion begins with a special token, which is one of those asked for; a chat has its template."""
    byte_backend(begin=True).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    with serving(Manners()) as peer:
        done = bench(quire, peer, "--backend", backend, "--tokenizer", str(folder))
    assert done.returncode == 0, done.stderr
    texts = [body["messages"][0]["content"] if "messages" in body else body["prompt"] for body in peer.bodies]
    tokenizer = Tokenizer.load(folder)
    assert {len(tokenizer.encode(text, add_special_tokens=special)) for text in texts} == {6}


def test_a_ramp(quire: Quire, folder: Path) -> None:
    words = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "500", "--ramp-up-end-rps", "2000")
    with serving(Manners()) as peer:
        found = saved(quire, peer, folder, *words)
    assert (found["completed"], found["ramp_up_end_rps"], found["request_rate"]) == (8, 2000, "inf")


def test_a_limit_on_concurrency_is_reached_and_kept(quire: Quire, folder: Path) -> None:
    """The peer answers only three at once: with fewer the run would fail, with more it would count them."""
    with serving(Manners(together=3)) as peer:
        found = saved(quire, peer, folder, "--max-concurrency", "3", count=12)
    assert (found["completed"], found["max_concurrent_requests"]) == (12, 3)
    assert peer.num_connections <= 4  # one asked for the models; they are used again


def test_without_a_limit_all_are_sent_at_once(quire: Quire, folder: Path) -> None:
    with serving(Manners(together=12)) as peer:
        found = saved(quire, peer, folder, count=12)
    assert (found["completed"], found["max_concurrent_requests"], found["max_concurrency"]) == (12, 12, None)


def test_at_a_rate(quire: Quire, folder: Path) -> None:
    with serving(Manners()) as peer:
        words = ("--request-rate", "1000", "--burstiness", "2", "--save-detailed")
        found = saved(quire, peer, folder, *words)
    assert (found["request_rate"], found["burstiness"], found["completed"]) == (1000, 2, 8)
    assert found["duration"] >= 7.999 / 1000  # the last is due at 8 / 1000; none is sent early
    assert found["start_times"] == sorted(found["start_times"])


def test_waiting_in_the_client_is_not_the_servers(quire: Quire, folder: Path) -> None:
    words = ("--max-concurrency", "1", "--percentile-metrics", "ttft,client_queue_time")
    with serving(Manners()) as peer:
        found = saved(quire, peer, folder, *words, "--metric-percentiles", "100")
    assert found["p100_client_queue_time_ms"] > found["p100_ttft_ms"] > 0


def test_warmups_are_not_counted(quire: Quire, folder: Path) -> None:
    with serving(Manners(refuse={0: (500, b"cold"), 1: (500, b"cold")})) as peer:
        found = saved(quire, peer, folder, "--num-warmups", "2")
    assert len(peer.bodies) == 10
    assert (found["completed"], found["failed"]) == (8, 0)


def test_every_way_to_fail_is_counted_and_shown(quire: Quire) -> None:
    manners = Manners(
        refuse={
            1: (503, {"error": {"message": "the queue is full", "code": 503}}),
            2: (503, {"error": {"message": "the queue is full", "code": 503}}),
            3: (400, b"<html>"),
        },
        break_off={4},
        fail={5},
    )
    with serving(manners) as peer:
        done = bench(quire, peer, "--max-concurrency", "1")
    assert done.returncode == 0
    assert "Successful requests:                     3 " in done.stdout
    assert "Failed requests:                         3 " in done.stdout
    assert "Refused requests (429, 503):             2 " in done.stdout
    assert "Total generated tokens:                  12 " in done.stdout
    for line in (
        "Refused, 2 x: 503 Service Unavailable: the queue is full",
        "Failed, 1 x: 400 Bad Request: <html>",
        "Failed, 1 x: the connection was closed before the answer was complete",
        "Failed, 1 x: in the stream: logits are NaN",
    ):
        assert line in done.stdout.splitlines()


def test_answers_without_output_or_an_end_are_failures(quire: Quire) -> None:
    bodies = [b'{"choices": []}', b'data: {"choices": [{"text": "a"}]}\n\n', b"data: [DONE]\n\n"]
    with serving(Manners(refuse={i: (200, body) for i, body in enumerate(bodies)})) as peer:
        done = bench(quire, peer, "--max-concurrency", "1", count=4)
    assert "Successful requests:                     1 " in done.stdout
    assert done.stdout.count("Failed, 1 x: the answer is no stream of events, or was cut: ") == 3


def test_a_run_without_a_completed_request_fails(quire: Quire) -> None:
    with serving(Manners(refuse=dict.fromkeys(range(8), (429, b"")))) as peer:
        done = bench(quire, peer)
    assert done.returncode == 1
    assert "Refused, 8 x: 429 Too Many Requests" in done.stdout


def test_many_kinds_of_failure_are_not_all_shown(quire: Quire) -> None:
    with serving(Manners(refuse={i: (500, f"reason {i}".encode()) for i in range(1, 8)})) as peer:
        lines = bench(quire, peer).stdout.splitlines()
    assert sum(line.startswith("Failed, 1 x: 500 Internal Server Error: reason") for line in lines) == 5
    assert lines[-1] == "... and 2 other kinds of failure"


def test_tokens_are_pieces_where_the_server_does_not_count(quire: Quire) -> None:
    with serving(Manners(usage=False)) as peer:
        done = bench(quire, peer)
    assert "Total input tokens:                      48 " in done.stdout  # as made
    assert "Total generated tokens:                  32 " in done.stdout


def test_connections_that_the_server_closes_are_made_again(quire: Quire) -> None:
    with serving(Manners(keep_alive=False)) as peer:
        done = bench(quire, peer, "--max-concurrency", "2")
    assert "Successful requests:                     8 " in done.stdout
    assert peer.num_connections >= 8


def test_goodput(quire: Quire, folder: Path) -> None:
    with serving(Manners()) as peer:
        found = saved(quire, peer, folder, "--goodput", "ttft:0", "--goodput", "e2el:1e9")
        assert found["request_goodput"] == 0
        found = saved(quire, peer, folder, "--goodput", "ttft:1e9", "tpot:1e9")
        assert found["request_goodput"] == found["request_throughput"] > 0


def test_files_are_named_and_appended_to(quire: Quire, folder: Path) -> None:
    with serving(Manners()) as peer:
        words = ("--save-result", "--result-dir", str(folder / "new"), "--label", "mine")
        bench(quire, peer, *words, "--max-concurrency", "2", "--model", "owner/name")
        (file,) = (folder / "new").iterdir()
        assert file.name.startswith("mine-infqps-concurrency2-name-")
        assert peer.bodies[0]["model"] == "owner/name"
        for _ in range(2):
            bench(quire, peer, "--append-result", "--result-dir", str(folder), "--result-filename", "all")
    assert [json.loads(line)["completed"] for line in (folder / "all").read_text().splitlines()] == [8, 8]


def test_prompts_of_a_file(quire: Quire, folder: Path) -> None:
    file = folder / "prompts.jsonl"
    file.write_text('{"prompt": "one", "output_tokens": 2}\n{"prompt": "two", "output_tokens": 3}\n')
    with serving(Manners()) as peer:
        words = ("--dataset-name", "custom", "--dataset-path", str(file), "--custom-output-len", "-1")
        assert bench(quire, peer, *words, count=2).returncode == 0
    assert sorted((body["prompt"], body["max_tokens"]) for body in peer.bodies) == [("one", 2), ("two", 3)]


def test_repeated_prefixes(quire: Quire) -> None:
    words = ("--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", "2")
    lengths = ("--prefix-repetition-prefix-len", "20", "--prefix-repetition-suffix-len", "5")
    with serving(Manners()) as peer:
        assert bench(quire, peer, *words, *lengths).returncode == 0
    assert len({body["prompt"][:20] for body in peer.bodies}) == 2
    assert {body["max_tokens"] for body in peer.bodies} == {128}


def test_a_progress_bar_is_on_standard_error(quire: Quire) -> None:
    with serving(Manners()) as peer:
        base = ("bench", "serve", "--port", str(peer.port), "--num-prompts", "2", "--tokenizer", "demo")
        done = quire(*base, *(word for word in SHORT if word != "--disable-tqdm"))
    assert "Requests" in done.stderr
    assert "100%" in done.stderr
    assert done.stdout.startswith("====")


def test_no_server_is_one_line(quire: Quire) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        done = quire("bench", "serve", "--port", port, *SHORT)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: no connection to http://127.0.0.1:{port}: ")
        done = quire("bench", "serve", "--port", port, "--model", "x", "--tokenizer", "demo", *SHORT)
        assert "Failed requests:                         1000" in done.stdout


def test_a_server_without_a_tokenizer(quire: Quire) -> None:
    with serving(Manners()) as peer:
        done = quire("bench", "serve", "--port", str(peer.port), *SHORT)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "404 Not Found: no /tokenize here; prompts can be made without it: pass --tokenizer\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--request-rate", "0"], "request_rate is 0.0"),
        (["--num-prompts", "0"], "num_prompts is 0"),
        (["--max-concurrency", "0"], "max_concurrency is 0"),
        (["--num-warmups", "-1"], "num_warmups is -1"),
        (["--random-input-len", "0"], "input_len is 0"),
        (["--random-prefix-len", "-1"], "random_prefix_len is -1"),
        (["--random-range-ratio", "1"], "random_range_ratio is 1.0"),
        (["--goodput", "speed:1"], "goodput has 'speed:1'"),
        (["--metadata", "novalue"], "metadata has 'novalue'"),
        (["--header", "A=b\nc"], "header 'A'"),
        (["--base-url", "ftp://x"], "base_url is 'ftp://x'"),
        (["--base-url", "http://x:port"], "base_url is 'http://x:port'"),
        (["--dataset-name", "custom"], "dataset custom needs a file"),
        (["--dataset-path", "x"], "dataset random has prompts of its own"),
    ],
)
def test_impossible_options_are_user_errors(quire: Quire, words: list[str], message: str) -> None:
    done = quire("bench", "serve", "--model", "m", "--tokenizer", "demo", "--disable-tqdm", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_no_torch_is_loaded() -> None:
    code = "import sys; from quire.cli.main import main; code = main(sys.argv[1:]); "
    code += "sys.exit(90 if 'torch' in sys.modules else code)"
    with serving(Manners()) as peer:
        base = ["bench", "serve", "--port", str(peer.port), "--num-prompts", "2", "--tokenizer", "demo"]
        done = subprocess.run([sys.executable, "-c", code, *base, *SHORT], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
