"""Benchmarks give others the formats and weights that ours have, and sum up what was measured."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    assert gemm_quantized.summary(records, gemm_quantized.PEERS).splitlines()[0].endswith("in 1 of 3 comparisons")


class Compilation:
    """A Compilation stands in for the process that compiles humming's kernels."""

    failure: Exception | None = None
    stopped = False

    def __init__(self, options: list[str]) -> None:
        Compilation.stopped = False
        assert options[-2:] == ["1", "64"]

    def wait(self, seconds: float) -> None:
        if self.failure:
            raise self.failure

    def stop(self) -> None:
        Compilation.stopped = True


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """Replace what needs a GPU; yield what is tuned and what is timed, in order."""
    from qwen_plugins import tuning

    calls: dict[str, list[Any]] = {"tuned": [], "timed": []}

    def tune(**shape: Any) -> dict[str, float]:
        calls["tuned"].append(tuple(map(str, shape.values())))
        return {"fast": 1.0, "slow": 2.0}

    def time_rotated(found: dict[str, Any], inputs: dict[str, Any], rows: int) -> dict[str, float]:
        calls["timed"].append((rows, *found))
        return dict.fromkeys(found, 1.0)

    def provider(*arguments: Any) -> list[Any]:
        return [lambda x: x]

    gemm_quantized.fastest_kernel.cache_clear()
    monkeypatch.setattr(tuning, "measure", tune)
    monkeypatch.setattr(gemm_quantized, "time_rotated", time_rotated)
    monkeypatch.setattr(gemm_quantized, "random_x", lambda rows, product: torch.zeros(rows, 1))
    monkeypatch.setattr(gemm_quantized, "PROVIDERS", dict.fromkeys(gemm_quantized.PROVIDERS, provider))
    monkeypatch.setattr(gemm_quantized, "Compilation", Compilation)
    monkeypatch.setattr(Compilation, "failure", None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield calls
    gemm_quantized.fastest_kernel.cache_clear()


def test_few_rows_come_first_then_humming_then_prompts(timed: dict[str, list[Any]], tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    records = gemm_quantized.measure(
        ["qwen2.5-7b"], ["int4", "int8"], [1, 64, 512], ["Marlin", "Machete", "humming"], output
    )
    own = (OURS, gemm_quantized.OURS_16_BIT, "cuBLAS", "Marlin", "Machete")
    steps, humming, prompts = timed["timed"][:20], timed["timed"][20:40], timed["timed"][40:]
    assert steps == [(1, *own), (64, *own)] * 10
    assert humming == [(1, "humming"), (64, "humming")] * 10
    assert prompts == [(512, *own)] * 8  # the output projection has none
    assert Compilation.stopped
    assert len(records) == 28
    assert all(("humming" in record) == (record["rows"] <= 64) and record["kernel"] == "fast" for record in records)
    assert json.loads(output.read_text())["results"] == records


def test_a_kernel_is_chosen_once_for_a_size(timed: dict[str, list[Any]], tmp_path: Path) -> None:
    gemm_quantized.measure(["qwen2.5-7b"], ["int4", "int8"], [1, 512], [], tmp_path / "results.json")
    assert len(timed["tuned"]) == len(set(timed["tuned"])) == 3 * (5 + 4)  # two formats and 16 bits


def test_without_hummings_kernels_the_rest_is_measured(
    timed: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Compilation, "failure", RuntimeError("no compiler"))
    records = gemm_quantized.measure(["qwen2.5-7b"], ["int4"], [1, 64, 512], ["humming"], tmp_path / "results.json")
    assert len(records) == 14
    assert not any("humming" in record for record in records)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "without" in line] == ["without humming: RuntimeError: no compiler"]


@pytest.mark.parametrize(
    ("body", "seconds", "message"),
    [
        ("raise RuntimeError('no compiler')", 60, "^RuntimeError: no compiler$"),
        ("import time; time.sleep(60)", 0.1, "^its kernels were not compiled in 0.1 s more$"),
    ],
)
def test_a_compilation_that_fails_or_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float, message: str
) -> None:
    kernel = tmp_path / "humming" / "kernel"
    kernel.mkdir(parents=True)
    (kernel / "humming.py").write_text(body)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    compilation = gemm_quantized.Compilation(["--rows", "1"])
    with pytest.raises(RuntimeError, match=message):
        compilation.wait(seconds)
    started = time.monotonic()
    compilation.stop()
    assert time.monotonic() - started < 20


def test_peers_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(gemm_quantized, "require_gpu", lambda: None)
    monkeypatch.setattr(gemm_quantized, "measure", lambda *arguments: given.extend(arguments) or [])
    monkeypatch.setattr(sys, "argv", ["gemm_quantized", "--peers", "--rows", "64", "1"])
    gemm_quantized.main()
    assert given[2:4] == [[1, 64], []]
