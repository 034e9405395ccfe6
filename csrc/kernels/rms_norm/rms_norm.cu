#include <cmath>
#include <cstdint>
#include <limits>

#include "launch.cuh"
#include "rms_norm.h"

namespace qwen_plugins {

extern template cudaError_t launch_rms_norm_of_type<__half>(const RmsNormPlan&, cudaStream_t);
extern template cudaError_t launch_rms_norm_of_type<__nv_bfloat16>(const RmsNormPlan&, cudaStream_t);
extern template cudaError_t launch_rms_norm_of_type<float>(const RmsNormPlan&, cudaStream_t);

namespace {

constexpr int64_t kMaxGroups = 65535;  // gridDim.y

bool is_float(DataType type) {
  return type == DataType::kFloat32 || type == DataType::kFloat16 || type == DataType::kBFloat16;
}

bool is_valid(const RmsNormParams& p) {
  return p.rows.total >= 0 && p.hidden_size >= 1 && p.hidden_size <= std::numeric_limits<int32_t>::max() &&
         is_float(p.dtype) && (p.weight_dtype == p.dtype || p.weight_dtype == DataType::kFloat32) && p.eps > 0 &&
         std::isfinite(p.eps) &&
         (p.rows.total == 0 || (p.rows.inner >= 1 && p.rows.total % p.rows.inner == 0 && p.x != nullptr &&
                                p.weight != nullptr && (p.residual == nullptr) == (p.residual_out == nullptr)));
}

// Whether all rows with these strides start at multiples of a pack.
bool rows_are_aligned(const void* base, RowStrides strides, int64_t element_size) {
  const auto is_multiple = [](int64_t bytes) { return bytes % 16 == 0; };
  return is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(base))) &&
         is_multiple(strides.inner * element_size) && is_multiple(strides.outer * element_size);
}

// Whether every operand can be accessed in packs: 16 bytes of x, and as many elements of a quantized output, 4 or 8
// bytes.
bool can_use_packs(const RmsNormParams& p, const void* output, RowStrides output_strides, int64_t output_size,
                   const void* smoothing) {
  const int64_t size = size_of(p.dtype);
  const int64_t output_pack = 16 / size * output_size;
  const auto is_aligned = [](const void* base, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(base) % bytes == 0;
  };
  return p.hidden_size * size % 16 == 0 && rows_are_aligned(p.x, p.x_strides, size) && is_aligned(p.weight, 16) &&
         is_aligned(smoothing, 16) && is_aligned(output, output_pack) &&
         output_strides.inner * output_size % output_pack == 0 &&
         output_strides.outer * output_size % output_pack == 0 &&
         (p.residual == nullptr || (rows_are_aligned(p.residual, p.residual_strides, size) &&
                                    rows_are_aligned(p.residual_out, p.residual_out_strides, size)));
}

// The two levels of a call's rows. blockIdx.x, whose limit is much higher, counts the level that has more of them.
class RowLevels {
 public:
  explicit RowLevels(RowCount rows) : inner_(rows.inner), outer_(rows.total / rows.inner), swapped_(outer_ > inner_) {}

  RowIndexing indexing(RowStrides strides) const {
    return swapped_ ? RowIndexing{strides.outer, strides.inner} : RowIndexing{strides.inner, strides.outer};
  }
  int64_t rows_in_group() const { return swapped_ ? outer_ : inner_; }
  int64_t groups() const { return swapped_ ? inner_ : outer_; }

 private:
  int64_t inner_;
  int64_t outer_;
  bool swapped_;
};

RmsNormPlan make_plan(const RmsNormParams& p, const RowLevels& levels) {
  RmsNormPlan plan{};
  RmsNormArguments& a = plan.arguments;
  a.x = p.x;
  a.weight = p.weight;
  a.residual = p.residual;
  a.residual_out = p.residual_out;
  a.x_rows = levels.indexing(p.x_strides);
  a.residual_rows = levels.indexing(p.residual_strides);
  a.residual_out_rows = levels.indexing(p.residual_out_strides);
  a.eps = p.eps;
  a.precise_inverse_hidden_size = 1.0 / static_cast<double>(p.hidden_size);
  a.inverse_hidden_size = static_cast<float>(a.precise_inverse_hidden_size);
  a.weight_offset = p.unit_offset ? 1.0F : 0.0F;
  if (p.weight_dtype != p.dtype) a.options |= kFloat32Weight;
  plan.hidden_size = p.hidden_size;
  plan.residual = p.residual != nullptr;
  plan.batch_invariant = p.batch_invariant;
  return plan;
}

