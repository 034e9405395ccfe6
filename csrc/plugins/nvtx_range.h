// Names the launches of a plug-in for nsys and ncu by a range in the NVTX domain "qwen_plugins". Without a profiler a
// range costs two checks of null function pointers.
#pragma once

#include <nvtx3/nvtx3.hpp>

namespace qwen_plugins {

struct NvtxDomain {
  static constexpr char const* name = "qwen_plugins";
};

// `Name` has a static string `message`, which is registered once, so that a range carries only a handle.
template <typename Name>
class NvtxRange {
 public:
  NvtxRange() : range_(nvtx3::registered_string_in<NvtxDomain>::get<Name>()) {}

 private:
  nvtx3::scoped_range_in<NvtxDomain> range_;
};

}  // namespace qwen_plugins
