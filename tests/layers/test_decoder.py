"""Logits of tiny random networks through the paged cache equal Hugging Face's: whole, chunked, ragged."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.attention.base import Backend, LayerCache, ragged
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.attention.shapes import block_bytes
from quire.checkpoint.reader import Checkpoint
from quire.kernels.cpu import native
from quire.layers.decoder import Decoder
from quire.models.parameters import parameter_shapes
from quire.models.registry import decoder_spec
from tests.models.cases import BY_NAME, build_hf, prompt
from tests.models.test_controls import chunk_of

NUM_BLOCKS = 64
LENGTHS = (24, 9, 17)
TOLERANCE = 2e-4
CPU = torch.device("cpu")
BACKENDS: list[Backend] = [b for b in (Reference(4), Cpu()) if b.why_not(torch.float32, CPU) is None]
CHUNKS = {"whole": (24,), "sevens": (7,), "ones": (1,), "mixed": (5, 1, 1, 11)}
NAMES = (  # every kind of mixer, mlp, norm, rope and block
    *(
        "Llama-3.1",
        "Llama-yarn",
        "Llama-tied",
        "Mistral",
        "Qwen3",
        "Gemma2",
        "Gemma3",
        "Gemma3n",
        "Gemma4",
        "Gemma4-experts",
        "Olmo2",
        "Exaone4",
        "Phi3-long",
    ),
    *(
        "Granite",
        "Cohere",
        "GPT2",
        "GPTJ",
        "GPTNeoX",
        "Falcon-7b",
        "OPT",
        "Nemotron",
        "SmolLM3",
        "HunYuanDenseV1",
    ),
    *(
        "Mixtral",
        "Llama4",
        "Qwen2Moe",
        "Glm4Moe",
        "DeepseekV3",
        "DeepseekV3-yarn",
        "DeepseekV32",
        "GlmMoeDsa",
    ),
)


@dataclass(frozen=True)
class Network:
    """A checkpoint on disk, and what Hugging Face says of some prompts."""

    folder: Path
    prompts: list[list[int]]
    logits: list[Tensor]

    def decoder(self, backend: Backend, dtype: torch.dtype = torch.float32) -> Decoder:
        spec, names = decoder_spec(json.loads((self.folder / "config.json").read_text()))
        decoder = Decoder(spec, backend=backend, dtype=dtype)
        checkpoint = Checkpoint(self.folder, names)
        decoder.load(checkpoint)
        assert checkpoint.unused() == []
        return decoder


@pytest.fixture(scope="module", params=NAMES)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("network")
    model = build_hf(BY_NAME[request.param], folder)
    # LongRoPE's factors depend on length in Hugging Face and on the limit in Quire: keep all prompts long.
    lengths = (24, 18, 17) if request.param == "Phi3-long" else LENGTHS
    prompts = [prompt(n, seed=n) for n in lengths]
    with torch.inference_mode():
        logits = [model(torch.tensor([p])).logits[0] for p in prompts]
    return Network(folder, prompts, logits)


def empty_caches(decoder: Decoder) -> list[LayerCache]:
    """Caches over a pool full of NaN."""
    share = block_bytes(decoder.spec, decoder.backend.block_size, decoder.build.dtype.itemsize)
    return decoder.caches(torch.full((NUM_BLOCKS, share), 255, dtype=torch.uint8))


def compute(decoder: Decoder, prompts: list[list[int]], chunks: Sequence[int]) -> list[Tensor]:
    """Logits of all positions; sequence s starts s steps late, so that chunks of all sizes meet in a step."""
    size, caches = decoder.backend.block_size, empty_caches(decoder)
    free = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[free.pop() for _ in range(-(-len(p) // size))] for p in prompts]
    done, parts, step = [0] * len(prompts), [[] for _ in prompts], 0
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        chosen = [s for s, p in enumerate(prompts) if s <= step and done[s] < len(p)]
        counts = [min(chunks[(step - s) % len(chunks)], len(prompts[s]) - done[s]) for s in chosen]
        if (chunk := chunk_of(decoder.spec)) is not None:
            counts = [min(n, chunk - done[s] % chunk) for s, n in zip(chosen, counts, strict=True)]
        ids = [t for s, n in zip(chosen, counts, strict=True) for t in prompts[s][done[s] : done[s] + n]]
        layout = ragged([done[s] for s in chosen], counts, [tables[s] for s in chosen], size)
        logits = decoder.logits(decoder(torch.tensor(ids), layout, caches))
        for s, part in zip(chosen, logits.split(counts), strict=True):
            parts[s].append(part)
            done[s] += len(part)
        step += 1
    return [torch.cat(p) for p in parts]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_logits_equal_hugging_face(network: Network, backend: Backend) -> None:
    decoder = network.decoder(backend)
    for chunks in CHUNKS.values():
        for got, want in zip(compute(decoder, network.prompts, chunks), network.logits, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("qwen")
    model = build_hf(BY_NAME["Qwen3"], folder)
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    with torch.inference_mode():
        return Network(folder, prompts, [model(torch.tensor([p])).logits[0] for p in prompts])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_bfloat16_is_as_close_as_hugging_faces(qwen: Network, backend: Backend) -> None:
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(qwen.folder, dtype=torch.bfloat16, attn_implementation="eager")
    got = compute(qwen.decoder(backend, torch.bfloat16), qwen.prompts, (7, 1))
    with torch.inference_mode():
        theirs = [model(torch.tensor([p])).logits[0].float() for p in qwen.prompts]
    ours_off, theirs_off = (
        max(float((a - b).square().mean().sqrt()) for a, b in zip(x, qwen.logits, strict=True))
        for x in (got, theirs)
    )
    assert ours_off < 1.2 * theirs_off


def test_weights_are_asked_for_once_by_the_names_and_shapes_of_the_spec(network: Network) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple[int, ...]] = {}

        def __contains__(self, name: str) -> bool:
            return True

        def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
            assert name not in self.shapes
            self.shapes[name] = shape
            return torch.zeros(shape)

    spec, _ = decoder_spec(json.loads((network.folder / "config.json").read_text()))
    recorder = Recorder()
    Decoder(spec, backend=Reference(), dtype=torch.float32).load(recorder)
    assert recorder.shapes == dict(parameter_shapes(spec))


def test_a_decoder_holds_no_weights_until_it_is_loaded(qwen: Network) -> None:
    spec, _ = decoder_spec(json.loads((qwen.folder / "config.json").read_text()))
    huge = Decoder(replace(spec, vocab_size=10**7, dim=10**6), backend=Reference(), dtype=torch.bfloat16)
    assert huge.embedding is None and huge.head.weight is None


@pytest.mark.skipif(len(BACKENDS) == 1, reason="the C++ kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_logits_are_the_same_bits_for_any_batch_and_chunks(network: Network, dtype: torch.dtype) -> None:
    """So a preempted or replayed sequence goes on exactly as it was."""
    decoder = network.decoder(Cpu(), dtype)
    whole = compute(decoder, network.prompts, CHUNKS["whole"])
    for chunks in CHUNKS.values():
        for got, want in zip(compute(decoder, network.prompts, chunks), whole, strict=True):
            assert torch.equal(got, want)
    alone = compute(decoder, network.prompts[1:2], (3,))
    assert torch.equal(alone[0], whole[1])


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
def test_a_tied_embedding_is_held_once(tmp_path: Path) -> None:
    """Looked up in the form of the head, unless the head has fewer bits."""
    build_hf(BY_NAME["Llama-tied"], tmp_path)
    spec, names = decoder_spec(json.loads((tmp_path / "config.json").read_text()))
    for bits in (None, 8):
        decoder = Decoder(spec, backend=Cpu(), dtype=torch.bfloat16, bits=bits)
        decoder.load(Checkpoint(tmp_path, names))
        assert (decoder.embedding is decoder.head.weight) == (bits is None)
