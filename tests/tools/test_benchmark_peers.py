"""Benchmarks give others the formats and weights that ours have, and sum up what was measured."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import qwen_model
from benchmarks import gemm_quantized
from benchmarks.common import OURS
from benchmarks.generate import weights_text

torch = pytest.importorskip("torch")


def options(quantization: str | None, head: str = "none") -> argparse.Namespace:
    return argparse.Namespace(
        shape="qwen2.5-7b",
        layers=1,
        dtype="float16",
        max_batch_size=4,
        kv_cache_dtype="auto",
        quantization=quantization,
        head_quantization=head,
        group_size=128,
        asymmetric=False,
        per_token=quantization == "fp8",
    )


@pytest.mark.parametrize(("quantization", "bits", "strategy"), [("int4", 4, "group"), ("fp8", 8, "channel")])
def test_both_servers_have_the_same_formats(tmp_path: Path, quantization: str, bits: int, strategy: str) -> None:
    from benchmarks import serving
    from qwen_model.interface.engine_config import EngineConfig

    given = options(quantization)
    serving.write_model(tmp_path, serving.model_values(given), given)
    published = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]
    weights = published["config_groups"]["group_0"]["weights"]
    assert (published["quant_method"], published["ignore"]) == ("compressed-tensors", ["lm_head"])
    assert (weights["num_bits"], weights["strategy"]) == (bits, strategy)
    formats = EngineConfig.read(tmp_path / "engine").weight_formats
    assert {each.bits for each in formats.values()} == {bits}
    assert not any("head" in module for module in formats)


def test_without_quantization_the_checkpoint_has_none(tmp_path: Path) -> None:
    from benchmarks import serving

    given = options(None)
    serving.write_model(tmp_path, serving.model_values(given), given)
    assert "quantization_config" not in json.loads((tmp_path / "checkpoint" / "config.json").read_text())


@pytest.mark.parametrize(
    ("implementation", "head", "text"),
    [
        ("qwen_model", "int8", "float16, int4, int8 head"),
        ("qwen_model", "none", "float16, int4, 16-bit head"),
        ("vllm", "int8", "float16, int4, 16-bit head"),
    ],
)
def test_results_say_which_head_was_used(implementation: str, head: str, text: str) -> None:
    assert weights_text(options("int4", head), implementation) == text


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_of_vllm_are_as_large_as_ours(bits: int) -> None:
    from benchmarks.vllm_weights import WEIGHT_SCALE, WorkerExtension

    layer = torch.nn.Module()
    layer.input_size_per_partition, layer.output_size_per_partition = 256, 64
    packed, scales = torch.zeros(64, 256 * bits // 32, dtype=torch.int32), torch.zeros(64, 2)
    for name, tensor in (("weight_packed", packed), ("weight_scale", scales)):
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(get_model=lambda: layer)
    assert worker.fill_weights() == 2
    codes = torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1).view(64, 256)
    weight = (codes - (1 << bits - 1)) * scales.repeat_interleave(128, 1)
    assert abs(weight.mean()) < 0.001
    assert weight.std() == pytest.approx(WEIGHT_SCALE, rel=0.05)


@pytest.mark.parametrize(("stored_as", "kinds"), [(None, set()), ("gptq", {4}), ("compressed-tensors", {4})])
def test_random_checkpoints_can_be_built(tmp_path: Path, stored_as: str | None, kinds: set[int]) -> None:
    from benchmarks.generate import COMMON
    from benchmarks.random_checkpoint import write_checkpoint

    sizes = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    values = {**COMMON, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_checkpoint(tmp_path / "checkpoint", values, stored_as)
    summary = qwen_model.build_engine(tmp_path / "checkpoint", output_dir=tmp_path / "engine", dtype="float16")
    assert {each.bits for each in summary.config.weight_formats.values()} == kinds


def test_the_memory_of_a_build_is_that_of_its_process() -> None:
    from benchmarks.build_times import run

    seconds, resident, anonymous = run(
        [sys.executable, "-c", "held = b'1' * (200 << 20); import time; time.sleep(0.3)"]
    )
    assert seconds >= 0.3
    assert 200 << 20 <= anonymous <= resident < 300 << 20


def test_tables_of_quantized_gemms() -> None:
    layer = {"model": "qwen2.5-7b", "product": "gate-up", "format": "int8, by channel"}
    floor = (3584 * 37888 + 2 * 37888) / 3e12 * 1e6
    records = [
        {**layer, "rows": 16, "kernel": "a", OURS: 2 * floor, gemm_quantized.OURS_16_BIT: 90.0, "Marlin": 3 * floor},
        {**layer, "rows": 64, "kernel": "b", OURS: 3 * floor, gemm_quantized.OURS_16_BIT: 90.0, "Marlin": 3 * floor},
        {**layer, "rows": 512, "kernel": "c", OURS: 110.0, gemm_quantized.OURS_16_BIT: 100.0, "Marlin": 55.0},
    ]
    steps = gemm_quantized.steps_table(records, 3e12).splitlines()
    assert steps[2] == "| qwen2.5-7b gate-up, 3584→37888 | int8, by channel | 136 | 50% | 1.50 | 1.00 (64) |"
    prompts = gemm_quantized.prompts_table(records).splitlines()
    assert prompts[2:] == [
        "| qwen2.5-7b gate-up, 3584→37888 | int8, by channel | 1.10 |",
        "| **all layers of qwen2.5-7b** | int8, by channel | 1.10 |",
    ]
    assert gemm_quantized.summary(records).splitlines()[0].endswith("in 3 of 6 comparisons")
