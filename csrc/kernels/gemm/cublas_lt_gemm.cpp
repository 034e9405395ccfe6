#include "cublas_lt_gemm.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "cublas_lt.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/capture.h"
#include "stream.h"
#include "swiglu.h"

namespace qwen_plugins {
namespace {

using cublas_lt::kNotSupported;
using cublas_lt::kSuccess;

constexpr int64_t kWorkspaceBytes = kCublasLtWorkspaceBytes;
// Rows that one call computes where SwiGLU follows: more are no faster, and z takes more workspace.
constexpr int64_t kMaxSwigluRows = 8192;
// Algorithms among which a measurement may choose.
constexpr int32_t kAlgorithms = 3;
constexpr size_t kMaxPlans = 4096;  // a few hundred bytes each; beyond that all are dropped and made anew

// Everything that cuBLASLt's choice of an algorithm depends on.
struct Key {
  int device;
  int64_t rows, in_features, out_features, x_row_stride, z_row_stride;
  DataType dtype, z_dtype;
  bool has_bias;
  uint32_t weight_alignment, x_alignment, z_alignment;  // z_alignment: of z and the bias
  int32_t algorithm;                                    // which of those that cuBLASLt proposes, from 1 on

  auto fields() const {
    return std::tie(device, rows, in_features, out_features, x_row_stride, z_row_stride, dtype, z_dtype, has_bias,
                    weight_alignment, x_alignment, z_alignment, algorithm);
  }
  bool operator<(const Key& other) const { return fields() < other.fields(); }
};

// As cuBLASLt names it, of the types that it is given.
cudaDataType cuda_type_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return CUDA_R_32F;
    case DataType::kFloat16:
      return CUDA_R_16F;
    case DataType::kBFloat16:
      return CUDA_R_16BF;
    case DataType::kInt8:
      return CUDA_R_8I;
    case DataType::kInt32:
      return CUDA_R_32I;
    case DataType::kFloat8E4M3:
      return CUDA_R_8F_E4M3;
  }
  return CUDA_R_32F;
}

uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>(std::min<uintptr_t>(address & -address, 256));
}

// Row-major z = x · weight^T is, column-major, z^T = weight · x^T with the weight stored transposed.
struct Plan {
  const CublasLt& lt;
  cublas_lt::Descriptor descriptor = nullptr;
  cublas_lt::Layout weight = nullptr, x = nullptr, z = nullptr;
  cublas_lt::HeuristicResult chosen{};
  bool usable = false;

  Plan(const CublasLt& functions, cublas_lt::Handle handle, const Key& key) : lt(functions) {
    usable = make_descriptor(key) && make_layouts(key) && choose(handle, key);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (cublas_lt::Layout layout : {weight, x, z}) {
      if (layout != nullptr) lt.layout_destroy(layout);
    }
    if (descriptor != nullptr) lt.descriptor_destroy(descriptor);
  }

  template <typename Value>
  bool set(int attribute, const Value& value) {
    return lt.descriptor_set(descriptor, attribute, &value, sizeof(value)) == kSuccess;
  }
  bool make_descriptor(const Key& key) {
    const bool is_int8 = key.dtype == DataType::kInt8;
    return lt.descriptor_create(&descriptor, is_int8 ? cublas_lt::kCompute32I : cublas_lt::kCompute32F,
                                is_int8 ? CUDA_R_32I : CUDA_R_32F) == kSuccess &&
           set(cublas_lt::kTransA, int32_t{cublas_lt::kTransposed}) &&
           (!key.has_bias || set(cublas_lt::kEpilogue, cublas_lt::kEpilogueBias));
  }
  bool make_layouts(const Key& key) {
    const cudaDataType type = cuda_type_of(key.dtype);
    return lt.layout_create(&weight, type, key.in_features, key.out_features, key.in_features) == kSuccess &&
           lt.layout_create(&x, type, key.in_features, key.rows, key.x_row_stride) == kSuccess &&
           lt.layout_create(&z, cuda_type_of(key.z_dtype), key.out_features, key.rows, key.z_row_stride) == kSuccess;
  }
  bool choose(cublas_lt::Handle handle, const Key& key) {
    cublas_lt::Preference preference = nullptr;
    if (lt.preference_create(&preference) != kSuccess) return false;
    const auto prefer = [&](int attribute, auto value) {
      return lt.preference_set(preference, attribute, &value, sizeof(value)) == kSuccess;
    };
    std::array<cublas_lt::HeuristicResult, kAlgorithms> proposed{};
    int found = 0;
    const bool chose =
        prefer(cublas_lt::kMaxWorkspaceBytes, static_cast<uint64_t>(kWorkspaceBytes)) &&
        // Split-K sums in float32, too: by default cuBLASLt may use the type of z.
        prefer(cublas_lt::kReductionSchemes, cublas_lt::kReduceInComputeType) &&
        prefer(cublas_lt::kMinAlignmentA, key.weight_alignment) && prefer(cublas_lt::kMinAlignmentB, key.x_alignment) &&
        prefer(cublas_lt::kMinAlignmentC, key.z_alignment) && prefer(cublas_lt::kMinAlignmentD, key.z_alignment) &&
        // No more than needed are asked for: the first need not be the same where several are.
        lt.heuristic(handle, descriptor, weight, x, z, z, preference, key.algorithm, proposed.data(), &found) ==
            kSuccess &&
        found >= key.algorithm;
    lt.preference_destroy(preference);
    chosen = proposed[key.algorithm - 1];
    return chose && chosen.status == kSuccess;
  }
};

