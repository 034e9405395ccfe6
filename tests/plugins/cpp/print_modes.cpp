// Prints every mode of every plug-in, one line of JSON each: its fields, the types and shapes of its tensors, and the
// extents that are dynamic. So the tests in Python build the networks that the tests in C++ drive.
#include "all_modes.h"

namespace {

std::string to_json(nvinfer1::PluginField const& field) {
  bool const is_float = field.type == nvinfer1::PluginFieldType::kFLOAT32;
  std::string values;
  for (int32_t i = 0; i < field.length; ++i) {
    values += (i == 0 ? "" : ", ") + (is_float ? std::to_string(static_cast<float const*>(field.data)[i])
                                               : std::to_string(static_cast<int32_t const*>(field.data)[i]));
  }
  return "\"" + std::string(field.name) + "\": " + (field.length == 1 ? values : "[" + values + "]");
}

std::string to_json(nvinfer1::PluginTensorDesc const& tensor) {
  std::string dims;
  for (int32_t i = 0; i < tensor.dims.nbDims; ++i) {
    dims += (i == 0 ? "" : ", ") + std::to_string(tensor.dims.d[i]);
  }
  return "[" + std::to_string(int_of(tensor.type)) + ", [" + dims + "]]";
}

std::string to_json(Extent extent) { return std::to_string(extent); }

template <typename Items>
std::string joined(Items const& items) {
  std::string text;
  for (auto const& item : items) {
    text += (text.empty() ? "" : ", ") + to_json(item);
  }
  return text;
}

}  // namespace

int main() {
  for (Mode& mode : all_modes()) {
    nvinfer1::PluginFieldCollection const* const given = mode.fields.collection();
    std::vector<nvinfer1::PluginField> const fields(given->fields, given->fields + given->nbFields);
    std::printf("{\"plugin\": \"%s\", \"fields\": {%s}, \"inputs\": [%s], \"outputs\": [%s], \"dynamic\": [%s]}\n",
                mode.plugin, joined(fields).c_str(), joined(mode.inputs).c_str(), joined(mode.outputs).c_str(),
                joined(mode.dynamic).c_str());
  }
}
