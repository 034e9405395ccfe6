// Choices between the GEMM kernels: their names, what could serve a GEMM, and choices by the number of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "gemm.h"
#include "kernels/common/api.h"

namespace qwen_plugins {

// Returns a choice's name: a kernel's, such as "stream_hopper", which then chooses its variant itself; a kernel's and a
// variant's, "stream_hopper:n32s4"; or "rules". Empty for a number that this build gives to no kernel.
QWEN_PLUGINS_API std::string gemm_choice_name(GemmChoice choice);

// Gives the choice of a name, and returns whether this build has it.
QWEN_PLUGINS_API bool gemm_choice_from_name(const std::string& name, GemmChoice* choice);

// Gives what can compute this GEMM on the current device and may be the fastest: each a kernel in one of its variants.
// Addresses are taken to be aligned. At least one choice for one row and more, none for 0 rows. Whether cuBLASLt
// proposes as many algorithms as are listed shows only when it is called. cudaErrorInvalidValue for a shape that
// launch_gemm refuses.
QWEN_PLUGINS_API cudaError_t gemm_candidates(const GemmShape& shape, std::vector<GemmChoice>* choices);

// Gives the kernel that the rules choose for one row and more on the current device, with aligned addresses.
QWEN_PLUGINS_API cudaError_t gemm_choice_by_rules(const GemmShape& shape, GemmChoice* choice);

// A choice for up to so many rows, and more than those of the choice before it. For more rows than the last one's the
// rules decide.
struct GemmChoiceUpTo {
  int64_t max_rows;
  GemmChoice choice;
};

inline GemmChoice choice_for(const std::vector<GemmChoiceUpTo>& choices, int64_t rows) {
  for (const GemmChoiceUpTo& up_to : choices) {
    if (rows <= up_to.max_rows) return up_to.choice;
  }
  return GemmChoice::kByRules;
}

// As gemm_workspace_bytes, for these choices: what the launches of shape.rows and of all fewer rows need.
inline cudaError_t gemm_workspace_bytes(const GemmShape& shape, const std::vector<GemmChoiceUpTo>& choices,
                                        int64_t* bytes) {
  int64_t most = 0;
  int64_t rows_before = -1;
  const auto add = [&](int64_t max_rows, GemmChoice choice) {
    if (shape.rows <= rows_before) return cudaSuccess;
    GemmShape part = shape;
    part.rows = std::min(shape.rows, max_rows);
    int64_t needed = 0;
    const cudaError_t error = gemm_workspace_bytes(part, choice, &needed);
    most = std::max(most, needed);
    rows_before = max_rows;
    return error;
  };
  cudaError_t error = cudaSuccess;
  for (const auto& [max_rows, choice] : choices) {
    if (error == cudaSuccess) error = add(max_rows, choice);
  }
  if (error == cudaSuccess) error = add(shape.rows, GemmChoice::kByRules);
  *bytes = most;
  return error;
}

}  // namespace qwen_plugins
