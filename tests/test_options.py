"""The set of options is frozen here: adding one is a decision that a reviewer sees."""

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest

from quire.cli.options import add_config_options, add_flags, config_from, config_options
from quire.config import Config
from quire.errors import ConfigError
from quire.server.router.settings import RouterSettings
from quire.server.settings import ServerSettings
from tests.tree import ROOT

OPTIONS = {
    "model",
    "revision",
    "download_dir",
    "tokenizer",
    "skip_tokenizer_init",
    "chat_template",
    "tool_call_parser",
    "reasoning_parser",
    "generation_config",
    "override_generation_config",
    "hf_overrides",
    "load_format",
    "model_impl",
    "skip_conformance",
    "device",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "attention_backend",
    "num_threads",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "launch_secret_file",
    "ray_placement_group",
    "data_parallel_size",
    "enable_expert_parallel",
    "all2all_backend",
    "enable_eplb",
    "eplb_step_interval",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_token_gap_ms",
    "async_scheduling",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "block_size",
    "enable_prefix_caching",
    "max_logprobs",
    "decode_context_parallel_size",
    "deterministic",
    "seed",
    "disable_log_stats",
    "trace_file",
}
SERVER_OPTIONS = {
    "host",
    "port",
    "served_model_name",
    "api_key",
    "api_key_file",
    "root_path",
    "allowed_origins",
    "ssl_certfile",
    "ssl_keyfile",
    "keep_volatile_lines",
    "max_request_bytes",
    "response_store_bytes",
    "max_n",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "max_queue_seconds",
    "request_timeout",
    "drain_timeout",
    "api_server_count",
    "admin_socket",
    "admin_host",
    "admin_port",
    "admin_key_file",
    "otlp_traces_endpoint",
    "disable_access_log",
}
ROUTER_OPTIONS = {
    "backend",
    "host",
    "port",
    "api_key",
    "api_key_file",
    "backend_key_file",
    "ssl_certfile",
    "ssl_keyfile",
    "max_request_bytes",
    "max_num_reqs",
    "max_queue_seconds",
    "cache_tokens",
    "request_timeout",
    "drain_timeout",
    "disable_access_log",
}
FIELDS = dataclasses.fields(Config)
SERVER_FIELDS = dataclasses.fields(ServerSettings)
ROUTER_FIELDS = dataclasses.fields(RouterSettings)


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_options(parser)
    return parser


def test_options_are_the_agreed_ones() -> None:
    assert {f.name for f in FIELDS} == OPTIONS
    assert {f.name for f in SERVER_FIELDS} == SERVER_OPTIONS
    assert {f.name for f in ROUTER_FIELDS} == ROUTER_OPTIONS
    assert not OPTIONS & SERVER_OPTIONS
    limit = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["budget"]["options"]
    assert len(FIELDS) + len(SERVER_FIELDS) <= limit
    assert FIELDS[0].name == "model"


def test_every_option_says_what_it_is_for() -> None:
    for f in (*FIELDS, *SERVER_FIELDS, *ROUTER_FIELDS):
        assert len(f.metadata["help"]) > 10, f.name
        assert f.metadata["help"].endswith("."), f.name


def test_flags_are_the_options(parser: argparse.ArgumentParser) -> None:
    flags = {s for action in parser._actions for s in action.option_strings}
    named = {f"--{name.replace('_', '-')}" for name in OPTIONS - {"model"}}
    negated = {
        f"--no-{f.name.replace('_', '-')}"
        for f in FIELDS
        if f.type in (bool, bool | None) and f.name != "model"
    }
    assert flags - {"-h", "--help"} == named | negated


def test_no_flag_given_means_the_defaults(parser: argparse.ArgumentParser) -> None:
    assert config_from(parser.parse_args(["folder"])) == Config(model="folder")


def another(f: "dataclasses.Field[Any]") -> tuple[list[str], object]:
    """A command line that gives `f` a value other than its default, and that value."""
    flag = f"--{f.name.replace('_', '-')}"
    if f.metadata["choices"]:
        value = next(c for c in f.metadata["choices"] if c != f.default)
        return [flag, value], value
    if f.type in (bool, bool | None):
        return ([f"--no-{flag[2:]}"], False) if f.default else ([flag], True)
    if f.type in (int, int | None):
        return [flag, "17"], 17
    if f.type in (float, float | None):
        return [flag, "0.25"], 0.25
    if f.type == Mapping[str, Any] | None:
        return [flag, '{"top_k": 5}'], {"top_k": 5}
    if f.type == tuple[str, ...]:
        return [flag, "one", "two", flag, "three"], ("one", "two", "three")
    return [flag, "text"], "text"


@pytest.mark.parametrize("f", FIELDS[1:], ids=lambda f: f.name)
def test_each_flag_sets_its_option_only(parser: argparse.ArgumentParser, f: "dataclasses.Field[Any]") -> None:
    words, value = another(f)
    assert config_from(parser.parse_args(["folder", *words])) == Config(**{"model": "folder", f.name: value})


@pytest.mark.parametrize("f", SERVER_FIELDS, ids=lambda f: f.name)
def test_each_flag_of_the_server_sets_its_option_only(f: "dataclasses.Field[Any]") -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, ServerSettings, "server options")
    words, value = another(f)
    given = config_options(parser.parse_args(words), ServerSettings)
    assert given == {f.name: value}
    assert config_options(parser.parse_args([]), ServerSettings) == {}


@pytest.mark.parametrize("f", ROUTER_FIELDS, ids=lambda f: f.name)
def test_each_flag_of_the_router_sets_its_option_only(f: "dataclasses.Field[Any]") -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, RouterSettings, "router options")
    words, value = another(f)
    assert config_options(parser.parse_args(words), RouterSettings) == {f.name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", ()),
        ("backend", ("127.0.0.1:8000",)),
        ("backend", ("http://user@host",)),
        ("backend", ("http://host:port",)),
        ("backend", ("http://a", "http://a/")),
        ("max_num_reqs", 0),
        ("port", -1),
    ],
)
def test_values_that_no_router_can_have(name: str, value: object) -> None:
    with pytest.raises(ConfigError):
        RouterSettings(**{"backend": ("http://127.0.0.1:8001",), name: value})


def test_whole_numbers_may_have_a_suffix(parser: argparse.ArgumentParser) -> None:
    for text, value in {"4096": 4096, "4k": 4000, "4K": 4096, "1.5k": 1500, "1m": 10**6, "1G": 2**30}.items():
        assert config_from(parser.parse_args(["folder", "--max-model-len", text])).max_model_len == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-model-len", "many"], "'many' is not a whole number"),
        (["--max-model-len", "1.2345k"], "'1.2345k' is not a whole number"),
        (["--hf-overrides", "{"], "is not JSON"),
        (["--hf-overrides", "[1]"], "must be a JSON object"),
        (["--dtype", "int3"], "invalid choice"),
        (["--max-model", "7"], "unrecognized arguments"),
    ],
)
def test_bad_values_are_named(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["folder", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("root_path", "llm/"),
        ("ssl_keyfile", "key.pem"),
        ("max_n", 0),
        ("drain_timeout", -1),
        ("served_model_name", ("",)),
    ],
)
def test_values_that_no_server_can_have(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        ServerSettings(**{name: value})


def test_values_out_of_range_are_config_errors(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 0"):
        config_from(parser.parse_args(["folder", "--max-model-len", "0"]))
