#include "gemm.h"

#include "arguments.h"
#include "kernels/gemm/cublas_lt.h"
#include "kernels/gemm/gemm.h"

namespace py = pybind11;

namespace qwen_plugins {
namespace {

// The parameters of a linear layer that are the same in each of its launches. Setting them once leaves a launch with
// few arguments, which matters: with a short prompt the GPU waits for Python to launch the kernels.
class LinearLayer {
 public:
  LinearLayer(Address weight, Address bias, int64_t in_features, int64_t out_features, Activation activation,
              DataType dtype, bool constant_weight) {
    params_.weight = pointer<const void>(weight);
    params_.bias = pointer<const void>(bias);
    params_.shape.in_features = in_features;
    params_.shape.out_features = out_features;
    params_.shape.activation = activation;
    params_.shape.dtype = dtype;
    params_.constant_weight = constant_weight;
  }

  GemmParams params(int64_t rows) const {
    GemmParams params = params_;
    params.shape.rows = rows;
    return params;
  }

  int64_t columns() const { return columns_of(params_.shape); }

  int64_t workspace_bytes(int64_t rows) const {
    int64_t bytes = 0;
    check(gemm_workspace_bytes(params(rows).shape, &bytes), "gemm_workspace_bytes");
    return bytes;
  }

 private:
  GemmParams params_;
};

void gemm(const LinearLayer& layer, Address x, int64_t x_row_stride, Address y, int64_t rows, Address workspace,
          Address stream) {
  GemmParams params = layer.params(rows);
  params.x = pointer<const void>(x);
  params.x_row_stride = x_row_stride;
  params.y = pointer<void>(y);
  params.workspace = pointer<void>(workspace);
  params.workspace_bytes = layer.workspace_bytes(rows);
  check(launch_gemm(params, pointer<CUstream_st>(stream)), "gemm");
}

}  // namespace

void bind_gemm(py::module_& module) {
  py::class_<LinearLayer>(module, "LinearLayer", "The parameters of a linear layer, the same in each of its launches.")
      .def(py::init<Address, Address, int64_t, int64_t, Activation, DataType, bool>(), py::kw_only(), py::arg("weight"),
           py::arg("bias"), py::arg("in_features"), py::arg("out_features"), py::arg("activation"), py::arg("dtype"),
           py::arg("constant_weight"))
      .def_property_readonly("columns", &LinearLayer::columns, "The columns of y.")
      .def("workspace_bytes", &LinearLayer::workspace_bytes, py::arg("rows"),
           "Return the bytes of the workspace that gemm needs for that many rows; they never decrease with more rows.");
  module.def("gemm", &gemm, Unlocked(), py::arg("layer"), py::kw_only(), py::arg("x"), py::arg("x_row_stride"),
             py::arg("y"), py::arg("rows"), py::arg("workspace"), py::arg("stream"),
             "Launch the GEMM of a linear layer: kernels/gemm/gemm.h. The workspace has "
             "layer.workspace_bytes(rows).");
  module.def("cublas_lt_status", &cublas_lt_status, "Return the file of cuBLASLt in use, or why none is in use.");
  module.def("has_hopper_kernels", &has_hopper_kernels, "Return whether the kernels for Hopper alone were built in.");
}

}  // namespace qwen_plugins
