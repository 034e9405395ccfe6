#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "gemm_kernel.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/capture.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "measure.h"
#include "packed_weight.h"

namespace qwen_plugins {
namespace {

// Weights that are read in turn have at least this size together, or 4 times that of the L2 cache where it is less.
constexpr int64_t kMaxRotatedBytes = int64_t{256} << 20;
constexpr int kCachesFull = 4;
constexpr int64_t kMaxCalls = 512;             // in a graph
constexpr float kReplayMicroseconds = 500.0F;  // about: the gap between two replays is 1 or 2 of them
constexpr int kReplays = 7;
constexpr int64_t kAlignment = 256;

template <auto destroy>
struct Destroy {
  template <typename Object>
  void operator()(Object* object) const {
    destroy(object);
  }
};
using Memory = std::unique_ptr<void, Destroy<cudaFree>>;
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy<cudaStreamDestroy>>;
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy<cudaEventDestroy>>;
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, Destroy<cudaGraphDestroy>>;
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy<cudaGraphExecDestroy>>;

// Gives what `make(&raw)` makes to its owner.
template <typename Owner, typename Make>
cudaError_t own(Owner& owner, const Make& make) {
  typename Owner::pointer raw = nullptr;
  const cudaError_t error = make(&raw);
  if (error == cudaSuccess) owner.reset(raw);
  return error;
}

// The steps after the first that fails are left out.
template <typename... Steps>
cudaError_t in_turn(const Steps&... steps) {
  cudaError_t error = cudaSuccess;
  static_cast<void>(((error = steps(), error == cudaSuccess) && ...));
  return error;
}

__device__ __forceinline__ uint32_t random_bits(uint32_t index) {
  uint32_t bits = index * 0x9E3779B9U;  // the finalizer of MurmurHash3
  bits = (bits ^ (bits >> 16)) * 0x85EBCA6BU;
  bits = (bits ^ (bits >> 13)) * 0xC2B2AE35U;
  return bits ^ (bits >> 16);
}

// Uniform between -scale and scale: the power that arithmetic takes, and so the clock, depends on the values.
template <typename T>
__global__ void fill(T* values, int64_t count, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint32_t bits = random_bits(static_cast<uint32_t>(i));
    values[i] = from_float<T>(scale * (static_cast<float>(bits) * 0x1p-31F - 1.0F));
  }
}

cudaError_t fill_random(void* values, int64_t count, DataType dtype, float scale, cudaStream_t stream) {
  return with_type(dtype, [&](auto zero) {
    fill<<<1024, 256, 0, stream>>>(static_cast<decltype(zero)*>(values), count, scale);
    return cudaGetLastError();
  });
}

// Any bits but those that are not in the mask: codes.
__global__ void fill_bits(uint32_t* words, int64_t count, uint32_t mask) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    words[i] = random_bits(static_cast<uint32_t>(i)) & mask;
  }
}

cudaError_t fill_codes(void* codes, int64_t bytes, WeightKind kind, cudaStream_t stream) {
  const uint32_t mask = kind == WeightKind::kFp8Rows ? 0xbfbfbfbfU : 0xffffffffU;  // e4m3 below 2: no NaN
  fill_bits<<<1024, 256, 0, stream>>>(static_cast<uint32_t*>(codes), bytes / 4, mask);
  return cudaGetLastError();
}

// Where the operands are in one piece of memory: several weights, the scales of x and y, bias, x, y and the workspace.
// Quantized weights are followed by their scales and zeros.
struct Layout {
  int64_t weight_stride, weights, operand_scales, bias, x, y, workspace, workspace_bytes, total;
  int64_t scales = 0, zeros = 0;  // from the beginning of their weight

