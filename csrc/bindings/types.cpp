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
  py::enum_<RotaryStyle>(module, "RotaryStyle").value("neox", RotaryStyle::kNeox).value("gptj", RotaryStyle::kGptJ);
}

}  // namespace qwen_plugins
