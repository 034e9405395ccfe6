"""The plug-in library in a real TensorRT's registry: creators, plug-ins from fields and from bytes, what is refused.

Needs the tensorrt package (8.6), but no GPU.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
if not trt.__version__.startswith("8.6."):
    pytest.skip(f"these are the interfaces of TensorRT 8.6, not {trt.__version__}", allow_module_level=True)

from compiling import CPP_TESTS, compile_command, plugin_sources, run_checked  # noqa: E402

from tests.support.plugin_fields import (  # noqa: E402
    FIELDS,
    FLOAT_FIELDS,
    GOOD_FIELDS,
    REFUSED_FIELDS,
    SCHEMA_VERSIONS,
    field_collection,
    key_of,
    name_and_version,
)

pytestmark = pytest.mark.tensorrt

# The library that is tested, in place of the one that `import qwen_plugins` registers.
LIBRARY_VARIABLE = "QWEN_PLUGINS_TEST_LIBRARY"


@pytest.fixture(scope="module")
def creators() -> dict[str, Any]:
    if LIBRARY_VARIABLE in os.environ:
        trt.get_plugin_registry().load_library(os.environ[LIBRARY_VARIABLE])
    else:
        import qwen_plugins  # noqa: F401
    found = {}
    for creator in trt.get_plugin_registry().plugin_creator_list:
        if creator.plugin_namespace == "qwen_plugins":
            key = key_of(creator.name, creator.plugin_version)
            assert key not in found
            found[key] = creator
    return found


class ActingLogger(trt.ILogger):
    """Run an action while TensorRT knows this logger.

    Without a GPU a Builder can't be made, but TensorRT says so to the logger that it was given, and at that moment the
    logger is the registered one: what a plug-in logs then must arrive here.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__()
        self.action: Callable[[], Any] | None = action
        self.result: Any = None
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        action, self.action = self.action, None
        if action is not None:
            self.result = action()
        elif severity == trt.ILogger.ERROR and "[qwen_plugins]" in message:
            self.errors.append(message)


