"""benchmarks.nsys_report on recordings as Nsight Systems exports them: the kernels of each layer, and their time."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest

from benchmarks import nsys_report

PID, TID = 7 << 24, (7 << 24) + 9
TABLES = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER, end INTEGER, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, correlationId INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, textId INTEGER, globalTid INTEGER);
CREATE TABLE CUDA_GRAPH_NODE_EVENTS (
    start INTEGER, globalTid INTEGER, graphNodeId INTEGER, originalGraphNodeId INTEGER);
CREATE TABLE TARGET_INFO_GPU (id INTEGER, name TEXT);
INSERT INTO TARGET_INFO_GPU VALUES (0, 'NVIDIA Example');
"""


class Recording:
    """Write the tables: times in nanoseconds; a kernel is (name, its duration, the gap before it)."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path)
        self.database.executescript(TABLES)
        self.strings: dict[str, int] = {}
        self.now, self.clock, self.correlation = 1_000_000, 0, 0

    def insert(self, table: str, *values: object) -> None:
        self.database.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(values))})", values)

    def string(self, text: str) -> int:
        if text not in self.strings:
            self.strings[text] = len(self.strings)
            self.insert("StringIds", self.strings[text], text)
        return self.strings[text]

    def kernel(self, name: str, duration: int, gap: int, node: int | None = None) -> None:
        start = self.now + gap
        self.now = start + duration
        self.insert("CUPTI_ACTIVITY_KIND_KERNEL", start, self.now, self.correlation, PID, self.string(name), node)

    def call(self) -> int:
        self.clock, self.correlation = self.clock + 10, self.correlation + 1
        self.insert("CUPTI_ACTIVITY_KIND_RUNTIME", self.clock, self.clock + 1, TID, self.correlation)
        return self.clock

    def eager(self, layers: list[tuple[str, list[tuple[str, int, int]]]]) -> None:
        """Launch the kernels of each layer in a range of its name; a range around all is TensorRT's own."""
        begin = self.clock
        for name, kernels in layers:
            first = self.clock + 5
            for kernel in kernels:
                self.call()
                self.kernel(*kernel)
            self.insert("NVTX_EVENTS", first, self.clock + 2, 59, name, None, TID)
        registered = self.string("ExecutionContext::enqueue")
        self.insert("NVTX_EVENTS", begin, self.clock + 3, 59, None, registered, TID)

    def capture(self, layers: list[tuple[str, list[tuple[str, int, int]]]]) -> None:
        """Create the nodes of a graph in the layers' ranges, and clone them into the executable graph."""
        node = 0
        for name, kernels in layers:
            first = self.clock + 5
            for _ in kernels:
                self.clock += 10
                self.insert("CUDA_GRAPH_NODE_EVENTS", self.clock, TID, 100 + node, None)
                node += 1
            self.insert("NVTX_EVENTS", first, self.clock + 2, 59, name, None, TID)
        for each in range(node):
            self.insert("CUDA_GRAPH_NODE_EVENTS", self.clock + 4, TID, 200 + each, None)
            self.insert("CUDA_GRAPH_NODE_EVENTS", self.clock + 5, TID, 200 + each, 100 + each)

    def replay(self, layers: list[tuple[str, list[tuple[str, int, int]]]]) -> None:
        self.call()
        for node, kernel in enumerate(kernel for _, kernels in layers for kernel in kernels):
            self.kernel(*kernel, node=200 + node)


def network(norm: list[tuple[str, int, int]], rotary: list[tuple[str, int, int]]) -> list[tuple[str, list]]:
    return [
        ("embedding", [("gather", 1000, 50_000)]),
        ("PWN(layers.0.input_norm/square)", norm),
        ("layers.0.qkv", [("gemm_stream", 20_000, 100)]),
        *([("layers.0.rotary/3", rotary)] if rotary else []),
        ("layers.0.attention", [("decode_attention<half>", 4000, 0)]),
        ("layers.0.output", [("gemm_stream", 10_000, 0)]),
    ]


def write(path: Path, norm: list[tuple[str, int, int]], rotary: list[tuple[str, int, int]] | None = None) -> Path:
    layers = network(norm, rotary or [])
    recording = Recording(path)
    recording.eager(layers)  # warms up
    recording.capture(layers)
    recording.replay(layers)
    recording.eager(layers)
    for _ in range(3):
        recording.replay(layers)
    recording.database.commit()
    recording.database.close()
    return path