  Layout(const GemmShape& shape, bool has_bias, const std::vector<GemmChoice>& choices, int64_t cache_bytes) {
    const int64_t size = size_of(shape.dtype);
    weight_stride = weight_bytes(shape);
    const int64_t rotated = std::min(kMaxRotatedBytes, kCachesFull * cache_bytes);
    weights = std::clamp<int64_t>(divide_up(rotated, weight_stride), 1, kMaxCalls);  // 1: a GPU may report no L2 cache
    operand_scales = weights * weight_stride;
    bias = operand_scales + (has_quantized_x(shape.weight_format) ? round_up(4 * (shape.rows + 1)) : 0);
    x = bias + (has_bias ? round_up(shape.out_features * size) : 0);
    y = x + round_up(shape.rows * shape.in_features * size_of(x_type_of(shape)));
    workspace = y + round_up(shape.rows * columns_of(shape) * size_of(y_type_of(shape)));
    workspace_bytes = 0;
    for (const GemmChoice choice : choices) {
      int64_t bytes = 0;
      gemm_workspace_bytes(shape, choice, &bytes);
      workspace_bytes = std::max(workspace_bytes, bytes);
    }
    total = workspace + workspace_bytes;
  }

 private:
  static int64_t round_up(int64_t bytes) { return divide_up(bytes, kAlignment) * kAlignment; }
  int64_t weight_bytes(const GemmShape& shape) {
    const WeightFormat& format = shape.weight_format;
    if (!is_quantized(format)) return round_up(shape.out_features * shape.in_features * size_of(shape.dtype));
    if (has_quantized_x(format)) {
      scales = round_up(shape.out_features * shape.in_features);
      const int64_t blocks = divide_up(shape.out_features, 128) * divide_up(shape.in_features, 128);
      zeros = scales + round_up(4 * (format.group_size == 0 ? shape.out_features : blocks));
      return zeros;
    }
    const PackedSizes sizes(format, shape.out_features, shape.in_features);
    scales = round_up(sizes.code_bytes);
    zeros = scales + round_up(sizes.scale_count * size_of(format.scale_dtype));
    return zeros + (format.has_zeros ? round_up(sizes.scale_count) : 0);
  }
};

class Measurement {
 public:
  Measurement(const GemmShape& shape, bool has_bias, const Layout& layout) : layout_(layout), has_bias_(has_bias) {
    params_.shape = shape;
    params_.x_row_stride = shape.in_features;
    params_.constant_weight = true;
    params_.workspace_bytes = layout.workspace_bytes;
  }

  cudaError_t prepare() {
    const GemmShape& shape = params_.shape;
    const float scale = 1.0F / std::sqrt(static_cast<float>(shape.in_features));
    return in_turn([&] { return current_device_properties(device_); },
                   [&] { return own(memory_, [&](void** memory) { return cudaMalloc(memory, layout_.total); }); },
                   [&] { return own(stream_, [](cudaStream_t* stream) { return make_stream(stream); }); },
                   [&] { return own(before_, [](cudaEvent_t* event) { return cudaEventCreate(event); }); },
                   [&] { return own(after_, [](cudaEvent_t* event) { return cudaEventCreate(event); }); },
                   [&] { return is_quantized(shape.weight_format) ? fill_quantized(scale) : fill_weights(scale); },
                   [&] { return fill_operands(scale); },
                   [&] {
                     if (has_quantized_x(shape.weight_format)) {
                       params_.x_scales = reinterpret_cast<float*>(at(layout_.operand_scales));
                       params_.y_scale = shape.quantized_y ? params_.x_scales + shape.rows : nullptr;
                     }
                     params_.bias = has_bias_ ? at(layout_.bias) : nullptr;
                     params_.x = at(layout_.x);
                     params_.y = at(layout_.y);
                     params_.workspace = layout_.workspace_bytes > 0 ? at(layout_.workspace) : nullptr;
                     return cudaSuccess;
                   });
  }

  // Captures launches of a choice in a graph, as many as take kReplayMicroseconds or have used every weight.
  // cudaErrorNotSupported where the choice cannot compute the GEMM.
  cudaError_t add(GemmChoice choice) {
    params_.choice = choice;
    float microseconds = 0.0F;
    Graph graph;
    GraphExec replayed;
    const cudaError_t error = in_turn(
        [&] { return launch(1); },  // what happens once only
        [&] { return estimate(microseconds); }, [&] { return capture(graph, calls_for(microseconds)); },
        [&] {
          return own(replayed, [&](cudaGraphExec_t* exec) { return cudaGraphInstantiate(exec, graph.get(), 0); });
        },
        [&] { return cudaGraphLaunch(replayed.get(), stream()); }, [&] { return cudaStreamSynchronize(stream()); });
    if (error == cudaSuccess) replays_.push_back({std::move(replayed), calls_for(microseconds), {}});
    return error;
  }

