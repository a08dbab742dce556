"""Every option there is, as one frozen value. Nothing here is derived: `resolve.py` fills in what is None."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.errors import ConfigError

MAX_GROUPS = 64
MAX_RANKS = 64  # of a group


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its documentation; the command line and the docs are generated from these."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of an engine. Names follow vLLM's where the meaning is the same; None means derived.

    Raises:
        ConfigError: a value is outside its range; the message names the range.
    """

    model: str = option(
        "", "Folder of a Hugging Face checkpoint, or a Hugging Face id, or demo, which comes with Quire."
    )
    revision: str | None = option(None, "Branch, tag or commit of a Hugging Face id.")
    tokenizer: str | None = option(None, "Folder or id of the tokenizer, if not the model's.")
    skip_tokenizer_init: bool = option(False, "Serve token ids only; prompts and outputs have no text.")
    chat_template: str | None = option(None, "Path of a Jinja chat template, or the template itself.")
    tool_call_parser: str = option(
        "auto",
        "How the model writes calls of tools: hermes, llama3_json, deepseek_v3 and so on. auto: as its chat template"
        " shows. none: they stay text.",
    )
    reasoning_parser: str = option(
        "auto",
        "How the model writes reasoning: deepseek_r1, openai_gptoss, granite and so on. auto: as its chat template"
        " shows. none: it stays text.",
    )
    generation_config: str = option(
        "auto",
        "Where default sampling values come from: the model's generation_config.json, or nowhere.",
        choices=("auto", "none"),
    )
    override_generation_config: Mapping[str, Any] | None = option(
        None, "Default sampling values (JSON) that replace the model's."
    )
    hf_overrides: Mapping[str, Any] | None = option(None, "Keys (JSON) that replace those of config.json.")
    load_format: str = option(
        "auto",
        "auto: safetensors. dummy: random weights, the same for the same seed, for speed tests.",
        choices=("auto", "dummy"),
    )
    model_impl: str = option(
        "auto",
        "Who computes the network. native: Quire's own layers. transformers: the modules of Transformers, over the same"
        " cache. auto: native where there is a family of that architecture.",
        choices=("auto", "native", "transformers"),
    )
    skip_conformance: bool = option(
        False,
        "Do not first compare a small network of the kind with Transformers' results, where its modules are used.",
    )
    download_dir: str | None = option(None, "Where Hugging Face ids are downloaded to.")
    device: str = option("auto", "auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "Type of weights and activations; auto takes the checkpoint's, with float16 and float32 as bfloat16"
        " where the device has no fast path for them.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantization: str = option(
        "auto",
        "Bits of a weight, on a CPU: int8, or int4 with the head in int8, made while weights load. auto: as they are.",
        choices=("auto", "int8", "int4"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type of cached keys and values. auto: the model's. int8, on a CPU: 8 bits, with a scale for each token and"
        " key head.",
        choices=("auto", "int8"),
    )
    attention_backend: str = option(
        "auto",
        "How attention over the paged cache is computed.",
        choices=("auto", "cpu", "triton", "reference"),
    )
    num_threads: int | None = option(
        None,
        "CPU threads for tensor work, of each engine group, whose ranks share them; None takes one per physical core in"
        " all.",
    )
    tensor_parallel_size: int = option(
        1,
        "Processes (ranks) of an engine group that compute the network together: each has its part of every layer's"
        " weights and of the cache, and a GPU of its own or its share of the CPU's cores and memory.",
    )
    pipeline_parallel_size: int = option(
        1,
        "Stages of an engine group, each of which has some of the layers, and ranks of its own: so many times those of"
        " tensor_parallel_size. They compute different sequences, or pieces of a prompt, at the same time.",
    )
    decode_context_parallel_size: int = option(
        1,
        "How many of the ranks that would hold the same keys and values, as of tensor_parallel_size there are where"
        " heads of keys are fewer, share out a sequence's tokens instead: the cache then holds so many times as many.",
    )
    data_parallel_size: int = option(
        1,
        "Engine groups with a cache each, among which quire serve divides requests. Each has the whole network, or all"
        " but the experts with enable_expert_parallel, and GPUs of its own or its share of the CPU's cores and memory.",
    )
    enable_expert_parallel: bool = option(
        False,
        "Give each rank whole experts, instead of a part of every one: the ranks of tensor_parallel_size and of all"
        " engine groups (data_parallel_size) share them out; these then compute in lockstep.",
    )
    all2all_backend: str = option(
        "auto",
        "How tokens get to experts of other ranks. allgather_reducescatter: all ranks get all tokens. all_to_all: a"
        " token goes to the ranks of its experts. auto: the latter for many tokens, where that moves less.",
        choices=("auto", "allgather_reducescatter", "all_to_all"),
    )
    enable_eplb: bool = option(
        False,
        "Have each rank hold one expert more, and move experts between ranks by the load that is measured, so that all"
        " have about as much to do; with enable_expert_parallel.",
    )
    eplb_step_interval: int = option(3000, "Steps after which enable_eplb looks at the load.")
    distributed_executor_backend: str = option(
        "local",
        "Who starts the ranks. local: the engine, on this machine; on others the same command with another node_rank."
        " ray: Ray, where its cluster has room. env: torchrun or LeaderWorkerSet, whose variables say which ranks a"
        " process has.",
        choices=("local", "ray", "env"),
    )
    nnodes: int = option(1, "Machines over which the ranks of the engine group are spread, equally.")
    node_rank: int = option(0, "Which of them this one is; 0 has the engine, and serves.")
    master_addr: str = option("127.0.0.1", "Address of machine 0, at which the others meet it.")
    master_port: int | None = option(
        None,
        "Port for that: 29501; with torchrun MASTER_PORT, or the next one if torchrun listens there itself.",
    )
    launch_secret_file: str | None = option(
        None,
        "File with a secret, the same on all machines, which ranks of others have to know: whoever else reaches the"
        " port cannot join.",
    )
    ray_placement_group: str | None = option(
        None,
        "Id (hex) of a placement group of Ray's with a bundle for each rank, the first on this machine. None: the one"
        " that the engine is in, or else a new one.",
    )
    max_model_len: int | None = option(None, "Most tokens of a request, prompt and output together.")
    max_num_seqs: int | None = option(None, "Most sequences that run at once.")
    max_num_batched_tokens: int | None = option(None, "Most tokens that one step computes.")
    max_token_gap_ms: float | None = option(
        None,
        "Target for the time between two tokens of a stream: long prompts are computed in pieces that keep to"
        " it. 0: no target. The default lets prompts take twice the time of the tokens beside them, at least.",
    )
    async_scheduling: bool | None = option(
        None,
        "Plan the next step before the last one's tokens are known; on where the device runs asynchronously.",
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of the device's memory (RAM on a CPU) that weights, cache and work space may fill."
    )
    kv_cache_memory_bytes: int | None = option(
        None, "Bytes of the KV cache, of each rank; replaces the share above."
    )
    block_size: int | None = option(
        None,
        "Tokens of a KV block, of all ranks that have a part of it; None is the attention backend's choice.",
    )
    enable_prefix_caching: bool = option(
        True, "Keep the KV of finished requests for prompts that begin alike."
    )
    max_logprobs: int = option(
        20, "Most log probabilities a token may be asked for; -1 allows the whole vocabulary."
    )
    deterministic: bool = option(
        False,
        "Give a request the same tokens and log probabilities, to the bit, alone and in any batch, after preemption"
        " and with its prompt cached; slower on a GPU, free on a CPU.",
    )
    seed: int = option(0, "Seeds requests that bring none, and dummy weights.")
    disable_log_stats: bool = option(False, "Do not log throughput and cache use every ten seconds.")
    trace_file: str | None = option(None, "Record the scheduler's events for `quire replay`.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            value = getattr(self, f.name)
            if choices and value not in choices:
                raise ConfigError(f"{f.name} is {value!r}; it must be one of {', '.join(choices)}")
        self._at_least("max_model_len", 1)
        self._at_least("max_num_seqs", 1)
        self._at_least("max_num_batched_tokens", 1)
        self._at_least("num_threads", 1)
        self._at_least("nnodes", 1)
        self._at_least("node_rank", 0)
        self._at_least("master_port", 1)
        self._at_least("data_parallel_size", 1)
        self._at_least("tensor_parallel_size", 1)
        self._at_least("pipeline_parallel_size", 1)
        self._at_most("master_port", 65535)
        self._at_most("data_parallel_size", MAX_GROUPS)
        self._at_most("tensor_parallel_size", MAX_RANKS)
        self._at_least("decode_context_parallel_size", 1)
        self._at_most("pipeline_parallel_size", MAX_RANKS // self.tensor_parallel_size)
        self._check_nodes()
        if self.data_parallel_size > 1 and self.trace_file is not None:
            raise ConfigError(
                "trace_file records one engine group; leave it out, or set data_parallel_size to 1"
            )
        self._at_least("eplb_step_interval", 1)
        self._at_least("block_size", 1)
        self._at_least("kv_cache_memory_bytes", 1)
        self._at_least("max_token_gap_ms", 0)
        self._at_least("max_logprobs", -1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )

    def _check_nodes(self) -> None:
        if self.nnodes > 1 and self.distributed_executor_backend == "ray":
            raise ConfigError(
                f"nnodes is {self.nnodes}, and Ray finds machines by itself; leave it out, or use local"
            )
        if (
            self.enable_expert_parallel
            and self.data_parallel_size > 1
            and self.distributed_executor_backend != "local"
        ):
            raise ConfigError(
                f"distributed_executor_backend is {self.distributed_executor_backend}, and engine groups that share"
                " experts are on one machine; use local"
            )
        if self.nnodes > 1 and self.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size is {self.data_parallel_size}, and nnodes {self.nnodes}, over which one engine"
                " group is spread; start a server for each group, and quire router in front of them"
            )

    def _at_least(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            raise ConfigError(f"{name} is {value!r}; it must be at least {low}")

    def _at_most(self, name: str, high: int) -> None:
        value = getattr(self, name)
        if value is not None and value > high:
            raise ConfigError(f"{name} is {value}; it must be at most {high}")

    @classmethod
    def of(cls, **options: Any) -> "Config":
        """As the constructor, with a message that names close options when one is unknown."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else "; see `quire run --help`"
                raise ConfigError(f"there is no option {name!r}{hint}")
        if not options.get("model"):
            raise ConfigError("model is empty; give the folder of a checkpoint or a Hugging Face id")
        return cls(**options)
