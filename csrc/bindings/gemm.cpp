// qwen_plugins/_gemm.py checks shapes and types. Arguments come by position: names would cost as much time as the
// launch.
#include "gemm.h"

#include "arguments.h"
#include "kernels/gemm/cublas_lt.h"
#include "kernels/gemm/gemm.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

GemmShape make_shape(int64_t rows, int64_t in_features, int64_t out_features, int32_t activation, int32_t dtype) {
  GemmShape shape;
  shape.rows = rows;
  shape.in_features = in_features;
  shape.out_features = out_features;
  shape.activation = static_cast<Activation>(activation);
  shape.dtype = static_cast<DataType>(dtype);
  return shape;
}

int64_t workspace_bytes(int64_t rows, int64_t in_features, int64_t out_features, int32_t activation, int32_t dtype) {
  int64_t bytes = 0;
  check(gemm_workspace_bytes(make_shape(rows, in_features, out_features, activation, dtype), &bytes),
        "gemm_workspace_bytes");
  return bytes;
}

void gemm(Address x, int64_t x_row_stride, Address weight, Address bias, Address y, int64_t rows, int64_t in_features,
          int64_t out_features, int32_t activation, int32_t dtype, bool constant_weight, Address workspace,
          int64_t workspace_bytes, Address stream) {
  GemmParams params;
  params.shape = make_shape(rows, in_features, out_features, activation, dtype);
  params.x = pointer<const void>(x);
  params.weight = pointer<const void>(weight);
  params.bias = pointer<const void>(bias);
  params.y = pointer<void>(y);
  params.x_row_stride = x_row_stride;
  params.constant_weight = constant_weight;
  params.workspace = pointer<void>(workspace);
  params.workspace_bytes = workspace_bytes;
  check(launch_gemm(params, pointer<CUstream_st>(stream)), "gemm");
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("gemm_workspace_bytes", &workspace_bytes);
  module.def("gemm", &gemm, py::call_guard<py::gil_scoped_release>());
  module.def("cublas_lt_status", &cublas_lt_status, "The file of cuBLASLt that is used, or why none is.");
}

}  // namespace qwen_plugins
