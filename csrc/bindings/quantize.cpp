#include "quantize.h"

#include "arguments.h"
#include "kernels/quantize/quantize.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

void quantize(Address x, int64_t x_row_stride, Address q, int64_t rows, int64_t columns, DataType dtype,
              DataType quant_dtype, Address static_scale, Address scales, Address stream) {
  QuantizeParams params;
  params.x = pointer<const void>(x);
  params.x_row_stride = x_row_stride;
  params.q = pointer<void>(q);
  params.rows = rows;
  params.columns = columns;
  params.dtype = dtype;
  params.quant_dtype = quant_dtype;
  params.static_scale = pointer<const float>(static_scale);
  params.scales = pointer<float>(scales);
  check(launch_quantize(params, pointer<CUstream_st>(stream)), "quantize");
}

}  // namespace

void bind_quantize(py::module_& module) {
  module.def("quantize", &quantize, Unlocked(), py::kw_only(), py::arg("x"), py::arg("x_row_stride"), py::arg("q"),
             py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("quant_dtype"), py::arg("static_scale"),
             py::arg("scales"), py::arg("stream"), "Launch q = x / scale, rounded: kernels/quantize/quantize.h.");
}

}  // namespace qwen_plugins
