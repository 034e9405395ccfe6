#include "choice.h"

#include "gemm_kernel.h"

namespace qwen_plugins {
namespace {

constexpr const char* kRulesName = "rules";

GemmChoice choice_of(const GemmKernel& kernel, int32_t variant) {
  return static_cast<GemmChoice>((static_cast<int32_t>(kernel.id) << kVariantBits) | variant);
}

// Calls `use(choice, name)` for every choice of this build.
template <typename Use>
void for_each_choice(const Use& use) {
  use(GemmChoice::kByRules, std::string(kRulesName));
  for (const GemmKernel& kernel : gemm_kernels()) {
    use(choice_of(kernel, kOwnVariant), std::string(kernel.name));
    for (const GemmVariant& variant : kernel.variants) {
      use(choice_of(kernel, variant.id), std::string(kernel.name) + ":" + variant.name);
    }
  }
}

// Parameters of this shape, as if all addresses were aligned.
GemmParams aligned_params(const GemmShape& shape) {
  GemmParams params;
  params.shape = shape;
  params.x_row_stride = shape.in_features;
  return params;
}

std::vector<GemmChoice> candidates_of(const GemmKernel& kernel, const GemmParams& params,
                                      const DeviceProperties& device) {
  std::vector<GemmChoice> choices;
  const auto add = [&](int32_t variant) {
    if (kernel.takes(params, device, variant) && kernel.is_candidate(params, device, variant)) {
      choices.push_back(choice_of(kernel, variant));
    }
  };
  if (kernel.variants.empty()) add(kOwnVariant);
  for (const GemmVariant& variant : kernel.variants) add(variant.id);
  return choices;
}

}  // namespace

std::string gemm_choice_name(GemmChoice choice) {
  std::string found;
  for_each_choice([&](GemmChoice known, const std::string& name) {
    if (known == choice) found = name;
  });
  return found;
}

bool gemm_choice_from_name(const std::string& name, GemmChoice* choice) {
  bool found = false;
  for_each_choice([&](GemmChoice known, const std::string& known_name) {
    if (known_name != name) return;
    *choice = known;
    found = true;
  });
  return found;
}

cudaError_t gemm_choice_by_rules(const GemmShape& shape, GemmChoice* choice) {
  if (!is_valid(shape) || shape.rows == 0) return cudaErrorInvalidValue;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  *choice = choice_of(*next_by_rules(aligned_params(shape), device, nullptr), kOwnVariant);
  return cudaSuccess;
}

cudaError_t gemm_candidates(const GemmShape& shape, std::vector<GemmChoice>* choices) {
  choices->clear();
  if (!is_valid(shape)) return cudaErrorInvalidValue;
  if (shape.rows == 0) return cudaSuccess;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  const GemmParams params = aligned_params(shape);
  for (const GemmKernel& kernel : gemm_kernels()) {
    const std::vector<GemmChoice> more = candidates_of(kernel, params, device);
    choices->insert(choices->end(), more.begin(), more.end());
  }
  if (choices->empty()) choices->push_back(choice_of(*next_by_rules(params, device, nullptr), kOwnVariant));
  return cudaSuccess;
}

}  // namespace qwen_plugins