// cuBLASLt's handles, by device, and the plans. A launch holds the lock, since it writes the bias pointer into the
// plan's descriptor.
class Plans {
 public:
  explicit Plans(const CublasLt& lt) : lt_(lt) {}

  cudaError_t launch(const Key& key, const GemmParams& params, void* z, void* workspace, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const OutsideOfCapture relaxed;
    cublas_lt::Handle& handle = handles_[key.device];
    if (handle == nullptr && lt_.create(&handle) != kSuccess) return cudaErrorNotSupported;
    if (plans_.size() >= kMaxPlans) plans_.clear();
    std::unique_ptr<Plan>& plan = plans_[key];
    if (plan == nullptr) plan = std::make_unique<Plan>(lt_, handle, key);
    if (!plan->usable || (key.has_bias && !plan->set(cublas_lt::kBiasPointer, params.bias)))
      return cudaErrorNotSupported;
    const float one = 1.0F;
    const int32_t integer_one = 1;
    const void* const factor = key.dtype == DataType::kInt8 ? static_cast<const void*>(&integer_one) : &one;
    const int64_t zero = 0;  // of either type
    const int status =
        lt_.matmul(handle, plan->descriptor, factor, params.weight, plan->weight, params.x, plan->x, &zero, z, plan->z,
                   z, plan->z, &plan->chosen.algorithm, workspace, kWorkspaceBytes, stream);
    if (status == kNotSupported) return cudaErrorNotSupported;
    return status == kSuccess ? cudaSuccess : cudaErrorUnknown;
  }

 private:
  const CublasLt& lt_;
  std::mutex mutex_;
  std::map<int, cublas_lt::Handle> handles_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

cudaError_t launch_product_and_swiglu(const GemmParams& p, int32_t variant, cudaStream_t stream) {
  SwigluParams swiglu;
  void* z = static_cast<char*>(p.workspace) + kWorkspaceBytes;
  swiglu.gate_up = z;
  swiglu.y = p.y;
  swiglu.gate_up_row_stride = p.shape.out_features;
  swiglu.rows = p.shape.rows;
  swiglu.size = p.shape.out_features / 2;
  swiglu.dtype = p.shape.dtype;
  const cudaError_t error = launch_cublas_lt(p, variant, z, p.shape.out_features, stream);
  return error == cudaSuccess ? launch_swiglu(swiglu, stream) : error;
}

cudaError_t launch(const GemmParams& p, const DeviceProperties&, int32_t variant, cudaStream_t stream) {
  if (p.shape.activation == Activation::kNone) return launch_cublas_lt(p, variant, p.y, p.shape.out_features, stream);
  const int64_t parts = divide_up(p.shape.rows, kMaxSwigluRows);
  const int64_t rows = divide_up(p.shape.rows, parts);  // as even as possible: each part reads the whole weight
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < p.shape.rows && error == cudaSuccess; row += rows) {
    error = launch_product_and_swiglu(rows_of(p, row, std::min(rows, p.shape.rows - row)), variant, stream);
  }
  return error;
}

bool takes(const GemmParams& params, const DeviceProperties&, int32_t) {
  return !is_quantized(params.shape.weight_format) && load_cublas_lt() != nullptr;
}

int64_t workspace_bytes(const GemmShape& shape) {
  if (is_quantized(shape.weight_format)) return 0;
  if (shape.activation == Activation::kNone) return kWorkspaceBytes;
  return kWorkspaceBytes + std::min(shape.rows, kMaxSwigluRows) * shape.out_features * size_of(shape.dtype);
}

}  // namespace

bool has_cublas_lt() { return load_cublas_lt() != nullptr; }

cudaError_t launch_cublas_lt(const GemmParams& params, int32_t variant, void* z, int64_t z_row_stride,
                             cudaStream_t stream) {
  const CublasLt* lt = load_cublas_lt();
  if (lt == nullptr) return cudaErrorNotSupported;
  const GemmShape& shape = params.shape;
  Key key{};
  if (const cudaError_t error = cudaGetDevice(&key.device); error != cudaSuccess) return error;
  key.rows = shape.rows;
  key.in_features = shape.in_features;
  key.out_features = shape.out_features;
  key.x_row_stride = params.x_row_stride;
  key.z_row_stride = z_row_stride;
  key.dtype = x_type_of(shape);
  const bool of_codes = has_quantized_x(shape.weight_format);
  key.z_dtype = !of_codes ? shape.dtype : key.dtype == DataType::kInt8 ? DataType::kInt32 : DataType::kFloat32;
  key.has_bias = params.bias != nullptr && !of_codes;
  key.algorithm = variant == kOwnVariant ? 1 : variant;
  key.weight_alignment = alignment_of(params.weight);
  key.x_alignment = alignment_of(params.x);
  key.z_alignment = alignment_of(z);
  // cuBLASLt takes no alignment of the bias, which it reads with vectors as wide as those it writes z with.
  if (key.has_bias) key.z_alignment = std::min(key.z_alignment, alignment_of(params.bias));
  static Plans& plans = *new Plans(*lt);  // never destroyed: at exit cuBLASLt may be unloaded first
  return plans.launch(key, params, z, params.workspace, stream);
}

GemmKernel cublas_lt_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kCublasLt;
  kernel.name = "cublas_lt";
  for (int32_t i = 1; i <= kAlgorithms; ++i) kernel.variants.push_back({i, std::to_string(i)});
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams& params, const DeviceProperties&) { return !is_for_stream(params.shape); };
  kernel.is_candidate = takes;
  kernel.workspace_bytes = workspace_bytes;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
