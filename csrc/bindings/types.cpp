// Arguments of these types accept no integer, so that a type and a size cannot be mixed up.
#include "types.h"

#include "kernels/attention/heads.h"
#include "kernels/common/data_type.h"
#include "kernels/gemm/gemm.h"

namespace py = pybind11;

namespace qwen_plugins {

void bind_types(py::module_& module) {
  py::enum_<DataType>(module, "DataType")
      .value("float32", DataType::kFloat32)
      .value("float16", DataType::kFloat16)
      .value("bfloat16", DataType::kBFloat16)
      .value("int8", DataType::kInt8)
      .value("float8_e4m3fn", DataType::kFloat8E4M3);
  py::enum_<CacheDataType>(module, "CacheDataType")
      .value("same", CacheDataType::kSame)
      .value("int8", CacheDataType::kInt8)
      .value("float8_e4m3fn", CacheDataType::kFloat8E4M3);
  py::enum_<Activation>(module, "Activation").value("none", Activation::kNone).value("swiglu", Activation::kSwiglu);
  py::enum_<WeightKind>(module, "WeightKind")
      .value("same", WeightKind::kSame)
      .value("int8", WeightKind::kInt8)
      .value("int4", WeightKind::kInt4)
      .value("int8_rows", WeightKind::kInt8Rows)
      .value("fp8_rows", WeightKind::kFp8Rows);
  py::class_<WeightFormat>(module, "WeightFormat", "How a weight is stored: kernels/gemm/gemm.h.")
      .def(py::init([](WeightKind kind, int32_t group_size, bool has_zeros, DataType scale_dtype) {
             return WeightFormat{kind, group_size, has_zeros, scale_dtype};
           }),
           py::kw_only(), py::arg("kind") = WeightKind::kSame, py::arg("group_size") = 0, py::arg("has_zeros") = false,
           py::arg("scale_dtype") = DataType::kFloat16)
      .def_readonly("kind", &WeightFormat::kind)
      .def_readonly("group_size", &WeightFormat::group_size)
      .def_readonly("has_zeros", &WeightFormat::has_zeros)
      .def_readonly("scale_dtype", &WeightFormat::scale_dtype);
  py::enum_<RotaryStyle>(module, "RotaryStyle").value("neox", RotaryStyle::kNeox).value("gptj", RotaryStyle::kGptJ);
}

}  // namespace qwen_plugins
