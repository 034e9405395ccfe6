# Enables CUDA with the compiler of the nvidia-cuda-nvcc package in the build environment, or with an installed toolkit
# where QWEN_PLUGINS_SYSTEM_CUDA is ON or CUDAToolkit_ROOT is given.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

if(CMAKE_CUDA_COMPILER OR DEFINED CUDAToolkit_ROOT OR DEFINED ENV{CUDAToolkit_ROOT})
  set(QWEN_PLUGINS_SYSTEM_CUDA ON)
endif()

if(QWEN_PLUGINS_SYSTEM_CUDA)
  if(NOT CUDAToolkit_ROOT AND DEFINED ENV{CUDAToolkit_ROOT})
    set(CUDAToolkit_ROOT $ENV{CUDAToolkit_ROOT})
  endif()
  if(CUDAToolkit_ROOT AND NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_ROOT}/bin/nvcc)
  endif()
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(';'.join(nvidia.__path__))"
    OUTPUT_VARIABLE nvidia_folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_path(pip_cuda_root bin/nvcc PATHS ${nvidia_folders} PATH_SUFFIXES cu13 NO_DEFAULT_PATH)
  if(NOT pip_cuda_root)
    message(FATAL_ERROR
      "No nvcc from pip in ${Python_EXECUTABLE}'s environment. `pip install .` brings it; with --no-build-isolation either "
      "install the packages that pyproject.toml lists under build-system.requires, or use an installed CUDA toolkit: "
      "pip install . --no-build-isolation -C cmake.define.QWEN_PLUGINS_SYSTEM_CUDA=ON")
  endif()
  set(CMAKE_CUDA_COMPILER ${pip_cuda_root}/bin/nvcc)
  set(CUDAToolkit_ROOT ${pip_cuda_root})
  # The package's nvcc.profile points to lib64, but its libraries are in lib.
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${pip_cuda_root}/lib")
  # CMake insists on finding the shared CUDA runtime, too, which nothing links and which has no unversioned name there.
  file(GLOB CUDA_CUDART ${pip_cuda_root}/lib/libcudart.so.*)
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Machine code for Ampere to Blackwell; the PTX of the newest lets later chips compile it at load time.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "CUDA ${CUDAToolkit_VERSION} from ${CMAKE_CUDA_COMPILER}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