template <typename T>
void advance(T*& base, RowIndexing rows, int64_t groups, int64_t element_size, int64_t first_row = 0) {
  if (base == nullptr) return;
  const auto address = reinterpret_cast<uintptr_t>(base);
  const int64_t elements = groups * rows.group_stride + first_row * rows.row_stride;
  base = reinterpret_cast<T*>(address + static_cast<uintptr_t>(elements * element_size));
}

// Launches once for each kMaxGroups groups and kMaxRows rows of a group: nearly always once.
cudaError_t launch_all(RmsNormPlan plan, DataType dtype, int64_t output_size, const RowLevels& levels,
                       cudaStream_t stream) {
  constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
  const int64_t size = size_of(dtype);
  for (int64_t group = 0; group < levels.groups(); group += kMaxGroups) {
    for (int64_t row = 0; row < levels.rows_in_group(); row += kMaxRows) {
      RmsNormPlan part = plan;
      RmsNormArguments& a = part.arguments;
      part.groups = static_cast<uint32_t>(std::min(kMaxGroups, levels.groups() - group));
      a.rows_in_group = static_cast<uint32_t>(std::min(kMaxRows, levels.rows_in_group() - row));
      advance(a.x, a.x_rows, group, size, row);
      advance(a.residual, a.residual_rows, group, size, row);
      advance(a.residual_out, a.residual_out_rows, group, size, row);
      advance(a.output, a.output_rows, group, output_size, row);
      advance(a.scales, a.scale_rows, group, sizeof(float), row);
      const cudaError_t error =
          with_type(dtype, [&](auto zero) { return launch_rms_norm_of_type<decltype(zero)>(part, stream); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (!is_valid(p) || (p.rows.total > 0 && p.y == nullptr)) return cudaErrorInvalidValue;
  if (p.rows.total == 0) return cudaSuccess;
  const RowLevels levels(p.rows);
  RmsNormPlan plan = make_plan(p, levels);
  plan.arguments.output = p.y;
  plan.arguments.output_rows = levels.indexing(p.y_strides);
  if (p.round_before_weight) plan.arguments.options |= kRoundBeforeWeight;
  plan.output = Output::kSameType;
  plan.packed = can_use_packs(p, p.y, p.y_strides, size_of(p.dtype), nullptr);
  plan.weight_mode = plan.arguments.options == 0 ? WeightMode::kPlain : WeightMode::kGeneral;
  return launch_all(plan, p.dtype, size_of(p.dtype), levels, stream);
}

cudaError_t launch_rms_norm_quant(const RmsNormQuantParams& p, cudaStream_t stream) {
  const bool has_output_type = p.quant_dtype == DataType::kInt8 || p.quant_dtype == DataType::kFloat8E4M3;
  const bool has_smoothing_type = p.smoothing_dtype == p.dtype || p.smoothing_dtype == DataType::kFloat32;
  if (!is_valid(p) || !has_output_type || (p.smoothing != nullptr && !has_smoothing_type)) return cudaErrorInvalidValue;
  if (p.rows.total == 0) return cudaSuccess;
  if (p.q == nullptr || (p.static_scale == nullptr) == (p.scales == nullptr)) return cudaErrorInvalidValue;
  const RowLevels levels(p.rows);
  const RowStrides contiguous{p.rows.inner * p.hidden_size, p.hidden_size};
  RmsNormPlan plan = make_plan(p, levels);
  RmsNormArguments& a = plan.arguments;
  a.output = p.q;
  a.output_rows = levels.indexing(contiguous);
  a.static_scale = p.static_scale;
  a.scales = p.scales;
  a.scale_rows = levels.indexing({p.rows.inner, 1});
  a.smoothing = p.smoothing;
  if (p.smoothing != nullptr && p.smoothing_dtype != p.dtype) a.options |= kFloat32Smoothing;
  plan.output = p.quant_dtype == DataType::kInt8 ? Output::kInt8 : Output::kFloat8E4M3;
  plan.packed = can_use_packs(p, p.q, contiguous, 1, p.smoothing);
  plan.weight_mode = a.options == 0 && p.smoothing == nullptr ? WeightMode::kPlain : WeightMode::kGeneral;
  return launch_all(plan, p.dtype, 1, levels, stream);
}

}  // namespace qwen_plugins