NATIVE_NORM = [("generatedNativePointwise", 3000, 500), ("reduce", 4000, 500), ("generatedNativePointwise", 2000, 0)]
PLUGIN_NORM = [("rms_norm_row_in_registers", 2000, 500)]


def test_kernels_belong_to_the_ranges_of_their_launch_or_capture(tmp_path: Path) -> None:
    kernels = nsys_report.read_kernels(write(tmp_path / "native_norms.sqlite", NATIVE_NORM))

    assert len(kernels) == 7 * 6
    assert [kernel.graph is None for kernel in kernels] == [True] * 7 + [False] * 7 + [True] * 7 + [False] * 21
    for begin in range(0, 42, 7):
        kinds = [kernel.kind for kernel in kernels[begin : begin + 7]]
        assert kinds == ["other", "norms", "norms", "norms", "products", "attention", "products"]
    assert kernels[1].ranges == ("PWN(layers.0.input_norm/square)", "ExecutionContext::enqueue")


def test_the_time_of_layers_and_phases(tmp_path: Path) -> None:
    found = nsys_report.read_recording(write(tmp_path / "native_norms.sqlite", NATIVE_NORM))

    assert (found["name"], found["gpu"]) == ("native_norms", "NVIDIA Example")
    for phase in found["phases"].values():
        norm = phase["layers"]["norms"]
        assert (norm["count"], norm["kernels"]) == (1, 3)
        assert norm["microseconds"] == 10.0  # with the gaps before its kernels
        assert norm["microseconds_of_kernels"] == 9.0
        assert [kernel["name"] for kernel in norm["timeline"]] == [name for name, _, _ in NATIVE_NORM]
        assert phase["layers"]["attention"]["microseconds"] == 4.0
        assert phase["kernels"] == 7
        assert phase["microseconds"] == pytest.approx(45.1)
        expected = {"products": 30.0, "attention": 4.0, "norms": 9.0, "other": 1.0, "gaps": 1.1}
        assert phase["microseconds_by_kind"] == pytest.approx(expected)


def test_what_all_layers_share_is_not_an_attention(tmp_path: Path) -> None:
    """Cosines and sines are gathered once, in a range of the rotary embedding, before the first layer."""
    shared = [("rotary/1", [("gather", 3000, 0)])]
    layers = shared + network(PLUGIN_NORM, [("rotate", 5000, 1000)])
    recording = Recording(tmp_path / "native_rotary.sqlite")
    recording.eager(layers)
    recording.capture(layers)
    recording.replay(layers)
    recording.database.commit()

    phases = nsys_report.read_recording(tmp_path / "native_rotary.sqlite")["phases"]

    attention = phases["decode step"]["layers"]["attention"]
    assert (attention["count"], attention["kernels"], attention["microseconds"]) == (1, 2, 10.0)


def test_tables_results_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write(tmp_path / "plugins.sqlite", PLUGIN_NORM),
        write(tmp_path / "native_norms.sqlite", NATIVE_NORM),
        write(tmp_path / "native_rotary.sqlite", PLUGIN_NORM, [("rotate", 5000, 1000)]),
    ]
    options = ["--results", str(tmp_path / "nsys.json"), "--pictures", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["nsys_report", *map(str, files), *options])
    nsys_report.main()
    printed = capsys.readouterr().out
    assert "| plugins, decode step, norms | 1 | 2.50 | 2.00 |" in printed
    assert "| native_norms, decode step, norms | 3 | 10.0 | 9.00 |" in printed
    assert "| native_rotary, prompt, attention | 2 | 10.0 | 9.00 |" in printed
    recordings = json.loads((tmp_path / "nsys.json").read_text())["results"]
    assert set(nsys_report.pairs(recordings)) == {"nsys_rms_norm", "nsys_attention"}
    assert set(nsys_report.pairs(recordings[:2])) == {"nsys_rms_norm"}

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["nsys_report", "--draw", *options])
    nsys_report.main()
    for name in nsys_report.COMPARISONS:
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.nsys-rep").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"run.nsys-rep is no SQLite export of a recording: nsys export --type sqlite"):
        nsys_report.read_recording(tmp_path / "run.nsys-rep")


def test_a_recording_without_graphs_says_how_to_record(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "eager.sqlite")
    recording.eager(network(PLUGIN_NORM, []))
    recording.database.commit()
    with pytest.raises(SystemExit, match="record with --cuda-graph-trace=node"):
        nsys_report.read_recording(tmp_path / "eager.sqlite")
