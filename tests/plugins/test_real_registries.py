"""The plug-in libraries in the real registries of TensorRT's lean runtimes, 10 and 11, and of TensorRT-RTX.

Each package that is installed is tested: tensorrt-lean-cu13 (10 or 11), tensorrt-rtx-cu13. No GPU is needed.
"""

import importlib
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import CPP_TESTS, CSRC, compile_command, plugin_sources, run, run_checked

import qwen_plugins
from qwen_plugins.registration import register_tensorrt_plugins
from tests.support.plugin_fields import (
    FIELDS,
    FLOAT_FIELDS,
    GOOD_FIELDS,
    NUM_OUTPUTS,
    REFUSED_FIELDS,
    SCHEMA_VERSIONS,
    field_collection,
    key_of,
    name_and_version,
)

pytestmark = pytest.mark.tensorrt_registry

# Each package's libraries, of which only one is TensorRT's own.
PACKAGES = {
    "tensorrt_lean": "libnvinfer_lean.so.*",
    "tensorrt_dispatch": "libnvinfer_dispatch.so.*",
    "tensorrt_rtx": "libtensorrt_rtx.so.*",
}


@pytest.fixture(scope="module", params=PACKAGES)
def trt(request: pytest.FixtureRequest) -> Any:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install {request.param.replace('_', '-')}-cu13")
    return importlib.import_module(request.param)


def major_of(trt: Any) -> int:
    """The major version whose library fits."""
    major = int(trt.__version__.split(".")[0])
    return 11 if major == 1 else major


def creators_of(trt: Any) -> dict[str, Any]:
    ours = [creator for creator in trt.get_plugin_registry().all_creators if creator.plugin_namespace == "qwen_plugins"]
    creators = {key_of(creator.name, creator.plugin_version): creator for creator in ours}
    assert len(creators) == len(ours)
    return creators


def in_another_process(trt: Any, script: str, *arguments: Any) -> tuple[Any, str]:
    """Run a script without qwen_plugins: what it prints as JSON last, and its standard error. It must end well."""
    prologue = f"import json, sys, {trt.__name__} as trt\nregistry = trt.get_plugin_registry()\n"
    prologue += "ours = lambda: (c for c in registry.all_creators if c.plugin_namespace == 'qwen_plugins')\n"
    prologue += "names = lambda: [c.name + f':{c.plugin_version}'.removesuffix(':1') for c in ours()]\n"
    result = run([sys.executable, "-c", prologue + script, *arguments])
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_import_registers_every_creator_with_its_fields(trt: Any) -> None:
    creators = creators_of(trt)
    assert set(creators) == set(FIELDS)
    for name, creator in creators.items():
        # By name: two packages in one process share Python's types of one of them.
        types = {field.name: field.type.name for field in creator.field_names}
        assert types == {field: "FLOAT32" if field in FLOAT_FIELDS else "INT32" for field in FIELDS[name]}
        assert trt.get_plugin_registry().get_creator(*name_and_version(name), "qwen_plugins") is not None


def test_loading_again_does_no_harm(trt: Any) -> None:
    """TensorRT answers with null, as for an error, though all is registered: docs/tensorrt.md says so."""
    library = str(qwen_plugins.tensorrt_library_path(trt.__version__))

    def load() -> None:
        assert register_tensorrt_plugins(trt.__name__)
        assert trt.get_plugin_registry().load_library(library) is None

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(creators_of(trt)) == set(FIELDS)


@pytest.mark.parametrize("major", [8, 10, 11])
def test_only_the_library_that_fits_is_taken(trt: Any, major: int) -> None:
    """And the one that fits is taken after another that was refused."""
    fitting = qwen_plugins.tensorrt_library_path(major_of(trt))
    script = "taken = registry.load_library(sys.argv[1]) is not None\nregistered = names()\n"
    script += "registry.load_library(sys.argv[2])\nprint(json.dumps([taken, registered, names()]))"

    library = qwen_plugins.tensorrt_library_path(major)
    (taken, registered, afterwards), stderr = in_another_process(trt, script, library, fitting)

    fits = major == major_of(trt)
    assert taken == fits
    assert set(registered) == (set(FIELDS) if fits else set())
    assert set(afterwards) == set(FIELDS)
    refused = f"{library.name} was loaded into TensorRT"
    assert (refused in stderr) == (not fits and major != 8)  # TensorRT itself refuses that for 8.6
    assert ("load libqwen_plugins_trt" + str(major_of(trt)) in stderr) == (not fits and major != 8)


def test_a_plugin_outlives_the_registration_of_its_library(trt: Any) -> None:
    script = """import numpy
handle = registry.load_library(sys.argv[1])
field = numpy.array([1], numpy.int32)
fields = trt.PluginFieldCollection([trt.PluginField("type_id", field, trt.PluginFieldType.INT32)])
creator = registry.get_creator("RmsNorm", "1", "qwen_plugins")
plugin = creator.create_plugin("layer", fields, trt.TensorRTPhase.BUILD)
registry.deregister_library(handle)
core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
print(json.dumps([core.plugin_name, names()]))"""

    printed, _ = in_another_process(trt, script, qwen_plugins.tensorrt_library_path(major_of(trt)))

    assert printed == ["RmsNorm", []]


