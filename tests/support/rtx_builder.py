"""Build engines with TensorRT-RTX on a CPU, and read from its log what is in them.

TensorRT-RTX 1.7 loads no engine without a GPU, but the builder lists the layers, with types and shapes, in its log.

As a program it builds the models of standard input, one line of JSON each, and prints what came of each: a model that
ends the process is the one after the last line printed.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

import qwen_plugins  # noqa: F401 (registers the plug-ins)

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # minimum, optimum and maximum of each dynamic input


class Log(trt.ILogger):
    """Keep messages. One serves the whole process: TensorRT keeps the first that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[Any, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.messages.append((severity, message))

    def take(self) -> list[tuple[Any, str]]:
        taken, self.messages = self.messages, []
        return taken


LOG = Log()
_builder: Any = None


def builder() -> Any:
    """Return the process's builder: the first takes half a second."""
    global _builder
    if _builder is None:
        _builder = trt.Builder(LOG)
    return _builder


@dataclass(frozen=True)
class Tensor:
    """A Tensor is a layer's input or output as the builder lists it: its type's name and its shape, -1 for dynamic."""

    type: str
    shape: Shape


@dataclass(frozen=True)
class Layer:
    """A Layer is one entry of the builder's list. A plug-in's kind is "custom_layer"."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class Built:
    """Hold what came of a model: its plan, or None and what was said about it."""

    plan: bytes | None
    layers: list[Layer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def plugins(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == "custom_layer"]


def build(model: bytes | Path, profiles: Sequence[Profile] = (), capabilities: Sequence[str] = ()) -> Built:
    """Parse an ONNX model and build its engine.

    model: serialised, or its file, beside which its weights may be.
    profiles: optimization profiles.
    capabilities: of the GPUs that the engine is for, such as "SM89"; none: the builder's own choice.
    """
    LOG.take()
    network = builder().create_network(0)
    parser = trt.OnnxParser(network, LOG)
    if not (parser.parse_from_file(str(model)) if isinstance(model, Path) else parser.parse(model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return Built(None, [], _errors(LOG.take()) + [f"{error.node_name()}: {error.desc()}" for error in errors])
    config = builder().create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), i)
    for ranges in profiles:
        profile = builder().create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder().build_serialized_network(network, config)
    messages = LOG.take()
    listed = [message for _, message in messages if message.startswith("Layers:\n")]
    return Built(None if plan is None else bytes(plan), _layers(listed[0]) if listed else [], _errors(messages))


def _errors(messages: Sequence[tuple[Any, str]]) -> list[str]:
    severe = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
    # Without a GPU, TensorRT reports CUDA's status after each error of its own.
    return [message for severity, message in messages if severity in severe and "catchCudaError" not in message]


def _layers(listing: str) -> list[Layer]:
    layers = []
    for line in listing.splitlines():
        found = re.match(
            r"Name: (.*?)(?:_myl\d+_\d+)?, LayerType: (\w+), "
            r"Inputs: \[(.*?)\], Constants: .*?, Outputs: \[(.*)\], TacticName",
            line,
        )
        if found:
            layers.append(Layer(found[1], found[2], _tensors(found[3]), _tensors(found[4])))
    return layers


def _tensors(text: str) -> tuple[Tensor, ...]:
    found = re.findall(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)", text)
    return tuple(Tensor(kind, tuple(map(int, dims.split(","))) if dims else ()) for dims, kind in found)


def main() -> None:
    """Answer each line of standard input, {"case", "model" (hexadecimal), "profile"}."""
    for line in sys.stdin:
        given = json.loads(line)
        built = build(bytes.fromhex(given["model"]), [given["profile"]] if given["profile"] else [])
        print(json.dumps({"case": given["case"], "built": built.plan is not None, "errors": built.errors}), flush=True)


if __name__ == "__main__":
    main()
