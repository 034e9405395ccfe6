#include "cublas_lt.h"

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

namespace qwen_plugins {
namespace {

// The CUDA version of this build first: a driver for CUDA 12 cannot run what is for 13.
#if CUDART_VERSION >= 13000
constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
#else
constexpr const char* kNames[] = {"libcublasLt.so.12", "libcublasLt.so.13"};
#endif

struct Candidate {
  std::string file;
  int flags = RTLD_NOW | RTLD_LOCAL;
};

// The parent of the folder that this shared library is in: site-packages, where pip installed the package.
std::string site_packages() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&load_cublas_lt), &info) == 0 || info.dli_fname == nullptr) return {};
  std::string path = info.dli_fname;
  for (int i = 0; i < 2; ++i) {
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return {};
    path.resize(slash);
  }
  return path;
}

std::vector<Candidate> candidates() {
  if (const char* given = std::getenv("QWEN_PLUGINS_CUBLASLT"); given != nullptr && *given != '\0') {
    if (std::string(given) == "none") return {};
    return {{given}};
  }
  std::vector<Candidate> found;
  for (const char* name : kNames) found.push_back({name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD});
  if (const std::string site = site_packages(); !site.empty()) {
    for (const char* name : kNames) {
      for (const char* folder : {"/nvidia/cu13/lib/", "/nvidia/cublas/lib/"}) found.push_back({site + folder + name});
    }
  }
  for (const char* name : kNames) found.push_back({name});
  for (const char* name : kNames) found.push_back({std::string("/usr/local/cuda/lib64/") + name});
  return found;
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, CublasLt& lt) {
  return find(library, "cublasLtGetVersion", lt.version) && find(library, "cublasLtCreate", lt.create) &&
         find(library, "cublasLtMatmulDescCreate", lt.descriptor_create) &&
         find(library, "cublasLtMatmulDescDestroy", lt.descriptor_destroy) &&
         find(library, "cublasLtMatmulDescSetAttribute", lt.descriptor_set) &&
         find(library, "cublasLtMatrixLayoutCreate", lt.layout_create) &&
         find(library, "cublasLtMatrixLayoutDestroy", lt.layout_destroy) &&
         find(library, "cublasLtMatmulPreferenceCreate", lt.preference_create) &&
         find(library, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic) && find(library, "cublasLtMatmul", lt.matmul);
}

struct Loaded {
  bool usable = false;
  CublasLt functions{};
  std::string status;

  Loaded() {
    const std::vector<Candidate> files = candidates();
    if (files.empty()) status = "cuBLASLt is switched off: QWEN_PLUGINS_CUBLASLT is none";
    std::string places, first_error;
    for (const Candidate& candidate : files) {
      std::string error;
      if (load(candidate, error)) return;
      if (candidate.flags & RTLD_NOLOAD) continue;  // tried again below without RTLD_NOLOAD
      places += (places.empty() ? "" : ", ") + candidate.file;
      if (first_error.empty()) first_error = error;
    }
    if (!files.empty()) status = "cuBLASLt was not found; looked for " + places + " (" + first_error + ")";
  }

 private:
  bool load(const Candidate& candidate, std::string& error) {
    void* library = dlopen(candidate.file.c_str(), candidate.flags);
    if (library == nullptr) {
      const char* why = dlerror();
      error = why == nullptr ? "unknown error" : why;
      return false;
    }
    if (!find_all(library, functions)) {
      error = candidate.file + " lacks functions of cuBLASLt";
      dlclose(library);
      return false;
    }
    usable = true;
    status = candidate.file;
    return true;
  }
};

const Loaded& loaded() {
  static const Loaded once;
  return once;
}

}  // namespace

const CublasLt* load_cublas_lt() { return loaded().usable ? &loaded().functions : nullptr; }

const std::string& cublas_lt_status() { return loaded().status; }

int64_t cublas_lt_version() { return loaded().usable ? static_cast<int64_t>(loaded().functions.version()) : 0; }

}  // namespace qwen_plugins
