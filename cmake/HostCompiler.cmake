# Enables C++, and says what is wrong where there is no compiler, or one that CUDA 13.0 does not support.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "qwen-plugins needs a C++17 compiler and found none. Install one (Debian, Ubuntu: apt install g++; "
                      "Fedora: dnf install gcc-c++), or name it in the environment variable CXX.")
endif()
enable_language(CXX)

# The range that CUDA 13.0's crt/host_config.h accepts, but for GCC 6 and 7, which lack parts of C++17.
set(wanted "GCC 8 to 15, or Clang 7 to 20")
set(given "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER})")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(oldest 8)
  set(newest 15)
elseif(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  set(oldest 7)
  set(newest 20)
else()
  message(FATAL_ERROR "qwen-plugins compiles with ${wanted}; found ${given}. Name another in the environment variable CXX.")
endif()
string(REGEX MATCH "^[0-9]+" major "${CMAKE_CXX_COMPILER_VERSION}")
if(major LESS oldest OR major GREATER newest)
  message(FATAL_ERROR "CUDA 13.0 compiles with ${wanted}; found ${given}. Name another in the environment variable CXX, "
                      "for example CXX=g++-13.")
endif()