def result_and_logged_errors(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    logger = ActingLogger(action)
    with contextlib.suppress(TypeError):  # there is no GPU
        trt.Builder(logger)
    assert logger.action is None, "TensorRT logged nothing, so that the action was not run"
    return logger.result, logger.errors


def assert_refused(action: Callable[[], Any], message: str) -> None:
    result, errors = result_and_logged_errors(action)
    assert result is None
    assert len(errors) == 1, errors
    assert message in errors[0]


def test_creators_and_their_fields(creators: dict[str, Any]) -> None:
    assert set(creators) == set(FIELDS)
    for name, creator in creators.items():
        fields = {field.name: field.type for field in creator.field_names}
        assert set(fields) == FIELDS[name]
        for field, kind in fields.items():
            assert kind == (trt.PluginFieldType.FLOAT32 if field in FLOAT_FIELDS else trt.PluginFieldType.INT32)
        assert trt.get_plugin_registry().get_plugin_creator(*name_and_version(name), "qwen_plugins") is not None


def test_loading_again_does_no_harm(creators: dict[str, Any]) -> None:
    import qwen_plugins
    from qwen_plugins.registration import register_tensorrt_plugins

    threads = [threading.Thread(target=register_tensorrt_plugins) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trt.get_plugin_registry().load_library(str(qwen_plugins.tensorrt_library_path()))

    names = [key_of(c.name, c.plugin_version) for c in trt.get_plugin_registry().plugin_creator_list]
    for name in FIELDS:
        assert names.count(name) == 1
    assert creators["RmsNorm"].create_plugin("layer", field_collection(trt, GOOD_FIELDS["RmsNorm"])) is not None


@pytest.mark.parametrize(
    ("name", "more_fields", "num_outputs"),
    [
        ("RmsNorm", {}, 1),
        ("RmsNorm", {"type_id": np.int32(0), "unit_offset": np.int32(1)}, 1),
        ("RmsNorm", {"residual": np.int32(1), "weight_type_id": np.int32(0), "round_before_weight": np.int32(1)}, 2),
        ("RmsNormQuantization", {}, 2),
        ("RmsNormQuantization", {"dyn_act_scaling": np.int32(0), "out_type_id": np.int32(2)}, 1),
        ("RmsNormQuantization", {"residual": np.int32(1), "smoothing": np.int32(1)}, 3),
        ("Gemm", {}, 1),
        ("QwenGemm", {}, 1),
        ("Gemm", {"bias": np.int32(1), "activation": np.int32(1), "constant_weight": np.int32(0)}, 1),
        ("Gemm:2", {}, 1),
        ("QwenGemm:2", {"weight_bits": np.int32(8), "zeros": np.int32(0), "activation": np.int32(1)}, 1),
        ("RmsNormQuantization", {"int32_output": np.int32(1), "out_type_id": np.int32(6)}, 2),
        ("QuantizePerToken", {}, 2),
        ("QuantizeTensor", {}, 1),
        ("Gemm:3", {"quantize_output": np.int32(1)}, 1),
        ("QwenGemm:3", {"x_type_id": np.int32(2), "group_size": np.int32(0), "activation": np.int32(1)}, 1),
        ("GptAttention:2", {"context_type": np.int32(2)}, 2),
        ("GptAttention", {}, 2),
        ("GptAttention", {"rotary_embedding_dim": np.int32(0), "position_embedding_type": np.int32(0)}, 2),
        ("GptAttention:2", {}, 2),
        ("GptAttention:2", {"kv_cache_type": np.int32(2), "qk_norm": np.int32(1)}, 2),
        ("GptAttention", {"qk_norm": np.int32(1), "query_scale": np.int32(1), "q_scaling": np.float32(2)}, 2),
    ],
)
def test_fields_to_plugin_to_bytes_and_back(
    creators: dict[str, Any], name: str, more_fields: dict[str, Any], num_outputs: int
) -> None:
    plugin = creators[name].create_plugin("layer", field_collection(trt, GOOD_FIELDS[name] | more_fields))

    assert (plugin.plugin_type, plugin.plugin_version) == name_and_version(name)
    assert plugin.plugin_namespace == "qwen_plugins"
    assert plugin.num_outputs == num_outputs
    written = bytes(plugin.serialize())
    assert len(written) == plugin.serialization_size
    again = creators[name].deserialize_plugin("layer", written)
    assert again.num_outputs == num_outputs
    assert bytes(again.serialize()) == written
    assert bytes(again.clone().serialize()) == written


@pytest.mark.parametrize(("name", "changed", "message"), REFUSED_FIELDS)
def test_bad_fields_are_refused_with_an_error_in_the_log(
    creators: dict[str, Any], name: str, changed: dict[str, Any], message: str
) -> None:
    merged = GOOD_FIELDS[name] | changed
    fields = field_collection(trt, {field: value for field, value in merged.items() if value is not None})

    assert_refused(lambda: creators[name].create_plugin("layer", fields), message)


def test_types_that_only_later_versions_have_are_refused(creators: dict[str, Any]) -> None:
    for name, field, number, expected in (
        *((name, "type_id", 7, "0 (float32), 1 (float16)") for name in FIELDS),
        ("RmsNormQuantization", "out_type_id", 6, "2 (int8)"),
    ):
        fields = field_collection(trt, GOOD_FIELDS[name] | {field: np.int32(number)})
        refused = f"field '{field}' is {number}; expected {expected}"
        assert_refused(lambda name=name, fields=fields: creators[name].create_plugin("layer", fields), refused)


@pytest.mark.parametrize("name", FIELDS)
def test_bad_bytes_are_refused_with_an_error_in_the_log(creators: dict[str, Any], name: str) -> None:
    creator = creators[name]
    good = bytes(creator.create_plugin("layer", field_collection(trt, GOOD_FIELDS[name])).serialize())
    rng = np.random.default_rng()
    for size in (0, 1, 15, 16, len(good) - 1):
        assert_refused(
            lambda size=size: creator.deserialize_plugin("layer", good[:size]), f"has {size} bytes; expected"
        )
    assert_refused(lambda: creator.deserialize_plugin("layer", good + b"\0"), "bytes; expected")
    assert_refused(lambda: creator.deserialize_plugin("layer", rng.bytes(len(good))), "not one of this library")
    for position in range(len(good)):
        changed = bytearray(good)
        changed[position] ^= 1 << int(rng.integers(8))
        assert_refused(
            lambda changed=changed: creator.deserialize_plugin("layer", bytes(changed)), "serialised plug-in"
        )


@pytest.mark.parametrize("name", FIELDS)
def test_another_schema_version_says_what_to_build_again(creators: dict[str, Any], name: str) -> None:
    written = bytearray(
        bytes(creators[name].create_plugin("layer", field_collection(trt, GOOD_FIELDS[name])).serialize())
    )
    for version in (0, SCHEMA_VERSIONS[name] + 1):
        written[4:8] = version.to_bytes(4, "little")
        refused = f"schema version {version}; this library reads schema version"
        assert_refused(lambda: creators[name].deserialize_plugin("layer", bytes(written)), refused)


def test_bytes_of_the_other_plugin_are_refused(creators: dict[str, Any]) -> None:
    plugin = creators["RmsNorm"].create_plugin("layer", field_collection(trt, GOOD_FIELDS["RmsNorm"]))
    written = bytes(plugin.serialize())

    refused = "serialised plug-in has 6 attributes; expected 9"
    assert_refused(lambda: creators["RmsNormQuantization"].deserialize_plugin("layer", written), refused)


@pytest.mark.skipif(LIBRARY_VARIABLE in os.environ, reason="this is the run under the address sanitizer")
def test_all_of_this_under_the_address_sanitizer(tmp_path: Path) -> None:
    """Run the tests above in a second process, with a library whose memory accesses are checked."""
    library = tmp_path / "libqwen_plugins_trt8.so"
    command = [*compile_command(8), "-shared", "-fPIC", "-fvisibility=hidden", "-fsanitize=address", "-g"]
    run_checked([*command, *plugin_sources(8), CPP_TESTS / "recorded_launches.cpp", "-o", library])
    # The sanitizer looks for libstdc++ when it starts, so that has to be there from the beginning as well.
    preloaded = [
        run_checked([command[0], f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        LIBRARY_VARIABLE: str(library),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",  # Python leaks; CUDA wants the gap
    }

    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(tests, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "AddressSanitizer" not in result.stderr