  // Replays the graphs in turn, so that a drift of the clock meets all of them.
  cudaError_t replay() {
    std::vector<Event> events(kReplays * replays_.size() + 1);
    for (Event& event : events) {
      const cudaError_t error = own(event, [](cudaEvent_t* made) { return cudaEventCreate(made); });
      if (error != cudaSuccess) return error;
    }
    // The first replay, which is not timed, keeps the device busy while the next are launched.
    cudaError_t error = replays_.empty() ? cudaSuccess : cudaGraphLaunch(replays_[0].graph.get(), stream());
    for (size_t i = 0; i < events.size() && error == cudaSuccess; ++i) {
      if (i > 0) error = cudaGraphLaunch(replays_[(i - 1) % replays_.size()].graph.get(), stream());
      if (error == cudaSuccess) error = cudaEventRecord(events[i].get(), stream());
    }
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream());
    for (size_t i = 1; i < events.size() && error == cudaSuccess; ++i) {
      float milliseconds = 0.0F;
      error = cudaEventElapsedTime(&milliseconds, events[i - 1].get(), events[i].get());
      replays_[(i - 1) % replays_.size()].milliseconds.push_back(milliseconds);
    }
    return error;
  }

  // The median of a choice's replays, in microseconds for each call; by the order in which choices were added.
  float median_of(size_t index) {
    Replay& replay = replays_[index];
    std::sort(replay.milliseconds.begin(), replay.milliseconds.end());
    return 1e3F * replay.milliseconds[kReplays / 2] / static_cast<float>(replay.calls);
  }

 private:
  struct Replay {
    GraphExec graph;
    int64_t calls;
    std::vector<float> milliseconds;
  };

  static cudaError_t make_stream(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
  }
  cudaStream_t stream() const { return stream_.get(); }
  char* at(int64_t offset) const { return static_cast<char*>(memory_.get()) + offset; }

  cudaError_t fill_weights(float scale) {
    const DataType dtype = params_.shape.dtype;
    return fill_random(at(0), layout_.operand_scales / size_of(dtype), dtype, scale, stream());
  }
  cudaError_t fill_quantized(float scale) {
    const WeightFormat& format = params_.shape.weight_format;
    const int64_t count = (layout_.zeros - layout_.scales) / size_of(format.scale_dtype);
    cudaError_t error = fill_codes(at(0), layout_.operand_scales, format.kind, stream());
    for (int64_t i = 0; i < layout_.weights && error == cudaSuccess; ++i) {
      error = fill_random(at(i * layout_.weight_stride + layout_.scales), count, format.scale_dtype,
                          scale / static_cast<float>(middle_code_of(format.kind)), stream());
    }
    return error;
  }
  cudaError_t fill_operands(float scale) {
    const GemmShape& shape = params_.shape;
    const WeightKind kind = shape.weight_format.kind;
    const int64_t count = (layout_.y - layout_.bias) / size_of(shape.dtype);  // bias and x
    const cudaError_t error = fill_random(at(layout_.bias), count, shape.dtype, 1.0F, stream());
    if (error != cudaSuccess || !has_quantized_x(shape.weight_format)) return error;
    return in_turn([&] { return fill_codes(at(layout_.x), layout_.y - layout_.x, kind, stream()); },
                   [&] {
                     const int64_t scales = shape.rows + 1;  // of x and y
                     return fill_random(at(layout_.operand_scales), scales, DataType::kFloat32, scale, stream());
                   });
  }

  cudaError_t launch(int64_t calls) {
    cudaError_t error = cudaSuccess;
    for (int64_t i = 0; i < calls && error == cudaSuccess; ++i) {
      char* const weight = at(next_weight_ * layout_.weight_stride);
      params_.weight = weight;
      params_.scales = is_quantized(params_.shape.weight_format) ? weight + layout_.scales : nullptr;
      params_.zeros = params_.shape.weight_format.has_zeros ? weight + layout_.zeros : nullptr;
      next_weight_ = (next_weight_ + 1) % layout_.weights;
      error = launch_choice(params_, device_, stream());
    }
    return error;
  }

  // Measures two calls without a graph: too long for a short kernel, which the host may be slower to launch.
  cudaError_t estimate(float& microseconds) {
    constexpr int kCalls = 2;
    float milliseconds = 0.0F;
    const cudaError_t error = in_turn(
        [&] { return cudaEventRecord(before_.get(), stream()); }, [&] { return launch(kCalls); },
        [&] { return cudaEventRecord(after_.get(), stream()); }, [&] { return cudaStreamSynchronize(stream()); },
        [&] { return cudaEventElapsedTime(&milliseconds, before_.get(), after_.get()); });
    microseconds = 1e3F * milliseconds / kCalls;
    return error;
  }

  int64_t calls_for(float microseconds) const {
    const auto calls = static_cast<int64_t>(std::ceil(kReplayMicroseconds / std::max(microseconds, 1.0F)));
    const bool can_use_all = static_cast<float>(layout_.weights) * microseconds <= 4.0F * kReplayMicroseconds;
    return std::clamp<int64_t>(can_use_all ? std::max(calls, layout_.weights) : calls, 2, kMaxCalls);
  }

  cudaError_t capture(Graph& graph, int64_t calls) {
    cudaError_t error = cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed);
    if (error != cudaSuccess) return error;
    error = launch(calls);
    const cudaError_t end = own(graph, [&](cudaGraph_t* made) { return cudaStreamEndCapture(stream(), made); });
    return error == cudaSuccess ? end : error;
  }

  const Layout layout_;
  const bool has_bias_;
  GemmParams params_;
  DeviceProperties device_{};
  int64_t next_weight_ = 0;
  // The members below are destroyed in the opposite order: the memory is freed last.
  Memory memory_;
  Stream stream_;
  Event before_, after_;
  std::vector<Replay> replays_;
};

