"""What steering costs on a GPU, and how near decoding comes to its memory's bandwidth.

The model is random and of 7B parameters, as speed does not depend on what they are.
"""

import time
from dataclasses import asdict, replace
from typing import Final

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.core import OPTIONS, Bench, BenchmarkError, random_head, random_maps
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.steering import beside_none, stacks
from server.cli.bench_stats import Spread
from server.cli.bench_tables import Rows, throughput_rows
from server.engine.torch.build import build_core
from server.engine.torch.loader import LoadedModel, describe, load_model
from server.engine.torch.slab import SlabShape

BATCHES: Final = (1, 64, 256)
_READ_BYTES: Final = 4 * 1024**3  # at once, so that a launch is nothing beside it
_READS: Final = 20
_TITLE: Final = "Decode speed, steered ÷ unsteered. Target: ≥ 0.98."


def measure_gpu(options: Options, bar: Progress) -> Section:
    """Both, on the first GPU.

    Raises:
        BenchmarkError: there is none.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError("gpu was not measured: this machine has no GPU that torch can use")
    device = torch.device("cuda:0")
    with torch.inference_mode():
        bandwidth = read_speed(device, _READ_BYTES)
    loaded = (
        random_llama(device)
        if options.model == "embedded"
        else load_model(options.model, device=str(device))
    )
    return measure_on(open_random(loaded, max(BATCHES)), bandwidth, BATCHES, options, bar)


def random_llama(device: torch.device) -> LoadedModel:
    """A Llama as large as Mistral 7B, in bfloat16, that knows nothing."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    module: nn.Module = model
    module.eval().requires_grad_(False)
    return LoadedModel(model, _tokenizer(), describe(model, "random-llama-7b"))


def open_random(loaded: LoadedModel, max_batch_size: int) -> Bench:
    """An engine with random interventions at the model's default sites."""
    options = replace(OPTIONS, max_batch_size=max_batch_size, compile_layers=False)
    bench = Bench(loaded, build_core(loaded, options), {}, "lineas", "argre")
    bench.parameters["lineas"] = random_maps(loaded, bench.default_sites, 0)
    bench.parameters["argre"] = random_head(loaded, 0)
    return bench


def measure_on(
    bench: Bench, bandwidth: float, batches: tuple[int, ...], options: Options, bar: Progress
) -> Section:
    """Each stack beside none, at each batch.

    Args:
        bandwidth: of the device's memory, bytes a second.
    """
    arms, turns = stacks(bench), options.turns
    task = bar.add_task("gpu", total=len(batches) * len(arms) * (turns.rounds + 1))
    # One by one, as the keys and values of all arms at once would not fit.
    outcome = [
        each
        for batch in batches
        for name, edits in arms.items()
        for each in beside_none(bench, {name: edits}, batch, turns, lambda: bar.advance(task))
    ]
    step = next(each.comparison.base_seconds for each in outcome if each.batch == 1)
    moved = step_bytes(bench, turns.prompt_tokens + turns.tokens // 2)
    return Section(
        "gpu",
        "What steering costs on a GPU",
        options.conditions_on(bench.loaded.description.id),
        bench.dtype,
        [
            throughput_rows(_TITLE, "unsteered", outcome),
            _bandwidth_rows(step, moved, bandwidth),
        ],
        {
            "gpu": [asdict(each) for each in outcome],
            "one_sequence": {
                "seconds": asdict(step),
                "bytes": moved,
                "bytes_per_second": bandwidth,
                "share": moved / step.median / bandwidth,
            },
        },
    )


def _bandwidth_rows(step: Spread, moved: int, bandwidth: float) -> Rows:
    reached = moved / step.median
    return Rows(
        "One unsteered sequence beside what its weights, keys and values take to read. "
        "Target: ≥ 0.85.",
        ("step, ms", "read, GB", "GB/s", "this GPU reads, GB/s", "share"),
        (
            (
                step.times(1e3).shown(3),
                f"{moved / 1e9:.2f}",
                f"{reached / 1e9:.0f}",
                f"{bandwidth / 1e9:.0f}",
                f"{reached / bandwidth:.3f}",
            ),
        ),
    )


def step_bytes(bench: Bench, tokens: int) -> int:
    """What a step of one sequence of so many tokens reads: weights once, keys and values once."""
    model = bench.loaded.model
    embeddings: object = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    rows_only = 0 if tied else sum(each.nbytes for each in embeddings.parameters())
    module: nn.Module = model
    weights = sum(each.nbytes for each in module.parameters()) - rows_only
    return weights + tokens * SlabShape.of(model).bytes_per_token


def read_speed(device: torch.device, size: int) -> float:
    """Bytes a second at which a device sums what lies in its memory."""
    values = torch.ones(size // 4, dtype=torch.float32, device=device)
    float(values.sum())
    began = time.perf_counter()
    for _ in range(_READS):
        total = values.sum()
    float(total)  # waits for all of them
    return _READS * size / (time.perf_counter() - began)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, as an engine wants one; nothing reads the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
