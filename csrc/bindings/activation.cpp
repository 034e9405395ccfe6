#include "activation.h"

#include "arguments.h"
#include "kernels/gemm/swiglu.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

void swiglu(Address gate_up, Address y, int64_t gate_up_row_stride, int64_t rows, int64_t size, DataType dtype,
            Address stream) {
  SwigluParams params;
  params.gate_up = pointer<const void>(gate_up);
  params.y = pointer<void>(y);
  params.gate_up_row_stride = gate_up_row_stride;
  params.rows = rows;
  params.size = size;
  params.dtype = dtype;
  check(launch_swiglu(params, pointer<CUstream_st>(stream)), "swiglu");
}

}  // namespace

void bind_activation(py::module_& module) {
  module.def("swiglu", &swiglu, Unlocked(), py::kw_only(), py::arg("gate_up"), py::arg("y"),
             py::arg("gate_up_row_stride"), py::arg("rows"), py::arg("size"), py::arg("dtype"), py::arg("stream"),
             "Launch y = silu(gate) * up: kernels/gemm/swiglu.h.");
}

}  // namespace qwen_plugins