@pytest.mark.parametrize("name", FIELDS)
def test_plugins_of_both_phases(trt: Any, name: str) -> None:
    creator = creators_of(trt)[name]
    states = [GOOD_FIELDS[name] | {"schema_version": np.int32(version + 1)} for version in range(SCHEMA_VERSIONS[name])]
    build, runtime = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
    for phase, fields in ((build, GOOD_FIELDS[name]), *((runtime, state) for state in states)):
        plugin = creator.create_plugin("layer", field_collection(trt, fields), phase)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        assert (core.plugin_name, core.plugin_version) == name_and_version(name)
        assert core.plugin_namespace == "qwen_plugins"
        assert plugin.get_capability_interface(trt.PluginCapabilityType.BUILD).num_outputs == NUM_OUTPUTS[name]


def logged(trt: Any, capfd: pytest.CaptureFixture[str]) -> str:
    """What the plug-ins have said. The others take no logger without a GPU, and messages go to stderr."""
    if trt.__name__ != "tensorrt_rtx":
        return capfd.readouterr().err
    from tests.support.rtx_builder import LOG

    return "\n".join(message for severity, message in LOG.take() if severity == trt.ILogger.ERROR)


@pytest.fixture
def empty_log(trt: Any, capfd: pytest.CaptureFixture[str]) -> None:
    if trt.__name__ == "tensorrt_rtx":
        pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
        from tests.support.rtx_builder import builder

        builder()  # gives TensorRT its logger
    logged(trt, capfd)


@pytest.mark.usefixtures("empty_log")
def test_wrong_fields_are_refused_with_an_error_in_the_log(trt: Any, capfd: pytest.CaptureFixture[str]) -> None:
    creators = creators_of(trt)
    for name, changed, message in REFUSED_FIELDS:
        merged = GOOD_FIELDS[name] | changed
        fields = field_collection(trt, {field: value for field, value in merged.items() if value is not None})
        assert creators[name].create_plugin("layer", fields, trt.TensorRTPhase.BUILD) is None
        said = logged(trt, capfd)
        assert said.startswith(f"[qwen_plugins] {name_and_version(name)[0]} 'layer': ")
        assert message in said


@pytest.mark.usefixtures("empty_log")
@pytest.mark.parametrize("name", FIELDS)
def test_state_of_another_schema_is_refused(trt: Any, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    later = SCHEMA_VERSIONS[name] + 1
    for version, message in ((later, f"schema version {later}"), (None, "no schema version")):
        state = GOOD_FIELDS[name] | ({} if version is None else {"schema_version": np.int32(version)})
        fields = field_collection(trt, state)
        assert creators_of(trt)[name].create_plugin("layer", fields, trt.TensorRTPhase.RUNTIME) is None
        assert f"serialised plug-in has {message}; this library reads schema version" in logged(trt, capfd)


def test_plugins_are_made_in_several_threads(trt: Any) -> None:
    creators = creators_of(trt)
    made: list[Any] = []

    def create() -> None:
        for name in list(FIELDS) * 25:
            fields = field_collection(trt, GOOD_FIELDS[name])
            made.append(creators[name].create_plugin("layer", fields, trt.TensorRTPhase.BUILD))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 * 25 * len(FIELDS)
    assert None not in made


def test_whole_lives_of_plugins_from_a_cpp_program(trt: Any, tmp_path: Path) -> None:
    """What test_plugin_life_cycle.py drives directly, here through the registry: fields, clones, state, errors."""
    major = major_of(trt)
    library, program = tmp_path / "libplugins.so", tmp_path / "life_cycle"
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,--version-script={CSRC / 'plugins' / 'exports.map'}"]
    run_checked([*compile_command(major), *shared, *plugin_sources(major), "-o", library])
    # The library's calls of the kernels end in the program's stand-ins for them.
    sources = ["life_cycle_v3.cpp", "real_registry.cpp", "recorded_launches.cpp"]
    linked = ["-rdynamic", *(CPP_TESTS / source for source in sources), "-pthread", "-ldl"]
    run_checked([*compile_command(major), *linked, "-o", program])

    libraries = importlib.import_module(f"{trt.__name__}_libs")
    [tensorrt] = Path(libraries.__file__).parent.glob(PACKAGES[trt.__name__])
    environment = os.environ | {
        "QWEN_PLUGINS_TEST_TENSORRT": str(tensorrt),
        "QWEN_PLUGINS_TEST_LIBRARY": str(library),
        "QWEN_PLUGINS_TEST_WRONG": str(qwen_plugins.tensorrt_library_path(10 if major == 11 else 11)),
    }
    assert "lives of plug-ins passed" in run_checked([program], env=environment)


def test_layers_that_the_python_functions_add() -> None:
    """In a process of its own, where NVIDIA's bindings of the lean runtime are `tensorrt`; it has no network."""
    pytest.importorskip("tensorrt_lean", reason="tensorrt_lean is not installed: pip install tensorrt-lean-cu13")
    found = json.loads(run_checked([sys.executable, Path(__file__).with_name("layers_with_bindings.py")]))
    assert "could not create the plug-in Gemm" in found.pop("refused")
    outputs = NUM_OUTPUTS | {"RmsNorm": 2}
    assert found == {name: [*name_and_version(name), "qwen_plugins", count] for name, count in outputs.items()}
