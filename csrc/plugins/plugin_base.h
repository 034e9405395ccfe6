// What every plug-in class has in common, for every version of TensorRT.
//
// A plug-in class `Plugin` adds to this
//   static constexpr char const* kName;
//   static constexpr char const* kVersion;     // with the name, what TensorRT finds a creator by: README.md
//   static AttributeSchema const& schema();    // of Plugin::Attributes
//   explicit Plugin(Attributes const&);        // throws std::invalid_argument for values out of range
//   void enqueue(Execution const&) const;      // throws for shapes that do not fit and launches that fail
// and, if it needs them, its own check_sizes and workspace_bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "attributes.h"
#include "kernels/common/runtime.h"
#include "nvtx_range.h"
#include "tensor_roles.h"
#include "tensorrt_api.h"

namespace qwen_plugins {

constexpr char const* kPluginNamespace = "qwen_plugins";

// The workspace to ask for where the size cannot be computed: an exbibyte, which no GPU has, so that building fails.
// With 0 the build would succeed, and enqueue, which is not told the size, would write out of bounds.
constexpr size_t kImpossibleWorkspace = size_t{1} << 60;

// Whether a plug-in object was created from a network's fields or from a serialised engine.
enum class Phase { kBuild, kRuntime };

// The arguments of enqueue, and the phase in which the object was made. While TensorRT builds an engine it may run a
// layer to time it, on uninitialised memory. An engine that was never serialised (build_engine) runs the same objects
// on real inputs.
struct Execution {
  nvinfer1::PluginTensorDesc const* input_descs;
  void const* const* inputs;
  void* const* outputs;
  void* workspace;
  cudaStream_t stream;
  Phase phase;
};

// The address of a tensor; null where the roles have none of this name.
inline void const* input_of(Execution const& execution, TensorRoles const& roles, char const* name) {
  int32_t const index = roles.find_input(name);
  return index < 0 ? nullptr : execution.inputs[index];
}
inline void* output_of(Execution const& execution, TensorRoles const& roles, char const* name) {
  int32_t const index = roles.find_output(name);
  return index < 0 ? nullptr : execution.outputs[index];
}

template <typename AttributesType>
class PluginBase {
 public:
  using Attributes = AttributesType;

  Attributes const& attributes() const { return attributes_; }
  TensorRoles const& roles() const { return roles_; }

  // Throws std::invalid_argument for numbers, as far as they are known, that a launch refuses though each is within its
  // limits. A plug-in that has such hides this with its own.
  void check_sizes(Sizes const& /*sizes*/) const {}

  // The workspace for tensors of these shapes and of all smaller ones. The shapes are the maxima of a profile, and need
  // not fit together. A plug-in with a workspace hides this with its own.
  size_t workspace_bytes(nvinfer1::PluginTensorDesc const* /*largest_inputs*/) const { return 0; }

 protected:
  PluginBase(Attributes const& checked, TensorRoles (*make_roles)(Attributes const&))
      : attributes_(checked), roles_(make_roles(checked)) {}

  // The address of a tensor; null where the attributes say that there is none of this name.
  void const* input(Execution const& execution, char const* name) const { return input_of(execution, roles_, name); }
  void* output(Execution const& execution, char const* name) const { return output_of(execution, roles_, name); }

 private:
  Attributes attributes_;
  TensorRoles roles_;
};

template <typename Plugin>
struct RangeName {
  static constexpr char const* message = Plugin::kName;
};

// Calls the plug-in's enqueue in an NVTX range of its name.
template <typename Plugin>
void enqueue_in_range(Plugin const& plugin, Execution const& execution) {
  NvtxRange<RangeName<Plugin>> const range;
  plugin.enqueue(execution);
}

// Returns the product; throws std::invalid_argument where it does not fit in 64 bits. `what` is what it counts.
inline int64_t checked_product(char const* what, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t const factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      std::string text;
      for (int64_t const one : factors) {
        text += (text.empty() ? "" : " * ") + std::to_string(one);
      }
      throw std::invalid_argument(std::string(what) + " are " + text + ", more than fit in 64 bits");
    }
  }
  return product;
}

// Throws where CUDA reports an error; `describe()` says what failed.
template <typename Describe>
void check_cuda(cudaError_t status, Describe const& describe) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(describe()) + " failed: " + error_string(status));
  }
}

}  // namespace qwen_plugins
