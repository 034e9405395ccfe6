"""Add TensorRT's own layers: constants, and what the plug-ins compute, made of several layers."""

import weakref
from typing import Any

import numpy as np
import tensorrt as trt

MAJOR = int(trt.__version__.split(".")[0])
_LARGEST = {"INT8": 127.0, "FP8": 448.0}  # the values that dynamic quantization scales a row's maximum to


def is_strongly_typed(network: Any) -> bool:
    """Return whether the network's author chooses the types of its tensors, and not the builder.

    In TensorRT 11 that is so for every network, in 10 for those created with the flag ``STRONGLY_TYPED``, before 10 for
    none.
    """
    if MAJOR >= 11:
        return True
    return MAJOR >= 10 and bool(network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


class NativeLayers:
    """Adds small groups of layers to one network, with one prefix of their names. All but GEMMs compute in float32."""

    def __init__(self, network: Any, name: str) -> None:
        self.network = network
        self.name = name
        self.typed = is_strongly_typed(network)

    def rms_norm(
        self,
        x: Any,
        weight: Any,
        eps: float,
        residual: Any,
        dtype: Any,
        *,
        unit_offset: bool = False,
        round_before_weight: bool = False,
    ) -> tuple[Any, Any]:
        """Return x + residual in ``dtype``, and the normalised rows in float32."""
        rank = len(x.shape)
        h = x
        if residual is not None:
            h = self._elementwise(self.cast(x, trt.float32), self.cast(residual, trt.float32), "SUM", "residual")
            h = self.cast(h, dtype)
        wide = self.cast(h, trt.float32)
        squares = self._elementwise(wide, wide, "PROD", "square")
        mean = self._reduce(squares, trt.ReduceOperation.AVG, "mean")
        biased = self._elementwise(mean, self._scalar(eps, rank), "SUM", "eps")
        root = self._unary(biased, "SQRT")
        normalised = self._elementwise(wide, root, "DIV", "normalise")
        if round_before_weight:
            normalised = self.cast(self.cast(normalised, dtype), trt.float32)
        factor = self._broadcast(self.cast(weight, trt.float32), rank)
        if unit_offset:
            factor = self._elementwise(factor, self._scalar(1.0, rank), "SUM", "unit_offset")
        return h, self._elementwise(normalised, factor, "PROD", "weight")

    def gemm(self, x: Any, weight: Any, bias: Any, dtype: Any, *, swiglu: bool = False) -> Any:
        """Return x · weightᵀ + bias in ``dtype``; with ``swiglu`` the first half of its columns gates the second."""
        rank = len(x.shape)
        transposed = (trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE)
        layer = self.network.add_matrix_multiply(x, transposed[0], self._broadcast_matrix(weight, rank), transposed[1])
        z = self._of_type(self._named(layer, "matrix_multiply"), dtype)
        if bias is not None:
            layer = self.network.add_elementwise(z, self._broadcast(bias, rank), trt.ElementWiseOperation.SUM)
            z = self._of_type(self._named(layer, "bias"), dtype)
        if not swiglu:
            return z
        gate, up = (self.cast(part, trt.float32) for part in self._halves(z, int(weight.shape[-2]) // 2))
        sigmoid = self._named(self.network.add_activation(gate, trt.ActivationType.SIGMOID), "sigmoid")
        silu = self._elementwise(gate, self._computed_in_float32(sigmoid), "PROD", "silu")
        y = self.cast(self._elementwise(silu, up, "PROD", "swiglu"), dtype)
        # The next layers have to know the number of columns, which slices of a dynamic size do not tell.
        shuffle = self._named(self.network.add_shuffle(y), "columns")
        shuffle.reshape_dims = (0,) * (rank - 1) + (int(weight.shape[-2]) // 2,)
        return self._of_type(shuffle, dtype)

    def gather(self, x: Any, columns: Any, dtype: Any) -> Any:
        """Return columns of x, which has ``dtype``, in the order of their numbers."""
        numbers = self.constant(np.asarray(columns), trt.int32, "permutation")
        return self._of_type(self._named(self.network.add_gather(x, numbers, len(x.shape) - 1), "permute"), dtype)

    def quantize(self, y: Any, quant_dtype: Any, scale: Any, smoothing: Any) -> list[Any]:
        """Return [q], or [q, scales] where ``scale`` is None; ``y`` is float32."""
        rank = len(y.shape)
        largest = _LARGEST[str(quant_dtype).rsplit(".", 1)[-1]]
        if smoothing is not None:
            y = self._elementwise(y, self._broadcast(self.cast(smoothing, trt.float32), rank), "DIV", "smoothing")
        dynamic = scale is None
        if dynamic:
            maximum = self._reduce(self._unary(y, "ABS"), trt.ReduceOperation.MAX, "maximum")
            scale = self._elementwise(maximum, self._scalar(1.0 / largest, rank), "PROD", "scales")
            # A row of zeros has the smallest normal scale, not a division by zero.
            divisor = self._elementwise(scale, self._scalar(float(np.finfo(np.float32).tiny), rank), "MAX", "divisor")
        else:
            divisor = self._broadcast(scale, rank)
        scaled = self._elementwise(y, divisor, "DIV", "scale")
        q = self._to_quantized(scaled, quant_dtype, largest)
        return [q, divisor] if dynamic else [q]

    def constant(self, array: np.ndarray, dtype: Any, what: str, *, keeps_type: bool = False) -> Any:
        """Return a constant with the shape and values of ``array``; ``keeps_type``: TensorRT must keep its type."""
        if dtype == getattr(trt, "bfloat16", None):
            import ml_dtypes  # NumPy itself has no bfloat16

            array = np.ascontiguousarray(array, ml_dtypes.bfloat16)
            weights = trt.Weights(dtype, array.ctypes.data, array.size)
            # trt.Weights of an address keeps nothing alive, and the array has to outlive the network: a finalizer of
            # the network holds it as the argument of a function without effect.
            weakref.finalize(self.network, id, array)
        else:
            array = np.ascontiguousarray(array, trt.nptype(dtype))
            weights = trt.Weights(array)
        return self.weights(weights, array.shape, dtype, what, keeps_type=keeps_type)

    def weights(self, weights: Any, shape: tuple[int, ...], dtype: Any, what: str, *, keeps_type: bool = False) -> Any:
        """Return a constant of ``tensorrt.Weights``, which have no shape of their own."""
        layer = self._named(self.network.add_constant(shape, weights), what)
        return self._typed_output(layer, dtype) if keeps_type else layer.get_output(0)

    def cast(self, tensor: Any, dtype: Any) -> Any:
        """Return the tensor cast to ``dtype``, or itself where it has that type."""
        if tensor.dtype == dtype:
            return tensor
        layer = self._named(self.network.add_cast(tensor, dtype), f"to_{str(dtype).rsplit('.', 1)[-1].lower()}")
        return self._typed_output(layer, dtype)

    def _to_quantized(self, scaled: Any, quant_dtype: Any, largest: float) -> Any:
        if MAJOR >= 10:
            one = self.constant(np.ones((), np.float32), trt.float32, "one")
            return self._named(self.network.add_quantize(scaled, one, quant_dtype), "quantize").get_output(0)
        # TensorRT 8.6 quantizes only with scales that are known when the engine is built.
        clip = self.network.add_activation(self._unary(scaled, "ROUND"), trt.ActivationType.CLIP)
        clip.alpha, clip.beta = -largest - 1, largest
        clipped = self._computed_in_float32(self._named(clip, "clip"))
        return self.cast(clipped, quant_dtype)

    def _elementwise(self, a: Any, b: Any, operation: str, what: str) -> Any:
        layer = self.network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation))
        return self._computed_in_float32(self._named(layer, what))

    def _unary(self, tensor: Any, operation: str) -> Any:
        layer = self.network.add_unary(tensor, getattr(trt.UnaryOperation, operation))
        return self._computed_in_float32(self._named(layer, operation.lower()))

    def _reduce(self, tensor: Any, operation: Any, what: str) -> Any:
        layer = self.network.add_reduce(tensor, operation, axes=1 << (len(tensor.shape) - 1), keep_dims=True)
        return self._computed_in_float32(self._named(layer, what))

    def _scalar(self, value: float, rank: int) -> Any:
        return self.constant(np.full((1,) * rank, value, np.float32), trt.float32, "constant")

    def _broadcast(self, tensor: Any, rank: int) -> Any:
        """Reshape [] or [n] to [1, ..., n], which elementwise layers combine with tensors of that rank."""
        if len(tensor.shape) == rank:
            return tensor
        shuffle = self._named(self.network.add_shuffle(tensor), "broadcast")
        shuffle.reshape_dims = (1,) * (rank - 1) + (tuple(tensor.shape) or (1,))
        return shuffle.get_output(0)

    def _broadcast_matrix(self, weight: Any, rank: int) -> Any:
        """Reshape [n, k] to [1, ..., n, k], since a matrix multiplication needs operands of one rank."""
        if rank <= 2:
            return weight
        shuffle = self._named(self.network.add_shuffle(weight), "broadcast")
        shuffle.reshape_dims = (1,) * (rank - 2) + tuple(weight.shape)
        return shuffle.get_output(0)

    def _halves(self, z: Any, columns: int) -> list[Any]:
        """Return the first and the second half of the last dimension; the others may be dynamic."""
        rank = len(z.shape)
        shape = self._named(self.network.add_shape(z), "shape").get_output(0)
        shape_type = np.int64 if MAJOR >= 10 else np.int32
        leading = self._named(self.network.add_slice(shape, (0,), (rank - 1,), (1,)), "leading").get_output(0)
        last = self.constant(np.array([columns], shape_type), trt.int64 if MAJOR >= 10 else trt.int32, "columns")
        sizes = self._named(self.network.add_concatenation([leading, last]), "sizes").get_output(0)
        halves = []
        for start in (0, columns):
            layer = self.network.add_slice(z, (0,) * (rank - 1) + (start,), (0,) * rank, (1,) * rank)
            layer.set_input(2, sizes)
            halves.append(self._of_type(self._named(layer, "half"), z.dtype))
        return halves

    def _of_type(self, layer: Any, dtype: Any) -> Any:
        """Return the layer's output, computed and kept in ``dtype``."""
        output = layer.get_output(0)
        if not self.typed:
            layer.precision = dtype
            layer.set_output_type(0, dtype)
            output.dtype = dtype
        return output

    def _typed_output(self, layer: Any, dtype: Any) -> Any:
        output = layer.get_output(0)
        if not self.typed:  # otherwise TensorRT 8.6 reverts to float32, for example as an output of the network
            layer.set_output_type(0, dtype)
            output.dtype = dtype
        return output

    def _computed_in_float32(self, layer: Any) -> Any:
        output = layer.get_output(0)
        if not self.typed:
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)
        return output

    def _named(self, layer: Any, what: str) -> Any:
        if layer is None:
            raise RuntimeError(f"TensorRT could not add the layer '{self.name}/{what}'; its log has the reason")
        layer.name = f"{self.name}/{what}_{self.network.num_layers}"  # TensorRT refuses a name that two layers have
        return layer
