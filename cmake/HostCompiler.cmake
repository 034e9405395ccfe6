# Enables C++, and says what is wrong where there is no compiler, or one that the CUDA compiler does not support.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "qwen-plugins needs a C++17 compiler and found none. Install one (Debian, Ubuntu: apt install g++; "
                      "Fedora: dnf install gcc-c++), or name it in the environment variable CXX.")
endif()
enable_language(CXX)

# The newest compilers stand in the CUDA toolkit's own header; the oldest are those that know C++17.
function(check_host_compiler cuda_version host_config)
  file(STRINGS ${host_config} limits REGEX "^#error.*(gcc versions later than|[^S] clang version must be less than)")
  string(REGEX MATCH "gcc versions later than ([0-9]+)" _ "${limits}")
  set(newest_gcc ${CMAKE_MATCH_1})
  string(REGEX MATCH "clang version must be less than ([0-9]+)" _ "${limits}")
  math(EXPR newest_clang "${CMAKE_MATCH_1} - 1")

  set(wanted "CUDA ${cuda_version} compiles with GCC 8 to ${newest_gcc}, or Clang 7 to ${newest_clang}")
  set(given "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER})")
  string(REGEX MATCH "^[0-9]+" major "${CMAKE_CXX_COMPILER_VERSION}")
  if(NOT ((CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND major GREATER_EQUAL 8 AND major LESS_EQUAL newest_gcc) OR
          (CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND major GREATER_EQUAL 7 AND major LESS_EQUAL newest_clang)))
    message(FATAL_ERROR "${wanted}; found ${given}. Name another in the environment variable CXX, for example "
                        "CXX=g++-${newest_gcc}.")
  endif()
endfunction()