double operand_bytes(const GemmShape& shape) {
  const auto rows = static_cast<double>(shape.rows), k = static_cast<double>(shape.in_features);
  const auto n = static_cast<double>(shape.out_features);
  return static_cast<double>(size_of(shape.dtype)) * (rows * k + n * k + rows * n);
}

cudaError_t cache_bytes_of_device(int64_t& bytes) {
  int device = 0, value = 0;
  const cudaError_t error = in_turn([&] { return cudaGetDevice(&device); },
                                    [&] { return cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, device); });
  bytes = value;
  return error;
}

cudaError_t measure(const GemmShape& shape, bool has_bias, const std::vector<GemmChoice>& choices,
                    GemmMeasurements& measurements) {
  int64_t cache_bytes = 0;
  if (const cudaError_t error = cache_bytes_of_device(cache_bytes); error != cudaSuccess) return error;
  const Layout layout(shape, has_bias, choices, cache_bytes);
  measurements.device_bytes = layout.total;
  Measurement measurement(shape, has_bias, layout);
  if (const cudaError_t error = measurement.prepare(); error != cudaSuccess) return error;
  std::vector<bool> can_run;
  for (const GemmChoice choice : choices) {
    const cudaError_t error = measurement.add(choice);
    if (error != cudaSuccess && error != cudaErrorNotSupported) return error;
    can_run.push_back(error == cudaSuccess);
  }
  if (const cudaError_t error = measurement.replay(); error != cudaSuccess) return error;
  size_t measured = 0;
  for (const bool runs : can_run) measurements.microseconds.push_back(runs ? measurement.median_of(measured++) : 0.0F);
  return cudaSuccess;
}

}  // namespace

cudaError_t measure_gemm(const GemmShape& shape, bool has_bias, const std::vector<GemmChoice>& choices,
                         GemmMeasurements* measurements) {
  *measurements = {};
  if (!is_valid(shape) || shape.rows == 0) return cudaErrorInvalidValue;
  if (const double bytes = operand_bytes(shape); bytes > 0x1p60) {  // the sums of a Layout would overflow
    measurements->device_bytes = static_cast<int64_t>(std::min(bytes, 0x1p62));
    return cudaErrorMemoryAllocation;
  }
  const OutsideOfCapture relaxed;
  const cudaError_t error = measure(shape, has_bias, choices, *measurements);
  if (error != cudaSuccess) cudaGetLastError();  // it is returned: nobody else should find it
  return error;
}

}  // namespace qwen_plugins
